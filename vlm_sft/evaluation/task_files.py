"""Where a benchmark's rows lie, in files as it is published or on the Hub, and the rows as they are written there."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..base.errors import RowError, UserError
from ..base.hub import look_for_hub, one_sentence
from ..base.limits import READERS
from ..base.names import Json, Values
from ..base.words import first_line, short
from ..reading.files import FILE_READERS, read_file
from ..reading.json_text import parse_document, read_text
from ..reading.locations import dataset_rows
from .tasks import Hub, Join, Layout, Task

Placed = tuple[str, Path | None, Json]
"""A row: its place in words, the folder that its pictures lie in, and its columns."""


def place_of(name: str, task: Task, data: str | None) -> Path | Hub:
    """Where the rows are: the folder or file that was given or that the task names, else its place on the Hub.

    Raises:
        UserError: There is no such folder, or nobody says where they are.
    """
    given = data or task.path
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f'Benchmark "{name}": there is no folder or file {given}; correct --benchmark-data.')
        return path / name if data and (path / name).is_dir() else path
    if task.hub is None:
        raise UserError(f'Benchmark "{name}" is on no Hub: give the folder of its data with --benchmark-data.')
    return task.hub


def files_of(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Data files that the patterns name, or any where there are none, in the order of the patterns and their names."""
    if folder.is_file():
        return [folder] if not patterns or any(fnmatch(folder.name, Path(pattern).name) for pattern in patterns) else []
    if patterns:
        return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if _lies_in(path, folder)]
    for depth in ("*", "data/*", "*/*"):
        if found := sorted(path for path in folder.glob(depth) if path.suffix.lower() in FILE_READERS):
            return found
    return []


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether it is a file in this folder: a link of the user's own may lead elsewhere, a pattern may not."""
    return path.is_file() and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def rows_of(place: Path | Hub, layout: Layout, hub: Hub | None) -> Iterator[Placed]:
    """The rows of a layout, each with the columns that it is joined with.

    Args:
        place: Where they are.
        layout: How they are written.
        hub: Names the configuration and split of a folder that was fetched from the Hub.

    Raises:
        UserError: A file is missing or damaged, or the other row of a join is. Raised while iterating.
    """
    others: list[dict[Any, Json]] = []
    for join in layout.join:
        read = _read_all(place if isinstance(place, Path) else join.hub or place, join, join.hub)
        others.append({_named(at(values, join.key)): values for _, _, values in read if has(values, join.key)})
    unseen, where = set(layout.only), ""
    for where, folder, values in _read_all(place, layout, hub):
        unseen -= {column for column in unseen if has(values, column)}
        if any(at(values, column) != wanted for column, wanted in layout.only.items()):
            continue
        for join, other in zip(layout.join, others, strict=True):
            if not has(values, join.on):
                raise UserError(
                    f'{where}: the row has no column "{short(join.on)}", by which it is joined; correct `on`.'
                )
            named = _named(at(values, join.on))
            if named not in other:
                raise UserError(f'{where}: "{join.on}" is {short(str(named))}, and no row has that "{join.key}".')
            values = {**values, join.into: other[named]} if join.into else {**other[named], **values}
        yield where, folder, values
    if unseen and where:
        source = place.path if isinstance(place, Hub) else place
        raise UserError(f'{source}: no row has the column "{short(min(unseen))}" of `only`; correct it.')


def _named(value: object) -> Any:
    """What a row is found by: a list or an object, which is no key, by its text."""
    return value if isinstance(value, str | int | float | None) else repr(value)


def _read_all(place: Path | Hub, layout: Layout | Join, hub: Hub | None) -> Iterator[Placed]:
    if isinstance(place, Hub):
        yield from _of_hub(place)
        return
    # A folder that was fetched from the Hub has one folder for each configuration, and files named by their split.
    patterns = layout.files or _hub_files(place, hub)
    files = files_of(place, patterns)
    if not files:
        what = " or ".join(patterns) or f"data file ({', '.join(FILE_READERS)})"
        raise UserError(f"{place} holds no {what}; give the folder in which the benchmark lies as it is published.")
    folder = place if place.is_dir() else place.parent
    for path in files:
        if layout.rows is None:
            for where, found in read_file(path):
                if isinstance(found, RowError):
                    raise found
                yield where, folder, {**found, "_file": path.stem}
        else:
            for where, values in _document(path, layout.rows):
                yield where, folder, {**values, "_file": path.stem}


