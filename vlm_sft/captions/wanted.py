"""The pictures that captions are wanted of: those of a folder, or of rows, with the captions that they have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..base.assets import list_recipes
from ..base.errors import RowError, UserError, row_error
from ..base.names import ImageEntry, Json
from ..data.source import source_rows
from ..prepare.rows_of import RowsOf
from ..reading.files import FILE_READERS
from ..reading.image_kinds import PICTURES, UNREAD_PICTURES
from ..reading.image_refs import Folders, image_key, resolve_image
from ..reading.locations import folders_of_hub, read_rows
from ..rows.messages import answers_of

Reject = Callable[[RowError], None]


class Wanted(NamedTuple):
    """A picture.

    Attributes:
        id: What it is called in files and messages.
        image: Its path or bytes.
        given: The captions that it has already.
        again: Whether it came before: then no further captions are made of it.
    """

    id: str
    image: ImageEntry
    given: list[str]
    again: bool


class WantedPictures:
    """The pictures of SRC, read anew each time that they are iterated.

    Args:
        src: A folder of pictures; a file, folder or Hub id of rows that have an `image`; with `kind` what that format
            reads, or a recipe, whose answers are captions that the pictures have already.
        kind: A source's `format`; None: rows are taken for pictures alone.
        images: The source's `images`.
        columns: The source's `columns`, each as `OURS=THEIRS`.
        image_folders: The source's `image_folders`.

    Raises:
        UserError: As `RowsOf`.
    """

    def __init__(
        self,
        src: str,
        kind: str | None = None,
        images: str | None = None,
        columns: list[str] | None = None,
        image_folders: list[str] | None = None,
    ) -> None:
        self.src, folder = src, Path(os.path.expanduser(src))
        self.sources, self.column = None, "image"
        self.folders = [each for each in (images, *(image_folders or [])) if each]
        self.images = images
        self.files = folder.is_dir() and kind is None and _is_album(folder)
        if kind is not None or src.endswith((".yaml", ".yml")) or src in list_recipes():
            self.sources = RowsOf(src, kind, images, columns, 0.0, image_folders).sources
            return
        mapped = dict(column.split("=", 1) for column in columns or [] if "=" in column)
        if len(mapped) < len(columns or []) or mapped.keys() - {"image"} or (columns and self.files):
            raise UserError(
                f"--column {(columns or [''])[0]} is of no use without --format: the column of pictures alone is read; "
                f"write --column image=NAME, or say with --format caption that the rows have captions."
            )
        self.column = mapped.get("image", "image")

    def through(self, reject: Reject) -> Iterator[Wanted]:
        """Yields the pictures; tells of each row that names none."""
        seen: set[bytes] = set()
        found = self._of_folder(reject) if self.files else self._of_rows(reject) if self.sources is None else None
        for key, image, given in found or self._of_sources(reject):
            known = image_key(image)
            yield Wanted(key, image, given, known in seen)
            seen.add(known)

    def describe(self) -> Json:
        """What the pictures depend on, for a file that is made of them."""
        if self.sources is not None:
            return {"sources": [source.model_dump(mode="json") for source in self.sources]}
        return {"path": self.src, "images": self.images, "column": self.column, "image_folders": self.folders}

    def _of_folder(self, reject: Reject) -> Iterator[tuple[str, ImageEntry, list[str]]]:
        top = os.path.abspath(os.path.expanduser(self.src))
        within = Folders([top, *self.folders])
        for folder, below, names in os.walk(top):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                ending = Path(name).suffix.lower()
                if name.startswith(".") or ending not in (*PICTURES, *UNREAD_PICTURES):
                    continue
                path = os.path.join(folder, name)
                key = os.path.relpath(path, top)
                try:
                    if ending in UNREAD_PICTURES:
                        mend = f"convert it to {UNREAD_PICTURES[ending]}, or move it away"
                        raise row_error(key, f"the picture {path} is a {ending} file", mend, "kind not read")
                    yield key, resolve_image(path, top, key, within=within), []
                except RowError as error:
                    reject(error)

    def _of_rows(self, reject: Reject) -> Iterator[tuple[str, ImageEntry, list[str]]]:
        name = Path(self.src).stem
        own = Path(os.path.expanduser(self.src))
        of_file: Path | str | None = ""
        for number, row in enumerate(read_rows(self.src, keep_wrong=True), start=1):
            try:
                if row.problem is not None:
                    raise row.problem
                image = row.values.get(self.column)
                image = image[0] if isinstance(image, list) and len(image) == 1 else image
                if image is None or isinstance(image, list):
                    what = f'"{self.column}" ' + ("is missing" if image is None else f"holds {len(image)} pictures")
                    mend = "give each picture a row, or name its column (--column image=NAME)"
                    raise row_error(row.where, what, mend, "no image")
                if row.folder is not of_file:
                    of_file, folder = row.folder, self.images or row.folder
                    home = None if folder is None else os.path.abspath(os.path.expanduser(folder))
                    hub = folders_of_hub(self.src) if of_file is None else [of_file, *([own] if own.is_dir() else [])]
                    within = Folders([*self.folders, *hub])
                yield f"{name}/{number}", resolve_image(image, home, row.where, within=within), []
            except RowError as error:
                reject(error)

    def _of_sources(self, reject: Reject) -> Iterator[tuple[str, ImageEntry, list[str]]]:
        for source in self.sources or ():
            for row in source_rows(source, reject=reject):
                if len(row["images"]) != 1:
                    what = f"it has {len(row['images'])} images, and a caption is of one"
                    reject(row_error(row["id"], what, "leave the row out", "no image"))
                    continue
                yield row["id"], row["images"][0], answers_of(row)


def _is_album(folder: Path) -> bool:
    """Whether a folder is read as pictures: it holds some, and no file that says it is a dataset."""
    named = (*folder.glob("metadata.*"), *folder.glob("*/metadata.*"))
    if any(path.suffix.lower() in FILE_READERS for path in named):
        return False
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        return False
    endings = (*PICTURES, *UNREAD_PICTURES)
    if any(Path(name).suffix.lower() in endings for _, _, names in os.walk(folder) for name in names):
        return True
    return not any(path.suffix.lower() in FILE_READERS for place in ("*", "data/*") for path in folder.glob(place))
