"""One image, whatever it is on disk, as an upright RGB picture, or one sentence that says why not."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..base.errors import RowError, row_error
from ..base.limits import limits
from ..base.names import ImageEntry
from ..base.whole_files import IrregularError, open_regular
from ..base.words import reason_of
from .image_kinds import describe_unreadable, kind_of, may_be_turned, without_texts
from .image_refs import TIME, is_url, size_asked
from .video import Films

# A JPEG is decoded at a half, a quarter or an eighth of its size where that still has so many times the pixels needed
# on each side. At 2 the result, once resized, is within a mean of TOLERANCE (of 255) of the full decode.
ENOUGH, TOLERANCE = 2, 2.0

# What photos and screenshots come in. PIL knows more, but some of those start programs (EPS: Ghostscript) or accept
# nearly any bytes (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "MPO")

ImageLike: TypeAlias = ImageEntry | str | Path | bytes | Image.Image
"""An image in whatever form it is given: a row's entry, a file, its bytes, or one that is open."""


def load_image(
    image: ImageLike,
    *,
    where: str = "",
    max_pixels: int | None = None,
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
        max_pixels: the largest width times height, compared before anything is decoded; None for that of `limits`.
        side: pixels that are needed on each side. A JPEG of at least four times as many is decoded smaller, which is
            several times faster; its sides never become shorter than ``ENOUGH * side``. None decodes all of it.
        fetch: gives the file in which the image of a URL lies, `fetch.Fetcher`; None refuses URLs.
        films: keeps the video of a frame open for the next one; None opens it for this one.

    Returns:
        A new PIL image of mode RGB with no reference to the file or to `image`.

    Raises:
        RowError: the image is missing, a folder, unreadable, empty, truncated, damaged, too large or not an image.
    """
    max_pixels = max_pixels or limits().image_pixels
    if isinstance(image, Mapping) and TIME in image:
        with nullcontext(films) if films is not None else Films() as films:
            return _to_rgb(films.frame(image, where, max_pixels))
    wanted = _Wanted(where, "the image", max_pixels, side)
    if not isinstance(image, Mapping):
        return _load(image, wanted, fetch)
    if (encoded := image.get("bytes")) is not None:
        name = f" {image['path']}" if image.get("path") else ""
        loaded = _from_stream(io.BytesIO(encoded), wanted._replace(name=f"the embedded image{name}"))
    elif image.get("path"):
        loaded = _load(str(image["path"]), wanted, fetch)
    else:
        raise wanted.error("has neither a path nor bytes", "give one of them", "image missing")
    if (asked := size_asked(loaded.size, image)) == loaded.size:
        return loaded
    if asked[0] * asked[1] > max_pixels:
        what = f"an image of {loaded.width:,} x {loaded.height:,} pixels is to become {asked[0]:,} x {asked[1]:,}"
        mend = f"at most {max_pixels:,} pixels are made: ask for fewer in the row"
        raise row_error(where, what, mend, "image too large")
    return loaded.resize(asked, Image.Resampling.BICUBIC)


class _Wanted(NamedTuple):
    """What an image is called, how large it may be, and how large it is needed; see `load_image`."""

    where: str
    name: str
    max_pixels: int
    side: int | None

    def error(self, what: str, mend: str, reason: str) -> RowError:
        """The error of this image."""
        return row_error(self.where, f"{self.name} {what}", mend, reason)

    def too_large(self, pixels: str) -> RowError:
        """Of one that has so many pixels."""
        allowed = f"has {pixels}, more than the {self.max_pixels:,} allowed"
        return self.error(allowed, "scale it down or remove the row", "image too large")

    def damaged(self, error: Exception) -> RowError:
        """Of one that cannot be decoded."""
        what = f"is truncated or damaged ({reason_of(error)})"
        return self.error(what, "download it again or remove the row", "image damaged")


def _load(image: object, wanted: _Wanted, fetch: Callable[[str], str] | None) -> Image.Image:
    if isinstance(image, Image.Image):
        return _decode(image, wanted)
    if isinstance(image, bytes | bytearray | memoryview):
        return _from_stream(io.BytesIO(image), wanted._replace(name="the embedded image"))
    if not isinstance(image, str | Path):
        mend = "give a path, encoded bytes or a PIL image"
        raise wanted.error(f"is of type {type(image).__name__}", mend, "not an image")
    path = str(image)
    wanted = wanted._replace(name=f"the image {path}")
    if not is_url(path):
        return _from_file(path, wanted)
    if fetch is None:
        mend = "download it first and give the path of the file"
        raise wanted.error("is a URL and no URL is fetched", mend, "image is a URL")
    try:
        path = fetch(path)
    except RowError as error:
        prefix = f"{wanted.where}: " if wanted.where else ""
        raise RowError(f"{prefix}{error}", where=wanted.where, reason=error.reason) from None
    return _from_file(path, wanted)


def image_size(
    image: ImageLike,
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


def _from_file(path: str, wanted: _Wanted) -> Image.Image:
    try:
        with open_regular(path) as stream:
            return _from_stream(stream, wanted)
    except IrregularError as error:
        raise wanted.error(f"is {error.what}, no image file", "give the path of one", "image missing") from None
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, wanted.where) from None
    except PermissionError:
        raise wanted.error("may not be read by this user", "change its permissions", "image unreadable") from None
    except (OSError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        what = f"cannot be opened ({reason_of(error)})"
        raise wanted.error(what, "check the path and the disk", "image unreadable") from None


def _missing(path: str, where: str) -> RowError:
    """The error of a file that is not there, with the one beside it that has another ending."""
    folder, name = os.path.split(path)
    folder = folder or "."
    if not os.path.isdir(folder):
        what = f"the image {name} was not found because the folder {folder} does not exist"
        return row_error(where, what, "correct the path", "image missing")
    stem = os.path.splitext(name)[0]
    near = (stem + ending for ending in (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG"))
    hint = next((f" (but {n} is there)" for n in near if os.path.exists(os.path.join(folder, n))), "")
    mend = "correct the path in the data or the source's `images` folder" if where else "correct the path"
    return row_error(where, f"the image {name} was not found in the folder {folder}{hint}", mend, "image missing")


def _from_stream(stream: IO[bytes], wanted: _Wanted) -> Image.Image:
    if not (head := stream.read(64)):
        raise wanted.error("is empty (0 bytes)", "download it again or remove the row", "image empty")
    with warnings.catch_warnings():
        # PIL warns about odd but readable files; what cannot be read is an error below.
        warnings.simplefilter("ignore")
        try:
            return _opened(stream, head, wanted)
        except RowError as error:
            for shorter in without_texts(stream, wanted.max_pixels) if error.reason == "image damaged" else ():
                with suppress(RowError):
                    return _opened(shorter, head, wanted)
            raise


def _opened(stream: IO[bytes], head: bytes, wanted: _Wanted) -> Image.Image:
    stream.seek(0)
    if Image.MAX_IMAGE_PIXELS is not None and wanted.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = wanted.max_pixels  # PIL's own limit, where the user has raised ours
    try:
        image = Image.open(stream, formats=_formats())
    except Image.DecompressionBombError:
        raise wanted.too_large("more pixels than PIL allows") from None
    except UnidentifiedImageError:
        what, _, mend = describe_unreadable(head).partition(": ")  # it ends with what to do
        raise wanted.error(what, mend, "not an image" if kind_of(head) is None else "image damaged") from None
    except Exception as error:  # the plugins let SyntaxError, struct.error, IndexError ... through
        raise wanted.damaged(error) from None
    with image:
        return _decode(image, wanted)


def _decode(image: Image.Image, wanted: _Wanted) -> Image.Image:
    if image.width * image.height > wanted.max_pixels:
        raise wanted.too_large(f"{image.width} x {image.height} pixels")
    try:
        if wanted.side is not None:
            image.draft(None, (ENOUGH * wanted.side,) * 2)  # of JPEG alone; at least so many pixels stay
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # as in _opened: decoders raise anything
        raise wanted.damaged(error) from None


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
    if image.mode == "La":  # which Pillow converts to LA and to nothing else
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


def too_long(where: str, name: str, image: Image.Image, grown: tuple[int, int], max_pixels: int) -> RowError:
    """The error of an image of which `grown_size` has more than `max_pixels`."""
    sentence = (
        f"{where}: the image {name} has {image.width:,} x {image.height:,} pixels, of which the image processor would "
        f"make {grown[0]:,} x {grown[1]:,}, more than the {max_pixels:,} allowed: cut it or remove the row."
    )
    return RowError(sentence, where=where, reason="image too large")