def _hub_files(place: Path, hub: Hub | None) -> list[str]:
    """Patterns of the files of a configuration and split, as the Hub names them; none where none is there."""
    if hub is None or place.is_file():
        return []
    folders = [f"{hub.name}/", "data/", ""] if hub.name else ["data/", ""]
    found = [f"{folder}{hub.split}-*.parquet" for folder in folders]
    return next(([pattern] for pattern in found if files_of(place, [pattern])), [])


def _document(path: Path, key: str) -> Iterator[tuple[str, Json]]:
    document = parse_document(read_text(path), path)
    entries = document if key == "*" else document.get(key) if isinstance(document, dict) else None
    pairs: list[tuple[str, Any]]
    if key == "*" and isinstance(entries, dict):
        pairs = list(entries.items())
    elif isinstance(entries, list):
        pairs = [(str(number), entry) for number, entry in enumerate(entries, start=1)]
    else:
        raise UserError(f'{path}: there is no list of rows under "{key}"; is it the file of another benchmark?')
    for name, entry in pairs:
        if not isinstance(entry, dict):
            raise UserError(f"{path}, {key} {name}: the entry is no object; correct it.")
        yield f"{path}, {short(name)}", {"_key": name, **entry}


def _of_hub(hub: Hub) -> Iterator[tuple[str, None, Json]]:
    import datasets

    look_for_hub()
    label = f"{hub.path} ({', '.join(filter(None, (hub.name, hub.split)))})"
    give = "; download it and give its folder with --benchmark-data"
    try:
        with one_sentence(hub.path, before=f"The benchmark {label} is not here: ", after=give):
            data = datasets.load_dataset(hub.path, hub.name, split=hub.split, revision=hub.revision)
    except UserError:
        raise
    except Exception as error:  # an unknown id, an unknown split and a missing cache raise errors of different classes
        raise UserError(f"The benchmark {label} cannot be loaded from the Hub ({first_line(error)}){give}.") from None
    for row in dataset_rows(data, label, None):
        yield row.where, None, row.values


def at(values: Values, column: str) -> Any:
    """A column; `a.b` goes into an object, `a[].b` into a list of objects; None where there is none."""
    here: Any = values
    for number, step in enumerate(column.split(".")):
        if number == 0 and column in values:
            return values[column]
        name, many = step.removesuffix("[]"), step.endswith("[]")
        if isinstance(here, list):
            here = [each.get(name) if isinstance(each, Mapping) else None for each in here]
        else:
            here = here.get(name) if isinstance(here, Mapping) else None
        if many and isinstance(here, str):
            here = literal(here)
    return here


def has(values: Values, column: str) -> bool:
    """Whether a row has a column, be it empty; what an empty list or object would hold counts as there."""
    here: list[Any] = [values]
    if column in values:
        return True
    for step in column.split("."):
        name = step.removesuffix("[]")
        found = [each[name] for each in here if isinstance(each, Mapping) and name in each]
        if not found:
            return False
        lists = [literal(each) if isinstance(each, str) and step.endswith("[]") else each for each in found]
        here = [one for each in lists for one in (each if isinstance(each, list) else [each]) if one is not None]
        if not here:
            return True
    return True


def literal(text: str) -> Any:
    """A list that was written as text, as MMMU has its options and OK-VQA in tables its answers.

    A long text is left one: Python's parser takes hundreds of bytes for each of its letters.
    """
    if len(text) > READERS.literal_characters:
        return text
    try:
        found = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: `{[]}`
        return text
    return found if _is_plain(found) else text


def _is_plain(value: object) -> bool:
    """Whether a value is what rows hold: no set, no bytes, no key that is no text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)
