"""How large a recipe becomes once its `${…}` are filled in, counted before they are.

Thirty lines that name each other twice make a text of a billion characters.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ..base.errors import UserError
from ..base.limits import READERS
from ..base.words import whole_number

MARKS = 8  # characters around an entry (`'a': 'b', `) of a mapping that a text names, for it is written into the text

_OPEN = re.compile(r"\$\{")
# Of a name within `${…}`: keys and list indices; what stands before a colon is one of OmegaConf's functions.
_FUNCTION = re.compile(r"^(?P<name>[\w.]+):(?P<arguments>.*)$", re.DOTALL)
_PARTS = re.compile(r"[^.\[\]]+")


class _Recipe:
    """The values of a recipe, and what was counted of them already."""

    def __init__(self, data: dict[Any, Any], name: str) -> None:
        self.data, self.name = data, name
        self.counted: dict[tuple[str, ...], int] = {}
        self.within: set[tuple[str, ...]] = set()
        self.unknown = 0  # references whose key is known when they are filled in

    def at(self, path: tuple[str, ...]) -> int:
        """The size of what stands at a place; 0 where nothing does, which OmegaConf says."""
        here: Any = self.data
        for part in path:
            if isinstance(here, str) and "${" in here:
                return self.of(here, path)
            if isinstance(here, list):
                place = whole_number(part)
                here = here[place] if place is not None and place < len(here) else None
            else:
                here = here.get(part) if isinstance(here, dict) else None
        return self.of(here, path)

    def of(self, value: object, path: tuple[str, ...]) -> int:
        """The size of a value that stands at a place."""
        if path in self.within:
            raise UserError(f"{self.name}: `{'.'.join(path)}` names itself by ${{…}}; it cannot be filled in.")
        if path not in self.counted:
            self.within.add(path)
            self.counted[path] = self._count(value, path)
            self.within.discard(path)
        return self.counted[path]

    def _count(self, value: object, path: tuple[str, ...]) -> int:
        if isinstance(value, dict | list):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            total = 2 + sum(MARKS + len(str(key)) + self.of(entry, (*path, str(key))) for key, entry in entries)
        elif isinstance(value, str):
            total = self._text(value, path)
        else:
            total = 1
        if total > READERS.recipe_characters:
            raise UserError(
                f"{self.name} would have more than {READERS.recipe_characters:,} characters with its ${{…}} filled in; "
                f"it is refused."
            )
        return total

    def _text(self, text: str, path: tuple[str, ...]) -> int:
        total, end = len(text), 0
        for match in _OPEN.finditer(text):
            if match.start() < end:
                continue  # within another, which was counted
            end = _closing(text, match.end())
            total += self._reference(text[match.end() : end], path)
        return total

    def _reference(self, inner: str, path: tuple[str, ...]) -> int:
        if (found := _FUNCTION.match(inner)) is None:
            return self._text(inner, path) + self._named(inner, path)
        arguments = found["arguments"]
        first, _, default = arguments.partition(",")
        if found["name"] == "oc.env":
            return max(len(os.environ.get(first.strip(), "")), len(default)) + self._text(default + first, path)
        if found["name"] not in ("oc.decode", "oc.create"):
            return self._text(arguments, path) + self._named(first, path)
        if "${" in arguments.replace("${oc.env:", ""):  # both read a text as YAML, which may name keys again
            raise UserError(f"{self.name}: `${{{inner[:60]}}}` cannot be counted; write the value itself.")
        return self._text(arguments, path)

    def _named(self, name: str, path: tuple[str, ...]) -> int:
        if "${" in name:
            self.unknown += 1
            if self.unknown > 1:
                raise UserError(
                    f"{self.name}: only one key may be named by another, like ${{a.${{b}}}}; write the name."
                )
            return 0  # as large as what was counted already, at most
        dots = len(name) - len(name.lstrip("."))
        start = path[: len(path) - dots] if dots else ()
        return self.at((*start, *_PARTS.findall(name.lstrip("."))))


def check_expansion(data: dict[Any, Any], name: str) -> None:
    """Counts what a recipe becomes with its `${…}` filled in.

    Args:
        data: The recipe as it is written, with its overrides.
        name: What messages call it.

    Raises:
        UserError: It would become too large, or a value names itself.
    """
    try:
        _Recipe(data, name).at(())
    except RecursionError as error:
        raise UserError(f"{name} has ${{…}} that name each other too often; it is refused.") from error


def _closing(text: str, start: int) -> int:
    """Where the brace is closed that was opened before `start`; the end of the text where it is not."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)
