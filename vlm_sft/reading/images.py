"""One image, whatever it is on disk, as an upright RGB picture, or one sentence that says why not."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..base.errors import RowError, row_error
from ..base.whole_files import IrregularError, open_regular
from ..base.words import reason_of
from .image_kinds import describe_unreadable, kind_of, may_be_turned, without_texts
from .image_refs import TIME, is_url, size_asked
from .video import Films

MAX_PIXELS = 178_956_970  # where PIL itself calls an image a decompression bomb
# A JPEG is decoded at a half, a quarter or an eighth of its size where that still has so many times the pixels needed
# on each side. At 2 the result, once resized, is within a mean of TOLERANCE (of 255) of the full decode.
ENOUGH, TOLERANCE = 2, 2.0

# What photos and screenshots come in. PIL knows more, but some of those start programs (EPS: Ghostscript) or accept
# nearly any bytes (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "MPO")


def load_image(
    image: Mapping[str, Any] | str | Path | bytes | Image.Image,
    *,
    where: str = "",
    max_pixels: int = MAX_PIXELS,
    side: int | None = None,
    fetch: Callable[[str], str] | None = None,
    films: Films | None = None,
) -> Image.Image:
    """Decode one image to 8-bit RGB, upright.

    The EXIF rotation is applied; transparent pixels lie over white; of an animation the first frame is taken; CMYK,
    palette and grey become RGB; 16-bit grey is scaled to 8 bits, not clipped. Files are closed before returning.

    Args:
        image: a row's ``{"path": ..., "bytes": ...}`` (bytes win), maybe with the sizes of
            `image_refs` or, of a video's frame, its time; a path, encoded bytes, or a PIL image.
        where: put in front of every error, for instance ``captions/17``.
        max_pixels: the largest width times height. It is compared before anything is decoded. PIL's own limit
            (178,956,970 by default) holds as well.
        side: pixels that are needed on each side. A JPEG of at least four times as many is decoded smaller, which is
            several times faster; its sides never become shorter than ``ENOUGH * side``. None decodes all of it.
        fetch: gives the file in which the image of a URL lies, `fetch.Fetcher`; None refuses URLs.
        films: keeps the video of a frame open for the next one; None opens it for this one.

    Returns:
        A new PIL image of mode RGB with no reference to the file or to `image`.

    Raises:
        RowError: the image is missing, a folder, unreadable, empty, truncated, damaged, too large or not an image.
    """
    if isinstance(image, Mapping) and TIME in image:
        with nullcontext(films) if films is not None else Films() as films:
            return _to_rgb(films.frame(image, where, max_pixels))
    try:
        limits = _Limits(max_pixels, side)
        loaded = _load(image, f"{where}: " if where else "", limits, fetch)
        return _resized(loaded, image, where, limits) if isinstance(image, Mapping) else loaded
    except RowError as error:
        error.where = where
        raise


def _resized(loaded: Image.Image, image: Mapping[str, Any], where: str, limits: _Limits) -> Image.Image:
    """A picture in the size that its entry asks for."""
    asked = size_asked(loaded.size, image)
    if asked == loaded.size:
        return loaded
    if asked[0] * asked[1] > limits.max_pixels:
        what = f"an image of {loaded.width:,} x {loaded.height:,} pixels is to become {asked[0]:,} x {asked[1]:,}"
        mend = f"at most {limits.max_pixels:,} pixels are made: ask for fewer in the row"
        raise row_error(where, what, mend, "image too large")
    return loaded.resize(asked, Image.Resampling.BICUBIC)


class _Limits(NamedTuple):
    max_pixels: int
    side: int | None


def _load(
    image: Mapping[str, Any] | str | Path | bytes | Image.Image,
    prefix: str,
    limits: _Limits,
    fetch: Callable[[str], str] | None,
) -> Image.Image:
    if isinstance(image, Mapping):
        encoded, path = image.get("bytes"), image.get("path")
        if encoded is not None:
            name = f" {path}" if path else ""
            return _from_stream(io.BytesIO(encoded), f"{prefix}the embedded image{name}", limits)
        if not path:
            raise RowError(f"{prefix}the image has neither a path nor bytes: give one of them.", reason="image missing")
        image = str(path)
    if isinstance(image, Image.Image):
        return _decode(image, f"{prefix}the image", limits)
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_stream(io.BytesIO(image), f"{prefix}the embedded image", limits)
    if isinstance(image, str | Path):
        path = str(image)
        if not is_url(path):
            return _from_file(path, prefix, limits)
        if fetch is None:
            raise RowError(
                f"{prefix}the image {path} is a URL and no URL is fetched: download it first and give the path of the "
                "file.",
                reason="image is a URL",
            )
        try:
            file = fetch(path)
        except RowError as error:
            raise RowError(f"{prefix}{error}", reason=error.reason) from None
        return _from_file(file, prefix, limits, f"{prefix}the image {path}")
    raise RowError(
        f"{prefix}the image is of type {type(image).__name__}: give a path, encoded bytes or a PIL image.",
        reason="not an image",
    )


def image_size(
    image: Mapping[str, Any] | str | Path | bytes | Image.Image,
    *,
    where: str = "",
    fetch: Callable[[str], str] | None = None,
    films: Films | None = None,
) -> tuple[int, int]:
    """(width, height) in pixels that `load_image` will give, mostly from the head of the file alone.

    Args and Raises: see `load_image`.
    """
    if isinstance(image, Image.Image):
        return _upright_size(image)
    if isinstance(image, Mapping) and TIME in image:
        with nullcontext(films) if films is not None else Films() as films:
            return films.size(image, where)
    source = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else open_regular(str(source))
        with stream, Image.open(stream, formats=_formats()) as opened:
            # Pillow reads all pixels of a PNG to look for EXIF behind them.
            size = opened.size if opened.format == "PNG" and not may_be_turned(stream) else _upright_size(opened)
            return size_asked(size, image) if isinstance(image, Mapping) else size
    except Exception:  # whatever it is, `load_image` says it in a sentence, or reads it in another way
        return load_image(image, where=where, fetch=fetch).size


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the orientations that lie on a side
    return (image.height, image.width) if turned else image.size


def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _from_file(path: str, prefix: str, limits: _Limits, what: str = "") -> Image.Image:
    what = what or f"{prefix}the image {path}"
    try:
        with open_regular(path) as stream:
            return _from_stream(stream, what, limits)
    except IrregularError as error:
        raise RowError(
            f"{what} is {error.what}, no image file: give the path of one.", reason="image missing"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise RowError(f"{prefix}{_missing(path, of_row=bool(prefix))}", reason="image missing") from None
    except PermissionError:
        raise RowError(
            f"{what} may not be read by this user: change its permissions.", reason="image unreadable"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(
            f"{what} cannot be opened ({reason_of(error)}): check the path and the disk.", reason="image unreadable"
        ) from None


def _missing(path: str, of_row: bool) -> str:
    folder, name = os.path.split(path)
    folder = folder or "."
    if not os.path.isdir(folder):
        return f"the image {name} was not found because the folder {folder} does not exist: correct the path."
    stem = os.path.splitext(name)[0]
    near = (stem + ending for ending in (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG"))
    hint = next((f" (but {n} is there)" for n in near if os.path.exists(os.path.join(folder, n))), "")
    mend = "correct the path in the data or the source's `images` folder" if of_row else "correct the path"
    return f"the image {name} was not found in the folder {folder}{hint}: {mend}."


def _from_stream(stream: IO[bytes], what: str, limits: _Limits) -> Image.Image:
    head = stream.read(64)
    if not head:
        raise RowError(f"{what} is empty (0 bytes): download it again or remove the row.", reason="image empty")
    with warnings.catch_warnings():
        # PIL warns about odd but readable files; what cannot be read is an error below.
        warnings.simplefilter("ignore")
        try:
            return _opened(stream, head, what, limits)
        except RowError as error:
            for shorter in without_texts(stream, limits.max_pixels) if error.reason == "image damaged" else ():
                with suppress(RowError):
                    return _opened(shorter, head, what, limits)
            raise


def _opened(stream: IO[bytes], head: bytes, what: str, limits: _Limits) -> Image.Image:
    stream.seek(0)
    try:
        image = Image.open(stream, formats=_formats())
    except Image.DecompressionBombError:
        raise RowError(_too_large(what, None, limits.max_pixels), reason="image too large") from None
    except UnidentifiedImageError:
        damaged = kind_of(head) is not None
        reason = "image damaged" if damaged else "not an image"
        raise RowError(f"{what} {describe_unreadable(head)}.", reason=reason) from None
    except Exception as error:  # the plugins let SyntaxError, struct.error, IndexError ... through
        raise RowError(_damaged(what, error), reason="image damaged") from None
    with image:
        return _decode(image, what, limits)


def _decode(image: Image.Image, what: str, limits: _Limits) -> Image.Image:
    if image.width * image.height > limits.max_pixels:
        raise RowError(_too_large(what, image.size, limits.max_pixels), reason="image too large")
    try:
        if limits.side is not None:
            image.draft(None, (ENOUGH * limits.side,) * 2)  # only JPEG can; it keeps at least so many pixels
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # as in _from_stream: decoders raise anything
        raise RowError(_damaged(what, error), reason="image damaged") from None


def needed_side(image_processor: object) -> int | None:
    """Pixels that an image processor needs on each side; None where it depends on the image, or nothing is resized."""
    size = {key: value for key, value in dict(getattr(image_processor, "size", None) or {}).items() if value}
    fixed = bool(size) and size.keys() <= {"height", "width", "shortest_edge"}
    return max(size.values()) if fixed and getattr(image_processor, "do_resize", False) else None


def grown_size(size: tuple[int, int], image_processor: object, square: bool = False) -> tuple[int, int]:
    """(width, height) of the largest picture on the way of an image through padding and resizing.

    An image processor that resizes by the shorter side makes 336 x 3,360,000 pixels of 1 x 10,000 before it cuts them.

    Args:
        size: (width, height) of the image.
        image_processor: of transformers, for pictures of one size.
        square: whether the image is padded to a square first.
    """
    width, height = (max(size),) * 2 if square else size
    scale = 1.0
    given = dict(getattr(image_processor, "size", None) or {})
    if given.get("shortest_edge"):
        scale = max(1.0, (needed_side(image_processor) or 0) / min(width, height))
    elif getattr(image_processor, "do_thumbnail", False):  # Donut's shortest edge is the shorter of two
        scale = max(1.0, min(given["height"], given["width"]) / min(width, height))
    return round(width * scale), round(height * scale)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about rotation, and the pixels are fine
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode == "La":  # Pillow turns it into LA alone
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # EXIF and colour profiles would travel with every pickled batch
    return image


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Scale grey pixels of 16 bits, 32 bits or float to 0..255 by the range that the type stands for."""
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0).clip(min=0.0)
        full = next((full for full in (1.0, 255.0, 65535.0) if pixels.max() <= full), pixels.max())
    else:
        pixels = pixels.astype(np.float64).clip(min=0.0)
        full = max(65535.0, pixels.max())  # mode I holds 16-bit data in practice
    return np.rint(pixels * (255.0 / full)).astype(np.uint8)


def _too_large(what: str, size: tuple[int, int] | None, max_pixels: int) -> str:
    pixels = f"has {size[0]} x {size[1]} pixels" if size else "has more pixels than PIL allows"
    return f"{what} {pixels}, more than the {max_pixels:,} allowed: scale it down or remove the row."


def too_long(where: str, name: str, image: Image.Image, grown: tuple[int, int], max_pixels: int) -> RowError:
    """The error of an image of which `grown_size` has more than `max_pixels`."""
    sentence = (
        f"{where}: the image {name} has {image.width:,} x {image.height:,} pixels, of which the image processor would "
        f"make {grown[0]:,} x {grown[1]:,}, more than the {max_pixels:,} allowed: cut it or remove the row."
    )
    return RowError(sentence, where=where, reason="image too large")


def _damaged(what: str, error: Exception) -> str:
    return f"{what} is truncated or damaged ({reason_of(error)}): download it again or remove the row."
