"""What a row writes for an image → an absolute path or encoded bytes, and how large it is wanted. None is opened here.

Qwen's sizes and OpenAI's `detail` stand in the entry beside the file. Every model's images are brought to that size
first; what its own processor does to a picture comes after it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

from ..base.errors import UserError, row_error
from ..base.names import ImageEntry, Values
from ..base.words import one_line, short
from .image_kinds import kind_of

FEWEST_LETTERS = 88  # of base64 that may be an image: the smallest GIF has 43 bytes, and a PNG has 67
LONGEST_NAME = 255  # bytes of a file's name that Linux takes
LONGEST_LIKELY = 400  # letters of a path; a longer one is taken for a path only where its file is there
_URL_SAFE = str.maketrans("-_", "+/")

SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OPTIONS = (*SIZES, "detail")
TIME = "time"  # of a video's frame, in seconds: its entry names the video's file; no row can write it
DETAILS = {"auto": None, "high": None, "original": None, "low": 512 * 512}
"""OpenAI's words → the pixels that an image has at most."""


def is_url(path: str | None) -> bool:
    """Whether an image's path is a URL and not the name of a file."""
    return path is not None and "://" in path[:12]


def image_key(image: ImageEntry) -> bytes:
    """A digest of an image as a row names it: equal for the same path, or for the same bytes; no file is opened.

    Of a frame, with its time.
    """
    data = image["bytes"]
    if data is None:
        data = (image["path"] or "").encode("utf-8", "surrogateescape")
    time = repr(image[TIME]).encode() if TIME in image else b""
    return hashlib.blake2b(data, digest_size=16, salt=hashlib.blake2b(time, digest_size=16).digest()).digest()


