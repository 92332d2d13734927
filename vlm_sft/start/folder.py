"""What lies in a folder: pictures, texts beside them, data files, and what is neither. Nothing is written there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..base.errors import UserError
from ..base.whole_files import open_regular
from ..base.words import reason_of
from ..reading.files import FILE_READERS
from ..reading.image_kinds import PICTURES, UNREAD_PICTURES

TEXTS = (".txt", ".caption")
"""Endings of a text beside a picture of the same name."""
MENDS = {
    **{ending: f"convert them to {kind}" for ending, kind in UNREAD_PICTURES.items()},
    ".pdf": "convert their pages to PNG", ".zip": "unpack them",
    ".gz": "unpack them", ".tgz": "unpack them", ".7z": "unpack them", ".rar": "unpack them",
    ".xlsx": "save them as CSV (UTF-8)", ".xls": "save them as CSV (UTF-8)", ".ods": "save them as CSV (UTF-8)",
    ".docx": "save their text as .txt", ".yaml": "write the rows as JSON lines", ".yml": "write the rows as JSON lines",
    ".xml": "write the rows as JSON lines", ".pkl": "write the rows as JSON lines", ".npz": "write pictures as PNG",
}  # fmt: skip
"""How what cannot be read is made readable, by its ending."""
LISTS = 20  # unread files of one ending that are looked into for the names of pictures
_LEFT = frozenset(("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json", "readme.txt"))
_LEFT_FOLDERS = frozenset(("__MACOSX", "@eaDir", "__pycache__", "node_modules"))
# Names that say nothing of what a folder's pictures show.
_PLAIN = frozenset(
    "image images img imgs photo photos pic pics picture pictures jpg jpeg png data dataset files file raw all new "
    "dcim camera train training val valid validation dev eval test testing default misc unsorted untitled "
    "folder export 照片 图片 图像 相册 训练 验证 测试 数据".split()
)
_SPLIT = re.compile(r"(?<![a-z])(train|val|dev|eval|test)(?:ing|idation|id|uation)?(?![a-z])", re.IGNORECASE)
_SPLITS = {"train": "train", "val": "validation", "dev": "validation", "eval": "validation", "test": "test"}


@dataclass
class Folder:
    """What was found.

    Attributes:
        root: The folder; of a single file, its own.
        pictures: Their files, in the order of their names.
        texts: Picture → the file of the text beside it.
        records: Picture → the JSON file beside it.
        tables: Data files.
        saved: Folders that `Dataset.save_to_disk` wrote.
        others: Ending → how many files have it, and the first of them.
        lists: Files of other endings that name pictures of the folder, as `captions.txt` of Flickr8k does.
        unread: Sentences on folders that could not be looked into.
        alone: A single data file was given: what lies around it teaches nothing, its pictures are shown by its rows.
    """

    root: Path
    pictures: list[Path] = field(default_factory=list)
    texts: dict[Path, Path] = field(default_factory=dict)
    records: dict[Path, Path] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    others: dict[str, tuple[int, Path]] = field(default_factory=dict)
    lists: list[Path] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    alone: bool = False

    @cached_property
    def classes(self) -> dict[Path, str]:
        """Picture → the name of its folder, where folders sort pictures into two classes or more; else nothing."""
        found = {path: path.parent.name for path in self.pictures if path.parent != self.root}
        named = {name for name in found.values() if _says_something(name)}
        if len(named) < 2 or len(found) < len(self.pictures):
            return {}
        return {path: name for path, name in found.items() if name in named}

    @cached_property
    def named(self) -> dict[Path, str]:
        """Picture → its file's name as words, where most are words and hardly two are the same; else nothing."""
        found = {path: words for path in self.pictures if (words := _words_of(path.stem))}
        enough = len(found) * 10 >= len(self.pictures) * 9 and len(set(found.values())) * 2 > len(found)
        return found if enough else {}

    def sentences(self) -> list[str]:
        """What could not be read, a sentence for each kind."""
        found = list(self.unread)
        for ending, (count, first) in sorted(self.others.items()):
            if mend := MENDS.get(ending):
                noun = "file is" if count == 1 else "files are"
                found.append(f"{count:,} {ending} {noun} left out, the first {first}: {mend}.")
        why = "it names pictures, but is no table: save it as .csv, in UTF-8, with a first line such as image,caption."
        return [*found, *(f"{file} is left out: {why}" for file in self.lists)]


