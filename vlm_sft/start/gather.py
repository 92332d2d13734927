"""A folder, a data file or a data set of the Hub → its rows as they are written, what they mean and where they lie.

Pictures that are named as people name them (by their name alone, without its ending) are found, and each is named from
one folder; those that lie in shards are written as files.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import RowError, UserError, row_error
from ..base.names import Json, Values
from ..base.whole_files import read_text
from ..base.words import counted, reason_of
from ..reading.files import read_file
from ..reading.image_kinds import PICTURES, ending_of, kind_of
from ..reading.json_text import parse_document
from ..reading.json_text import read_text as read_whole
from ..reading.locations import read_rows
from ..reading.published import read_published
from ..recipe.safety import is_deep
from .folder import Folder, split_named_by
from .guess import LOOKED_AT, Guess, guess, published_kind, why_not
from .label_names import label_names, with_names

IMAGES = "images"
"""The folder of pictures that lay in shards, beside the files of rows."""
_PLACES = ("image", "images", "path", "url", "image_url", "img", "file_name")
Tick = Callable[[int], None]


class Given(NamedTuple):
    """A row as it is written: its place in words, its values, the side that its file belongs to by its name."""

    where: str
    values: Json
    side: str | None = None


class Gathered:
    """All rows, by what they mean.

    Attributes:
        rows: What rows mean, and whether they show pictures out of shards → the rows.
        left_out: Sentences on what could not be read.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[Guess, bool], list[Given]] = defaultdict(list)
        self.left_out: list[str] = []

    def problems(self, name: str | Path, wrong: list[str]) -> None:
        """Notes rows that could not be read: how many, and the first."""
        if wrong:
            self.left_out.append(f"{counted(len(wrong), 'row')} of {name} left out, the first: {wrong[0]}")


class Pictures:
    """Finds the pictures of a folder by what rows call them, and writes those that rows hold.

    Args:
        folder: Where they lie.
        store: The folder to write pictures of rows to.
    """

    def __init__(self, folder: Folder | None, store: Path) -> None:
        self.store = store
        self.root = folder.root if folder else None
        self._names: dict[str, Path | None] = {}
        for picture in folder.pictures if folder else ():
            for name in (picture.name, picture.stem):
                self._names[name] = None if name in self._names else picture

    def named(self, row: Values, home: Path | None, image: str = "image") -> tuple[Json, bool]:
        """A row that names its pictures from the root; and whether it held any itself.

        Args:
            row: As it is written.
            home: The folder of its file.
            image: What the column of its picture is called.
        """
        held: list[bool] = []
        found = {key: self._walk(value, key in (*_PLACES, image), home, held) for key, value in row.items()}
        return found, bool(held)

    def _walk(self, value: object, is_place: bool, home: Path | None, held: list[bool]) -> Any:
        if isinstance(value, Mapping):
            if isinstance(data := value.get("bytes"), bytes):
                held.append(True)
                more = {key: each for key, each in value.items() if key not in ("bytes", "path") and each is not None}
                path = self._kept(data)
                return {"path": path, **more} if more else path
            return {key: self._walk(each, key in _PLACES, home, held) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._walk(each, is_place, home, held) for each in value]
        if isinstance(value, bytes):
            if kind_of(value[:16]) is None:
                return None
            held.append(True)
            return self._kept(value)
        return self._found(value, home) if is_place and isinstance(value, str | int) else value

    def _kept(self, data: bytes) -> str:
        self.store.mkdir(parents=True, exist_ok=True)
        file = self.store / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending_of(data)}"
        if not file.exists():
            file.write_bytes(data)
        return f"{IMAGES}/{file.name}"

    def _found(self, name: str | int, home: Path | None) -> str | int:
        """A picture's path from the root; what is not found stays as it is, and is said when it is looked for."""
        text = str(name).strip().removeprefix("file://").replace("\\", "/")
        if self.root is None or not text or text.startswith("data:") or "://" in text[:12] or len(text) > 400:
            return name
        for start in (home, self.root):
            if start is not None and (start / text).is_file():
                path = (start / text).absolute()
                root = self.root.absolute()
                return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        found = self._names.get(Path(text).name)
        return name if found is None else found.relative_to(self.root).as_posix()


