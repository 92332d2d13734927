"""A raw row with checked access: what is missing or of the wrong type is named with the row, the key and the mend."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..base.errors import RowError, row_error
from ..base.names import Values
from ..base.words import closest, kind, short


class RowView:
    """A row with checked access: every error names the row, the key and how to mend it.

    Attributes:
        values: our name of a column to its value.
        read: the columns that were asked for; of several that would do, up to the first that has a value.
        unused: the keys that have a value and that nobody asked for; see `leave`.
    """

    def __init__(self, values: Values, where: str, columns: Mapping[str, str]) -> None:
        if columns:
            renamed = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
            values = {key: value for key, value in values.items() if key not in columns} | renamed
        self.values, self.where, self.columns = values, where, columns
        self.read = set(columns.values())
        self.unused: set[str] = set()

    def leave(self, key: str) -> None:
        """Notes a key that is not used, without the numbers of lists: `messages[].name`."""
        self.unused.add(re.sub(r"\[\d+\]", "[]", key))

    def get(self, *keys: str) -> Any:
        """The first of `keys` that has a value, or None."""
        for key in keys:
            self.read.add(key)
            if (value := self.values.get(key)) is not None:
                return value
        return None

    def need(self, *keys: str) -> Any:
        """The first of `keys` that has a value; a row without any is wrong."""
        value = self.get(*keys)
        if value is not None:
            return value
        if null := [key for key in keys if key in self.values]:
            raise self.error(f'"{null[0]}" is null', "give it a value or remove the row", "key missing")
        key, theirs = keys[0], self.columns.get(keys[0])
        near = closest(theirs or key, map(str, self.values)) or "its name in the file"
        there = ", ".join(f'"{short(str(name))}"' for name in list(self.values)[:8]) or "no key at all"
        missing = f'the key "{theirs}" (`columns` maps {key} to it)' if theirs else f'the key "{key}"'
        mend = (
            f"map it with `columns: {{{key}: {short(near)}}}` (a command's --column {key}={short(near)}) or rename it"
        )
        raise self.error(f"{missing} is missing (the row has {there})", mend, "key missing")

    def listed(self, key: str, entries: str) -> list[Any]:
        """A column that must be a list of such entries, in words."""
        if not isinstance(value := self.need(key), list):
            raise self.error(f'"{key}" is {kind(value)}, not a list', f"write a list of {entries}")
        return value

    def text(self, value: object, key: str) -> str:
        """`value` as text; whole numbers are written out, since answers such as 3 come as numbers in JSON."""
        if not isinstance(value, str):
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            raise self.error(f'the text "{key}" is {kind(value)}', "write text")
        if value.isascii():
            return value
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            what = f'the text "{key}" holds half a character (a lone surrogate)'
            raise self.error(what, "write it again", "not text") from None
        return value

    def images(self, *keys: str) -> list[Any]:
        """The row's images: no key, null, empty text and an empty list mean none."""
        self.read.update(keys)
        given = [(key, value) for key in keys if (value := self.values.get(key)) not in (None, "", [])]
        if len(given) > 1 and _listed(given[0][1]) != _listed(given[1][1]):
            what = f'the row has both "{given[0][0]}" and "{given[1][0]}", and they differ'
            raise self.error(what, "keep one of them", "marks differ")
        value = given[0][1] if given else None
        found = _listed(value)
        if isinstance(value, list | tuple) and any(image is None or image == "" for image in found):
            raise self.error(f'"{keys[0]}" has an empty entry', "give every image a path or bytes", "no image")
        return [image for image in found if image is not None and image != ""]

    def error(self, what: str, mend: str, reason: str = "wrong type") -> RowError:
        """What is wrong with this row, and how to mend it; `reason` is the few words under which rows are counted."""
        return row_error(self.where, what, mend, reason)


def is_given(value: object) -> bool:
    """Whether a value says anything: null, empty text, an empty list and an empty object are as no key."""
    return not (value is None or (isinstance(value, str | list | tuple | dict) and not value))


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
