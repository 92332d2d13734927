"""Rows → files that the readers read: `vlm-sft data convert`.

A target is one function in `TARGETS`. Everything is written beside its goal and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from ..base.errors import UserError, row_error
from ..base.names import IMAGE_TOKEN, ImageEntry, Json, Row
from ..base.whole_files import IrregularError, read_bytes, written_beside
from ..base.words import reason_of
from ..reading.image_kinds import ending_of
from ..reading.image_refs import SIZES, TIME, is_url
from ..reading.images import load_image
from ..reading.video import Films
from ..rows.messages import KEPT, Message, Part, has_boxes
from ..rows.videos import shows_frames

ROWS_PER_SHARD = 1000
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


class Images:
    """Says how a written row names its images, and stores those that must lie beside OUT.

    An image file below the folder of OUT is named relative to it, so that the folder can be moved; any other by its
    absolute path. Embedded images and frames of videos are stored, each picture once.

    Args:
        out: The file that is written.
        stage: Where images are stored until it is whole.
        copy: Stores every image, not only embedded ones.
        films: Keeps the video of a frame open for the next one.
    """

    def __init__(self, out: Path, stage: Path, copy: bool, films: Films) -> None:
        self.films = films
        self.home, self.stage, self.copy = out.parent.resolve(), stage, copy
        self.folder = images_folder(out).name

    def entry(self, image: ImageEntry, where: str) -> Any:
        """What to write for an image of a row: its path, with the size that the row asks for where it does."""
        sizes = {key: image[key] for key in SIZES if key in image and TIME not in image}
        return {"path": self.name(image, where), **sizes} if sizes else self.name(image, where)

    def name(self, image: ImageEntry, where: str) -> str:
        """The path to write for an image of a row."""
        path = image["path"]
        if TIME not in image and image["bytes"] is None and (is_url(path) or not self.copy):
            below = not is_url(path) and Path(path).is_relative_to(self.home)
            return os.path.relpath(path, self.home) if below else path
        data = encoded(image, where, self.films)
        self.stage.mkdir(exist_ok=True)
        file = self.stage / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending_of(data)}"
        if not file.exists():
            file.write_bytes(data)
        return f"{self.folder}/{file.name}"


def convert_rows(rows: Iterable[Row], to: str, out: str | Path, *, copy_images: bool = False) -> int:
    """Writes rows `{"messages", "images", "source", "id"}` as files of another format, one row at a time.

    Args:
        rows: The rows.
        to: A key of `TARGETS`.
        out: File (`messages`: .jsonl, `llava`: .json) or folder (`webdataset`); must not exist.
        copy_images: Takes image files along, into a folder beside OUT.

    Returns:
        The number of rows written.

    Raises:
        UserError: OUT is there already, has another suffix or cannot be written; there is no row.
        RowError: A row cannot be said in the format.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to} is not known: it must be one of {', '.join(TARGETS)}.")
    write, suffix = TARGETS[to]
    out = Path(os.path.expanduser(out))
    if out.suffix != suffix:
        wanted = f"a file that ends with {suffix}" if suffix else "a folder, whose name has no suffix"
        raise UserError(f"OUT is {out}, but --to {to} writes {wanted}: give another name.")
    for path in (out, images_folder(out)):
        if path.exists():
            raise UserError(f"{path} exists already: give another OUT or remove it.")
    try:
        with written_beside(out) as beside, Films() as films:
            images = images_folder(beside)
            written = write(rows, beside, Images(out, images, copy_images, films))
            if not written:
                raise UserError("There are no rows to write: look at the source.")
            if images.exists():  # first, so that a file never names images that are not there
                os.replace(images, images_folder(out))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({reason_of(error)}): correct it or make room.") from None
    return written


def images_folder(out: Path) -> Path:
    """Where images that belong to OUT lie."""
    return out.with_name(f"{out.stem}_images")


def encoded(image: ImageEntry, where: str, films: Films | None = None) -> bytes:
    """The encoded picture of a row, read from its file where it is not embedded; of a video's frame a JPEG.

    Raises:
        RowError: It is behind a URL, or its file cannot be read or is no picture.
    """
    if TIME in image:
        file = io.BytesIO()
        load_image(image, where=where, films=films).save(file, "JPEG", quality=95)
        return file.getvalue()
    if image["bytes"] is not None:
        return image["bytes"]
    if is_url(image["path"]):
        raise row_error(where, f"the image {image['path']} is a URL", "download it first", "image is a URL")
    try:
        data = read_bytes(image["path"])
    except OSError as error:
        what = f"the image {image['path']} cannot be read ({reason_of(error)})"
        raise row_error(where, what, "correct the path or remove the row", "image missing") from None
    except IrregularError as error:
        raise row_error(where, f"the image {image['path']} is {error.what}", "give a file", "image missing") from None
    load_image({"path": image["path"], "bytes": data}, where=where, side=1)  # a file that is no picture is not copied
    return data