def gather(folder: Folder, pictures: Pictures, tick: Tick) -> Gathered:
    """The rows of a folder: of its data files and saved data sets; else of texts beside pictures, else of folders that
    are classes, else of pictures that are called by what they show.

    Args:
        folder: What lies there.
        pictures: Finds and writes pictures.
        tick: Told now and then how many rows were read.
    """
    found = Gathered()
    found.left_out += folder.sentences()
    _tables(folder, pictures, found, tick)
    for saved in folder.saved:
        rows = ((row.where, row.problem or row.values) for row in read_rows(str(saved), keep_wrong=True))
        _add(found, saved, rows, saved, pictures, split_named_by(saved, folder.root), tick)
    if any(found.rows.values()):
        return found
    beside = {**folder.records, **folder.texts}
    if len(folder.texts) < len(folder.records):
        _add(found, folder.root, _records(folder), None, pictures, None, tick, folder)
    elif beside:
        _add_texts(found, folder)
    if not any(found.rows.values()) and not folder.alone:
        for given, labels in ((folder.classes, True), (folder.named, False)):
            if given:
                named = [
                    Given(str(path), {"image": _relative(path, folder), "caption": text}, _side(path, folder))
                    for path, text in given.items()
                ]
                found.rows[Guess("caption", (), labels), False] += named
                break
    return found


def gather_hub(name: str, pictures: Pictures, tick: Tick) -> Gathered:
    """The rows of a data set of the Hub, its split `train`."""
    found = Gathered()
    rows = ((row.where, row.problem or row.values) for row in read_rows(name, keep_wrong=True))
    _add(found, name, rows, None, pictures, None, tick)
    return found


def _relative(path: Path, folder: Folder) -> str:
    return path.relative_to(folder.root).as_posix()


def _side(path: Path, folder: Folder) -> str | None:
    return split_named_by(path.parent / "_", folder.root) if path.parent != folder.root else None


def _tables(folder: Folder, pictures: Pictures, found: Gathered, tick: Tick) -> None:
    """Data files; those of VQAv2 go together, questions with the answers of all files."""
    documents: dict[str, list[Path]] = defaultdict(list)
    plain = []
    for path in folder.tables:
        kind = None
        if path.suffix.lower() == ".json":
            try:
                document = parse_document(read_whole(path), path)
                kind = published_kind(document)
                if named := list(_by_picture(document, path)):
                    _add(found, path, named, path.parent, pictures, split_named_by(path, folder.root), tick)
                    continue
            except UserError as error:
                if "holds boxes" in str(error):
                    found.left_out.append(f"{path} is left out: {error}")
                    continue
        documents[kind].append(path) if kind else plain.append(path)
    answers = documents.pop("answers", [])
    if answers and "vqav2" not in documents:
        found.left_out.append(f"{answers[0]} is left out: it holds answers of VQAv2, but no file has their questions.")
    for kind, files in documents.items():
        for path in files:
            if kind == "vqav2" and not answers:
                what = "it holds questions of VQAv2, but no file has their answers"
                found.left_out.append(f"{path} is left out: {what}.")
                continue
            rows = ((where, row) for _, where, row in read_published(kind, [path], None, answers))
            _add(found, path, rows, path.parent, pictures, split_named_by(path, folder.root), tick)
    for path in plain:
        _add(found, path, read_file(path), path.parent, pictures, split_named_by(path, folder.root), tick)


def _by_picture(document: object, path: Path) -> Iterator[tuple[str, Json]]:
    """The rows of a document that is the names of pictures, each with its text, its texts or its values."""
    if isinstance(document, dict) and all(Path(name).suffix.lower() in PICTURES for name in document):
        for name, given in document.items():
            for each in given if isinstance(given, list) else [given]:
                yield f'{path}, "{name}"', {"image": name, **(each if isinstance(each, dict) else {"caption": each})}