def look_into(path: Path) -> Folder:
    """Walks through a folder, or takes a single data file with the pictures of its own folder.

    Hidden files and folders are passed over, links to folders not followed.

    Raises:
        UserError: It is not there, or cannot be looked into.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder, a data file, or the id of a data set on the Hub.")
    if path.is_file() and path.suffix.lower() not in FILE_READERS:
        mend = MENDS.get(path.suffix.lower(), f"give a folder, or a file that ends in {', '.join(FILE_READERS)}")
        raise UserError(f"{path} is no data file that can be read: {mend}.")
    found = Folder(path if path.is_dir() else path.parent)
    files = sorted(_files(found))
    stems = {file.with_suffix(""): file for file in files if file.suffix.lower() in PICTURES}
    found.pictures = [file for file in files if file.suffix.lower() in PICTURES]
    names = {file.name for file in found.pictures}
    for file in files:
        ending = file.suffix.lower()
        if ending in PICTURES:
            continue
        picture = stems.get(file.with_suffix(""))
        if ending in TEXTS and picture is not None:
            found.texts[picture] = file
        elif ending == ".json" and picture is not None:
            found.records[picture] = file
        elif ending in FILE_READERS:
            if file.parent not in found.saved:
                found.tables.append(file)
        else:
            count, first = found.others.get(ending, (0, file))
            found.others[ending] = (count + 1, first)
            if ending not in MENDS and count < LISTS and _names_a_picture(file, names):
                found.lists.append(file)
    if path.is_file():
        found.tables, found.texts, found.records, found.saved, found.others = [path], {}, {}, [], {}
        found.lists = []
        found.alone = True
    return found


def split_named_by(path: Path, root: Path) -> str | None:
    """Which side a file belongs to by its name or those of its folders below the root: train, validation or test."""
    for name in (path.stem, *(folder.name for folder in path.parents if folder != root and root in folder.parents)):
        words = {_SPLITS[word.lower()] for word in _SPLIT.findall(name.replace("_", " "))}
        if len(words) == 1:
            return words.pop()
    return None


def _files(found: Folder) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        found.unread.append(f"The folder {error.filename} is left out ({reason_of(error)}): change its permissions.")

    for place, folders, names in os.walk(found.root, onerror=unreadable):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in _LEFT_FOLDERS)
        here = Path(place)
        if {"state.json", "dataset_dict.json"} & set(names):
            found.saved.append(here)
            folders.clear()
            continue
        yield from (here / name for name in names if not name.startswith(".") and name.lower() not in _LEFT)


def _names_a_picture(file: Path, names: set[str]) -> bool:
    """Whether one of the first lines of a text names a picture of the folder."""
    try:
        with open_regular(file) as opened:
            head = opened.read(4096).decode("utf-8", "ignore")
    except (OSError, UserError):
        return False
    words = {*re.split(r"[\s,;:#|\"']+", head), *re.split(r"[\t\r\n,;#|\"']+", head)}  # a name may have spaces
    return any(re.split(r"[/\\]", word.strip())[-1] in names for word in words)


def _says_something(name: str) -> bool:
    """Whether a name is made of letters, and not one that cameras, dates and habits give."""
    letters = sum(letter.isalpha() for letter in name)
    return letters * 2 >= len(name) and name.lower() not in _PLAIN and not re.fullmatch(r"\d{3}[A-Z_]{5}", name)


def _words_of(stem: str) -> str:
    """`red_bus-2` → `red bus`; "" for what a camera or a program called so."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[_\-.]+", " ", stem))
    text = re.sub(r"\s*\(?\d+\)?\s*$", "", text).strip()
    words = text.split()
    han = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    camera = re.match(r"(?i)(img|dsc[nf]?|p|pxl|mvimg|wx|mmexport|image|photo|screenshot|vid|frame|scan)\b", text)
    if camera or any(letter.isdigit() for letter in text) or (len(words) < 2 and han < 2):
        return ""
    return text if all(word.isalpha() for word in words) else ""