class Folders:
    """The folders in which the images of a source may lie; links are followed before anything is compared.

    Args:
        folders: the folders; what is not there holds nothing.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.named = tuple(dict.fromkeys(os.path.abspath(os.path.expanduser(folder)) for folder in folders))
        self.real = [os.path.join(os.path.realpath(folder), "") for folder in self.named]
        for folder in map(Path, tuple(self.real)):
            # In the cache of `huggingface_hub` every file is a link to a blob of the same repository.
            snapshots = (each.parent for each in (folder, *folder.parents) if each.parent.name == "snapshots")
            self.real += [os.path.join(each.parent, "blobs", "") for each in snapshots]
        self._known: dict[str, bool] = {}  # folder of images → whether it is in here

    def hold(self, path: str) -> bool:
        """Whether an absolute path, or what it leads to, lies in here."""
        folder = os.path.dirname(path)
        if (known := self._known.get(folder)) is None:
            known = self._known[folder] = self._within(os.path.join(os.path.realpath(folder), ""))
        return known if not os.path.islink(path) else self._within(os.path.realpath(path))

    def _within(self, real: str) -> bool:
        return any(real.startswith(folder) for folder in self.real)


def resolve_image(
    image: object,
    folder: str | None,
    where: str,
    allow_urls: bool = False,
    within: Folders | None = None,
    noun: str = "an image",
) -> ImageEntry:
    """An image as the row names it → ``{"path": absolute, "bytes": None}`` or ``{"path": name, "bytes": ...}``.

    Args:
        image: a path, a `file://` path, bytes, base64, a data URI or ``{"path", "bytes"}``, maybe with the sizes of
            `image_refs`, which come along.
        folder: absolute; where a relative path starts. None: there is no such folder.
        where: the row's place in words.
        allow_urls: keeps a URL as the path; the data-loader worker fetches it.
        within: where a file must lie; None: in `folder`.
        noun: what it is, for errors: an image, a video.

    Raises:
        RowError: it is none of these, or empty.
        UserError: the path is relative and there is no folder, which is so in every row of the source.
    """
    name, sizes, word = None, {}, noun.split()[-1]
    if isinstance(image, Mapping):
        sizes = sizes_of(image, where)
        name = image.get("path")
        encoded = image.get("bytes")
        image = name if encoded is None else encoded
    if isinstance(image, bytes):
        if not image:
            what = f"an embedded {word} is empty (0 bytes)"
            raise row_error(where, what, "write it again or remove the row", "image empty")
        return {"path": name if isinstance(name, str) else None, "bytes": image, **sizes}
    if not isinstance(image, str):
        raise row_error(where, f"{noun} is neither a path nor bytes", "write the path of a file", "wrong type")
    if image.startswith("data:"):
        return {"path": None, "bytes": _from_data_uri(image, where), **sizes}
    if image.startswith("file://"):
        image = _from_file_uri(image)
    elif is_url(image):
        if allow_urls:
            return {"path": image, "bytes": None, **sizes}
        what = f"the {word} {one_line(image[:200])} is a URL and no URL is fetched"
        mend = ", or set `allow_urls: true` for the source in a recipe" if word == "image" else ""
        raise row_error(where, what, f"download it first{mend}", "image is a URL")
    path = os.path.expanduser(image)
    if "\0" in path or not path.strip() or path.encode("utf-8", "ignore").decode() != path:
        raise row_error(where, f"the {word} path {path[:200]!a} is blank or no text", "correct it", "not text")
    if len(path) > FEWEST_LETTERS and (decoded := _from_base64(path)) is not None:
        return {"path": None, "bytes": decoded, **sizes}
    return {"path": _placed(path, folder, where, within, noun), "bytes": None, **sizes}


def _placed(path: str, folder: str | None, where: str, within: Folders | None, noun: str) -> str:
    """The absolute path of a file that may be read; see `resolve_image`."""
    word, whole = noun.split()[-1], os.path.abspath(os.path.join(folder or "", path))
    if not _likely(whole):
        what = f"the {word} {short(path)} has {len(path):,} letters, which is no path and no base64 of {noun}"
        raise row_error(where, what, f"write the path of a file, or the bytes of {noun} in base64", "not an image")
    if not os.path.isabs(path) and folder is None:
        what = f"{where}: the {word} path {path} is relative, but rows of the Hub lie in no folder"
        raise UserError(f"{what}: set `images` (a command's --images).")
    within = Folders([folder] if folder else []) if within is None else within
    if not within.hold(whole):
        lies = f"outside {' and '.join(within.named)}" if within.named else "in a folder that the source does not name"
        mend = "move it there, or name its folder (a source's `image_folders`, a command's --image-folder)"
        raise row_error(where, f"the {word} {whole} lies {lies}", mend, "image outside")
    return whole


def _likely(path: str) -> bool:
    """Whether an absolute path can be one: in base64 stands a stroke here and there, so that no part is too long."""
    if max(map(len, os.fsencode(path).split(b"/"))) > LONGEST_NAME:
        return False
    return len(path) <= LONGEST_LIKELY or os.path.exists(path)


def _from_file_uri(uri: str) -> str:
    """The path in a `file://` URI; percents are read as the standard has them unless a file is called so."""
    path = uri.removeprefix("file://").removeprefix("localhost/" if uri.startswith("file://localhost/") else "")
    path = f"/{path}" if uri.startswith("file://localhost/") else path
    return path if "%" not in path or os.path.exists(path) else unquote(path)


def _from_base64(text: str) -> bytes | None:
    """The bytes of an image that are written in base64 and nothing else; None for what is the name of a file."""
    letters = "".join(text.split()).translate(_URL_SAFE)
    try:
        head = base64.b64decode(letters[:64], validate=True)
        # A long name of letters alone may be a file; a picture's first bytes say that it is none.
        if kind_of(head) is None and head[4:8] != b"ftyp":
            return None
        return base64.b64decode(letters.rstrip("=") + "=" * (-len(letters.rstrip("=")) % 4), validate=True)
    except ValueError:
        return None


def _from_data_uri(uri: str, where: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        decoded = base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
    except ValueError:
        decoded = b""
    if not decoded:
        what = f"the data URI {uri[:40]!a}... holds no base64 image"
        raise row_error(where, what, "write it again or give a path", "image damaged")
    return decoded


def sizes_of(image: Values, where: str) -> dict[str, int]:
    """The sizes that an image's entry asks for, `detail` as `max_pixels`; nothing where it asks for none.

    Raises:
        RowError: they are no whole numbers from 1 on, or cannot hold together.
    """
    found: dict[str, int] = {}
    for name in SIZES:
        if (value := image.get(name)) is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value // 1 or value < 1:
            what = f"{name} of an image is {short(str(value))}"
            raise row_error(where, what, "write a whole number of pixels from 1 on", "wrong type")
        found[name] = int(value)
    if (detail := image.get("detail")) is not None:
        if not isinstance(detail, str) or detail not in DETAILS:
            what = f'detail of an image is "{short(str(detail))}"'
            raise row_error(where, what, f"it must be one of {', '.join(DETAILS)}", "wrong type")
        if (most := DETAILS[detail]) is not None:
            found["max_pixels"] = min(most, found.get("max_pixels", most))
    if found.get("min_pixels", 0) > found.get("max_pixels", math.inf):
        raise row_error(where, "an image has min_pixels above its max_pixels", "correct one of them", "wrong type")
    return found


def size_asked(size: tuple[int, int], image: ImageEntry) -> tuple[int, int]:
    """(width, height) that an image of `size` is brought to by the sizes in its entry.

    `resized_height` and `resized_width` are taken as they are, one alone keeps the picture's shape, and both go before
    the bounds on pixels.
    """
    width, height = size
    wide, high = image.get("resized_width"), image.get("resized_height")
    if wide is not None:
        return wide, high or max(1, round(height * wide / width))
    if high is not None:
        return max(1, round(width * high / height)), high
    pixels, least, most = width * height, image.get("min_pixels") or 0, image.get("max_pixels")
    if most is not None and pixels > most:
        scale = math.sqrt(most / pixels)
        short_side = max(1, math.floor(min(size) * scale))
        long_side = max(1, min(math.floor(max(size) * scale), most // short_side))
        return (long_side, short_side) if width >= height else (short_side, long_side)
    if pixels < least:
        scale = math.sqrt(least / pixels)
        return math.ceil(width * scale), math.ceil(height * scale)
    return size