def _messages(rows: Iterable[Row], out: Path, images: Images) -> int:
    """Conversations as TRL has them, a line each, content as parts: nothing in a text can be taken for an image."""
    written = 0
    with out.open("w", encoding="utf-8") as file:
        for row in rows:
            named = [images.entry(image, row["id"]) for image in row["images"]]
            line = {"id": row["id"], "images": named, "messages": _plain(row["messages"])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
    return written


def _plain(messages: list[Message]) -> list[Message]:
    """Messages without what says nothing: Arrow gives an image the text None."""

    def plain(part: Part) -> Part:
        return {name: value for name, value in part.items() if value is not None and name != "key"}

    return [{**m, "content": [plain(part) for part in m["content"]]} for m in messages]


def _llava(rows: Iterable[Row], out: Path, images: Images) -> int:
    """LLaVA's JSON: a list of rows, images as marks at the front of a message."""
    written = 0
    with out.open("w", encoding="utf-8") as file:
        for row in rows:
            named = [images.entry(image, row["id"]) for image in row["images"]]
            if shows_frames(row["images"]):
                what = "its video has times between its frames, for which LLaVA's format has no place"
                raise row_error(row["id"], what, "write --to messages", "mark in text")
            line: Json = {"id": row["id"]}
            if named:
                line["image"] = named[0] if len(named) == 1 else named
            line["conversations"] = [_turn(message, row["id"]) for message in row["messages"]]
            file.write(("[\n" if written == 0 else ",\n") + json.dumps(line, ensure_ascii=False))
            written += 1
        file.write("\n]\n")
    return written


def _turn(message: Message, where: str) -> Json:
    parts = message["content"]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    if message["role"] == "user" and IMAGE_TOKEN in text:
        what = f"its text holds {IMAGE_TOKEN}, which LLaVA's format takes for an image"
        raise row_error(where, what, "write --to messages, or change the text", "mark in text")
    if has_boxes([message]):
        what = "it has boxes, which LLaVA's format writes as text"
        raise row_error(where, what, "write --to messages", "box in text")
    marks = f"{IMAGE_TOKEN}\n" * sum(part["type"] == "image" for part in parts)
    if marks and message["role"] != "user":
        what = "an answer of it holds an image, for which LLaVA's format has no place"
        raise row_error(where, what, "write --to messages", "mark in text")
    more = {key: message[key] for key in KEPT if key in message}
    return {"from": _SPEAKERS[message["role"]], "value": marks + (text.lstrip("\n") if marks else text), **more}


def _webdataset(rows: Iterable[Row], out: Path, images: Images) -> int:
    """Tar shards of `ROWS_PER_SHARD` rows: `KEY.json` with the conversation and `KEY.N.jpg` with its images."""
    out.mkdir()
    numbered = enumerate(rows)
    written = 0
    for shard in count():
        first = next(numbered, None)
        if first is None:
            break
        with tarfile.open(out / f"{shard:06d}.tar", "w") as archive:
            for number, row in chain([first], islice(numbered, ROWS_PER_SHARD - 1)):
                _add_sample(archive, f"{number:09d}", row, images.films)
                written = number + 1
    return written


def _add_sample(archive: tarfile.TarFile, key: str, row: Row, films: Films) -> None:
    document = {"id": row["id"], "messages": _plain(row["messages"])}
    _add(archive, f"{key}.json", json.dumps(document, ensure_ascii=False).encode())
    for number, image in enumerate(row["images"]):
        if size := next((key for key in SIZES if key in image and TIME not in image), None):
            what = f"an image of it has {size}, for which shards have no place"
            raise row_error(row["id"], what, "write --to messages", "key refused")
        data = encoded(image, row["id"], films)
        _add(archive, f"{key}.{number}.{ending_of(data)}", data)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


TARGETS: dict[str, tuple[Callable[[Iterable[Row], Path, Images], int], str]] = {
    "messages": (_messages, ".jsonl"),
    "llava": (_llava, ".json"),
    "webdataset": (_webdataset, ""),
}
"""Format to the function that writes it and what OUT ends with; "" is a folder."""
