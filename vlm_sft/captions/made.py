"""Captions as they are made: a file for each process, a line a picture, which a rerun goes on with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import Json
from ..base.whole_files import open_regular, read_bytes
from ..base.words import reason_of


class Caption(NamedTuple):
    """A caption.

    Attributes:
        text: What it says.
        given: Whether the picture had it.
        score: How well it fits; None where nothing scored it.
        dropped: Why it is left out, whatever its score; else None.
    """

    text: str
    given: bool
    score: float | None = None
    dropped: str | None = None


class Made(NamedTuple):
    """What was made of a picture.

    Attributes:
        number: Of the picture in SRC, from 0.
        id: What it is called.
        captions: Made and given ones.
        error: Why it has none.
        reason: The same in a few words, which are counted.
    """

    number: int
    id: str
    captions: list[Caption]
    error: str | None = None
    reason: str | None = None


class Parts:
    """The files of a folder, one a process.

    Args:
        folder: Where they lie.
        about: What they depend on: their first line.
    """

    def __init__(self, folder: Path, about: Json) -> None:
        self.folder, self.about = folder, about
        self._places: dict[int, tuple[Path, int]] = {}

    def settle(self) -> None:
        """Cuts off what a kill left of a last line; to be called while nothing is written.

        Raises:
            UserError: A file is none of these, is about something else, or cannot be changed.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._files():
                data = read_bytes(path)
                whole = data[: data.rfind(b"\n") + 1]
                if whole:
                    self._check_about(path, whole.split(b"\n", 1)[0])
                if len(whole) < len(data):
                    os.truncate(path, len(whole))
        except OSError as error:
            raise self._failed(error) from None

    def read(self) -> Iterator[Made]:
        """Every whole line; where each is found again is kept for `line`."""
        for path in self._files():
            with open_regular(path) as file:
                if first := file.readline():
                    self._check_about(path, first)
                while line := file.readline():
                    if not line.endswith(b"\n"):  # another process is writing it
                        break
                    made = self._parsed(path, line)
                    if made.number not in self._places:
                        self._places[made.number] = path, file.tell() - len(line)
                        yield made

    def line(self, number: int) -> Made | None:
        """What was made of a picture, once `read` has passed it."""
        if number not in self._places:
            return None
        path, place = self._places[number]
        with open_regular(path) as file:
            file.seek(place)
            return self._parsed(path, file.readline())

    def __contains__(self, number: int) -> bool:
        return number in self._places

    @contextmanager
    def writing(self, process: int) -> Iterator[Callable[[list[Made]], None]]:
        """Gives a function that adds lines to the file of a process; when it returns, they are on the disk."""
        path = self.folder / f"part-{process:05d}.jsonl"
        try:
            with path.open("ab") as file:
                if not file.tell():
                    file.write(_line(self.about))

                def write(found: list[Made]) -> None:
                    file.write(b"".join(_line(_as_json(made)) for made in found))
                    file.flush()
                    os.fsync(file.fileno())

                yield write
        except OSError as error:
            raise self._failed(error) from None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def _check_about(self, path: Path, line: bytes) -> None:
        try:
            found = json.loads(bounded(line))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path} is not a file of captions: move it away, or give another OUT.")
        if found != self.about:
            names = sorted(name for name in {*found, *self.about} if found.get(name) != self.about.get(name))
            raise UserError(
                f"{self.folder} holds captions that were made in another way ({', '.join(map(str, names))[:200]}): "
                f"give the same options as before, another OUT, or remove the folder."
            )

    def _parsed(self, path: Path, line: bytes) -> Made:
        try:
            found = json.loads(bounded(line))
            made = Made(**{**found, "captions": [Caption(**each) for each in found["captions"]]})
            if not (_is(made.number, int) and isinstance(made.id, str) and all(map(_is_caption, made.captions))):
                raise TypeError
            if not all(text is None or isinstance(text, str) for text in (made.error, made.reason)):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"{path} holds a line that is no caption of ours: remove the line, and its picture is asked for again."
            ) from None
        return made

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.folder} cannot be written ({reason_of(error)}): give another OUT or make room.")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_caption(caption: Caption) -> bool:
    score = caption.score
    number = score is None or ((_is(score, float) or _is(score, int)) and math.isfinite(score))
    words = isinstance(caption.text, str) and (caption.dropped is None or isinstance(caption.dropped, str))
    return number and words and isinstance(caption.given, bool)


def _as_json(made: Made) -> Json:
    return {**made._asdict(), "captions": [caption._asdict() for caption in made.captions]}


def _line(value: Json) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "replace")