def _records(folder: Folder) -> Iterator[tuple[str, Json | RowError]]:
    for picture, file in folder.records.items():
        try:
            record = json.loads(read_text(file))
        except (OSError, ValueError, RecursionError) as error:
            yield (
                str(file),
                RowError(f"{file}: it is no JSON ({reason_of(error)}): correct or remove it.", where=str(file)),
            )
            continue
        if not isinstance(record, dict):
            yield str(file), RowError(f"{file}: it is no object with named values: correct it.", where=str(file))
        else:
            yield str(file), {"image": _relative(picture, folder), **record}


def _not_deep(given: tuple[str, Json | RowError]) -> tuple[str, Json | RowError]:
    where, values = given
    if isinstance(values, RowError) or not is_deep(values):
        return given
    return where, row_error(where, "its values are nested too deeply", "correct or remove it", "too deep")


def _add(
    found: Gathered,
    name: str | Path,
    rows: Iterable[tuple[str, Json | RowError]],
    home: Path | None,
    pictures: Pictures,
    side: str | None,
    tick: Tick,
    folder: Folder | None = None,
) -> None:
    """Adds the rows of a file, once its first ones say what they mean."""
    walk = map(_not_deep, rows)
    wrong: list[str] = []
    try:
        head = list(islice(walk, LOOKED_AT))
        first = [values for _, values in head if not isinstance(values, RowError)]
        meant = guess(first)
        if meant is None:
            wrong = [str(values) for _, values in head if isinstance(values, RowError)]
            keys = ", ".join(f'"{key}"' for key in list(first[0])[:8]) if first else ""
            unlike = f"no known format has rows like its first, with {keys}." if keys else "it has no rows."
            found.left_out.append(f"{name} is left out: {wrong[0] if len(wrong) > len(first) else unlike}")
            return
        if (why := why_not(first)) is not None:
            found.left_out.append(f"{name} is left out: {why}")
            return
        image, names = dict(meant.columns).get("image", "image"), label_names(name)
        if names:
            meant = meant._replace(labels=meant.labels or dict(meant.columns).get("caption") in names)
        for number, (where, values) in enumerate(chain(head, walk), start=1):
            if isinstance(values, RowError):
                wrong.append(str(values))
                continue
            row, held = pictures.named(with_names(values, names), home, image)
            own = split_named_by(Path(where), folder.root) if folder else side
            found.rows[meant, held].append(Given(where, row, own))
            if number % 500 == 0:
                tick(number)
    except RowError as error:
        wrong.append(str(error))
    except UserError as error:  # the file as a whole cannot be read, maybe from some row on
        found.left_out.append(str(error))
    found.problems(name, wrong)


def _add_texts(found: Gathered, folder: Folder) -> None:
    wrong: list[str] = []
    rows = found.rows[Guess("caption"), False]
    for picture in folder.pictures:
        if (file := folder.texts.get(picture)) is None:
            continue
        try:
            text = read_text(file, "utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            not_utf8 = isinstance(error, UnicodeDecodeError)
            reason = reason_of(error)
            wrong.append(
                f"{file} is not UTF-8: save it as UTF-8."
                if not_utf8
                else f"{file} cannot be read ({reason}): check it."
            )
            continue
        if not text:
            wrong.append(f"{file} is empty: write what the picture shows, or remove it.")
        else:
            values = {"image": _relative(picture, folder), "caption": text}
            rows.append(Given(str(file), values, _side(picture, folder)))
    if wrong:
        found.left_out.append(f"{counted(len(wrong), 'text')} of {folder.root} left out, the first: {wrong[0]}")
    texts = [row.values["caption"] for row in rows]
    if (why := why_not([{"caption": text} for text in texts])) is not None:
        found.left_out.append(f"The texts beside the pictures of {folder.root} are left out: {why}")
        del found.rows[Guess("caption"), False]
        return
    if 2 <= len(set(texts)) <= len(texts) / 2 and max(map(len, texts)) <= 40 and len(texts) > 9:
        found.rows[Guess("caption", (), True), False] = found.rows.pop((Guess("caption"), False))
