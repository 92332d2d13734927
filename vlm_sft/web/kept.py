"""Answers that a person kept, as rows of a data set: `rows.jsonl` to train on, `bad.jsonl` beside it, `images/`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..base.errors import RowError, UserError
from ..base.whole_files import check_regular, read_bytes, write_whole
from ..base.words import reason_of
from ..reading.image_kinds import ending_of
from ..reading.images import load_image
from ..reading.json_text import parse_json

ROWS, BAD, IMAGES, LOCK = "rows.jsonl", "bad.jsonl", "images", ".lock"
MOST = 10_000  # rows of each file: it is written anew with each


@dataclass(frozen=True)
class Judged:
    """What a person says of an answer.

    Attributes:
        question: What was asked.
        pictures: The files that it was asked about.
        bundle: Whose answer it is.
        said: The answer.
        text: The answer as the person left it.
        good: Whether the person calls it good.
    """

    question: str
    pictures: Sequence[Path]
    bundle: str
    said: str
    text: str
    good: bool

    @property
    def teaches(self) -> bool:
        """Whether it is a row to train on: a good answer, or one that the person has corrected."""
        return self.good or self.text != self.said


def folder_for(given: str) -> Path:
    """The folder that a person names, which is there or can be made.

    Raises:
        UserError: Something else has that name.
    """
    folder = Path(given).expanduser()
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not given.strip() or not above.is_dir() or not os.access(above, os.W_OK):
        what = "is no name" if not given.strip() else f"cannot be made: {above} is no folder that can be written"
        raise UserError(f"--keep {given!r} {what}; name another folder.")
    return folder


def check_text(text: str, what: str) -> None:
    """Looks that a text is one: half a character of UTF-16 is what no tokenizer and no file takes.

    Raises:
        UserError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} has half a character (a lone surrogate): write it again.") from None


class Kept:
    """The data set.

    Args:
        folder: Made with the first row.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, judged: Judged) -> tuple[Path, int, bool]:
        """Writes a row; the same pictures, question and answer are one row, with the verdict that came last.

        Pictures are copied as they are, under the digest of their content, before the row that names them.

        Returns:
            The file, its rows, and whether this one was new to it.

        Raises:
            UserError: A picture is none or is gone, a text is none, the folder cannot be written, or it is full.
        """
        check_text(judged.question, "The question")
        check_text(judged.text, "The answer")
        target, other = (ROWS, BAD) if judged.teaches else (BAD, ROWS)
        pictures = [_picture(path) for path in judged.pictures]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK):
                row = _row(judged, [name for name, _ in pictures])
                there, others = self._read(target), self._read(other)
                rows = [each for each in there if each["id"] != row["id"]]
                if len(rows) >= MOST:
                    raise UserError(f"{self.folder / target} has {MOST:,} rows: start again with another --keep.")
                for name, data in pictures:
                    if not (path := self.folder / name).exists():
                        write_whole(path, data)
                self._write(target, [*rows, row])
                if len(left := [each for each in others if each["id"] != row["id"]]) < len(others):
                    self._write(other, left)
                return self.folder / target, len(rows) + 1, len(rows) == len(there)
        except OSError as error:
            what = f"{self.folder} cannot be written ({reason_of(error)})"
            raise UserError(f"{what}: start the page with another --keep.") from None

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        check_regular(path)
        if not path.exists():
            return []
        rows = []
        for number, line in enumerate(read_bytes(path).splitlines(), 1):
            where = f"{path}, line {number}"
            try:
                row = parse_json(line, where, "correct it, or start the page with another --keep")
            except RowError as error:
                raise UserError(str(error)) from None
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise UserError(f"{where} is no row that this page kept: start it with another --keep.")
            rows.append(row)
        return rows

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(self.folder / name, lines.encode())


def _picture(path: Path) -> tuple[str, bytes]:
    """Where a picture lies in the folder, and its bytes, which are one."""
    try:
        data = read_bytes(path)
    except OSError:
        raise UserError("The pictures are no longer here: ask again, then keep the answer.") from None
    load_image(data, where="the picture")
    return f"{IMAGES}/{hashlib.sha256(data).hexdigest()[:32]}.{ending_of(data)}", data


def _row(judged: Judged, images: Sequence[str]) -> dict[str, Any]:
    """A row of the format `messages`; text is literal in parts, also where it spells `<image>`."""
    asked = [{"type": "text", "text": judged.question}] if judged.question else []
    question = [*({"type": "image"} for _ in images), *asked]
    answer = [{"type": "text", "text": judged.text}]
    told = json.dumps([images, judged.question, judged.text], ensure_ascii=False)
    return {
        "id": hashlib.sha256(told.encode()).hexdigest()[:16],
        "images": list(images),
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "verdict": "good" if judged.good else "bad",
        "said": judged.said,
        "bundle": judged.bundle,
    }
