"""Verdicts of a judge: the scores that one names, and all of them on disk, so that none is asked for twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from io import BufferedWriter
from pathlib import Path

from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import Values
from ..base.whole_files import read_bytes, write_whole
from ..base.words import reason_of
from .server import Message, Reply

_NUMBER = r"[*_`]*(\d{1,3}(?:\.\d{1,3})?)分?[*_`]*"
_BETWEEN = r"(?:\s*[,;、，；|]\s*|\s+)"
_AROUND = r"[\s#()\[\]（）【】.。]*"
THOUGHT = "</think>"  # models that think aloud end with it what they say first


def scores_of(verdict: str, count: int, low: float, high: float) -> list[float] | None:
    """The scores in the first line of a verdict, which holds nothing else.

    Upstream takes the first line, split at spaces. Here a comma of either language, brackets, bold marks and 分 may
    stand with the numbers; a line with any word in it, `8/10`, more or fewer numbers, and numbers off the scale name no
    scores: nothing is guessed.

    Args:
        verdict: What the judge said.
        count: How many scores it was asked for.
        low: Lowest on the scale.
        high: Highest.
    """
    lines = verdict.rpartition(THOUGHT)[2].strip().splitlines()
    found = re.fullmatch(_AROUND + _BETWEEN.join([_NUMBER] * count) + _AROUND, lines[0]) if lines else None
    scores = [float(number) for number in found.groups()] if found else []
    return scores if scores and all(low <= score <= high for score in scores) else None


def key_of(model: str, messages: Sequence[Message], settings: Values) -> str:
    """What a verdict is found by: the judge, everything that it was asked, and how."""
    asked = json.dumps([model, [dict(message) for message in messages], dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()


class Kept:
    """Replies in a file, added to as they come: a context.

    Args:
        path: The file, which need not be there.
        what: What a line of it is called.

    Raises:
        UserError: It cannot be read or written, or a line of it is none of ours.
    """

    def __init__(self, path: Path, what: str = "verdict") -> None:
        self.path, self.what = path, what
        self.replies: dict[str, Reply] = {}
        self._stream: BufferedWriter | None = None

    def __enter__(self) -> Kept:
        """Reads what is there, and drops the half of a line that a kill leaves."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_bytes(self.path).split(b"\n") if self.path.exists() else [b""]
            for number, line in enumerate(lines[:-1], start=1):
                self._read(line, number)
            if lines[-1]:
                write_whole(self.path, b"".join(line + b"\n" for line in lines[:-1]))
            self._stream = self.path.open("ab")
        except OSError as error:
            raise self._failed(error) from None
        return self

    def __exit__(self, *raised: object) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()

    def _read(self, line: bytes, number: int) -> None:
        try:
            found = json.loads(bounded(line))
            key, reply = found["key"], Reply(found["text"], found["prompt_tokens"], found["completion_tokens"])
            counts = [count for count in reply[1:] if count is not None]
            if not (isinstance(key, str) and isinstance(reply.text, str) and all(type(n) is int for n in counts)):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"{self.path}, line {number} is no {self.what}: remove the line, and it is asked for again."
            ) from None
        self.replies[key] = reply

    def add(self, key: str, model: str, reply: Reply) -> None:
        """Keeps a reply; when this returns, it is on the disk."""
        assert self._stream is not None
        self.replies[key] = reply
        line = json.dumps({"key": key, "model": model, **reply._asdict()}, ensure_ascii=False) + "\n"
        try:
            self._stream.write(line.encode("utf-8", "replace"))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be used ({reason_of(error)}): give another --output or make room.")
