"""One source → its rows ``{"messages", "images", "source", "id"}``, one at a time, as plain Python objects."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import RowError, UserError, raise_it
from ..base.names import Json, Row
from ..base.words import closest, short
from ..reading.image_refs import Folders, resolve_image
from ..reading.locations import FileRow, folders_of_hub, list_files, read_rows
from ..reading.published import ANNOTATED, PUBLISHED, check_pattern, read_published
from ..rows.formats import FORMATS, QUESTION_MARK, answers_in, examples_of, no_prompt
from ..rows.messages import Message, normalise_messages
from ..rows.raw_row import RowView
from ..rows.videos import Sampling, with_frames

if TYPE_CHECKING:
    from ..recipe.sections import Source


def name_of(source: Source) -> str:
    """The name of a source in ids and messages: its own, else the last part of its path without the suffix."""
    return source.name or Path(source.path).stem


def source_rows(
    source: Source,
    *,
    seed: int = 0,
    reject: Callable[[RowError], None] = raise_it,
    stream: bool = False,
    unused: Callable[[set[str]], None] = lambda keys: None,
) -> Iterator[Row]:
    """Yield the rows of one source in the order of its files, each as it is used; nothing is held.

    Args:
        source: where the rows lie and what they mean; a `recipe.Source`. Its `max_rows` counts rows that are yielded.
        seed: draws the prompts. The draw of a row depends on seed, source name and row number only.
        reject: told of every row that is wrong by itself, which is then left out; by default it stops the run.
        stream: read a Hub dataset as it is used, instead of downloading all of it first.
        unused: told, for every row, the names of the keys that have a value and mean nothing in its format.

    Raises:
        UserError: the source is not what the recipe says. Raised while iterating.
    """
    found = rows_with_language(source, seed=seed, reject=reject, stream=stream, languages=False, unused=unused)
    return (row for row, _ in found)


def rows_with_language(
    source: Source,
    *,
    seed: int = 0,
    reject: Callable[[RowError], None] = raise_it,
    stream: bool = False,
    languages: bool = True,
    unused: Callable[[set[str]], None] = lambda keys: None,
) -> Iterator[tuple[Row, str]]:
    """As `source_rows`, each row with its language (`zh`, `en`, or what its own `language` says).

    Args:
        source: as `source_rows`, like the others.
        languages: False: the language is not looked for where no prompt depends on it.
    """
    check_source(source)
    return islice(_rows(source, numbered_rows(source, stream), seed, reject, languages, unused), source.max_rows)


class Block(NamedTuple):
    """Rows with their languages, the rows that are wrong, and in how many rows each key was not used."""

    rows: list[tuple[Row, str]]
    rejected: list[RowError]
    unused: Counter[str]


def blocks_of(
    source: Source,
    numbered: Iterable[tuple[int, FileRow]],
    size: int,
    share: tuple[int, int],
    *,
    seed: int,
    languages: bool,
) -> Iterator[Block]:
    """A share of the rows of a source: of its blocks of so many rows as they are in its files, every K-th.

    Args:
        source: as `source_rows`, like the others.
        numbered: what `numbered_rows` gives of it.
        size: rows of a block.
        share: which block is the first, and K.
        seed: as above.
        languages: as `rows_with_language`.
    """
    left = iter(numbered)
    for number, block in enumerate(iter(lambda: list(islice(left, size)), [])):
        if number % share[1] == share[0]:
            found = Block([], [], Counter())
            found.rows.extend(_rows(source, block, seed, found.rejected.append, languages, found.unused.update))
            yield found


def every_answer(source: Source) -> dict[str, list[str]]:
    """The answers of all annotators by the id of their row, which itself has the most frequent one alone.

    Args:
        source: of questions; its rows are right, as `source_rows` finds out.

    Raises:
        UserError: as `source_rows`.
    """
    found: dict[str, list[str]] = {}
    for number, row in enumerate(islice(_raw_rows(source, stream=False), source.max_rows), start=1):
        view = RowView(row.values, row.where, source.columns)
        own = view.get("id")
        key = f"{name_of(source)}/{number if own is None else view.text(own, 'id')}"
        found[key] = answers_in(view, "answer" if view.get("answers") is None else "answers")
    return found


def check_source(source: Source) -> None:
    """Look that a source's keys fit its format, before any file is opened.

    Raises:
        UserError: they do not.
    """
    name = name_of(source)
    if source.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f'The source "{name}" has the format "{source.format}": it must be one of {known}.')
    columns = FORMATS[source.format].columns
    if strange := next((ours for ours in source.columns if ours not in columns), None):
        hint = f'; did you mean "{near}"' if (near := closest(strange, columns)) else ""
        raise UserError(
            f'The source "{name}" maps the column "{strange}", which the format {source.format} does not have{hint}: '
            f"it has {', '.join(columns)}."
        )
    _check_prompts(source, name)
    if source.image_name is not None:
        if source.format not in PUBLISHED:
            raise UserError(f'The source "{name}" has image_name, but its rows name their images: remove it.')
        check_pattern(source.image_name, name)
    wants = source.format in ANNOTATED
    if (source.annotations is not None) != wants:
        what = "no `annotations`, which hold its answers: name their file" if wants else "annotations: remove them"
        raise UserError(f'The source "{name}" of format {source.format} has {what}.')
    for folder in (*([] if source.images is None else [source.images]), *source.image_folders):
        if not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f'The source "{name}" takes its images from {folder}, which is no folder: correct it.')


def _check_prompts(source: Source, name: str) -> None:
    kind = FORMATS[source.format].prompts
    if source.prompts and kind is None:
        takers = ", ".join(format_name for format_name, known in FORMATS.items() if known.prompts)
        raise UserError(f'The source "{name}" has prompts, but only the formats {takers} take them: remove them.')
    pools = source.prompts.values() if isinstance(source.prompts, dict) else [source.prompts]
    for prompt in (prompt for pool in pools for prompt in pool):
        if (QUESTION_MARK in prompt) != (kind == "question"):
            verb = "lacks" if kind == "question" else "has"
            mend = "write it where the question stands" if kind == "question" else "remove it"
            raise UserError(
                f'The source "{name}" has the prompt "{short(prompt)}", which {verb} {QUESTION_MARK}: {mend}.'
            )


def numbered_rows(source: Source, stream: bool = False) -> Iterator[tuple[int, FileRow]]:
    """The rows of a source as they are in its files, counted from 1.

    Raises:
        UserError: at the end, where no row has a column that the source maps.
    """
    unseen = set(source.columns.values())
    for number, row in enumerate(_raw_rows(source, stream), start=1):
        unseen -= row.values.keys()
        yield number, row
    if unseen:
        raise UserError(
            f'No row of {source.path} has the column "{min(unseen)}" that `columns` maps: correct the name.'
        )


def _rows(
    source: Source,
    numbered: Iterable[tuple[int, FileRow]],
    seed: int,
    reject: Callable[[RowError], None],
    languages: bool,
    unused: Callable[[set[str]], None],
) -> Iterator[tuple[Row, str]]:
    name, sampling = name_of(source), Sampling(**source.frames_shown.model_dump())
    images_folder = None if source.images is None else os.path.abspath(os.path.expanduser(source.images))
    of_file: Path | str | None = ""
    for number, row in numbered:
        if row.folder is not of_file:
            of_file, within = row.folder, _folders_of(source, row.folder)
            folder = images_folder or (None if row.folder is None else os.path.abspath(row.folder))
        draw = _prompts_of(source, f"{seed}/{name}/{number}", row.where) if source.prompts else no_prompt
        resolve = partial(resolve_image, folder=folder, where=row.where, allow_urls=source.allow_urls, within=within)
        ready = []  # all of a row before any of it: one wrong caption of five rejects the row, not a part of it
        try:
            if row.problem is not None:
                raise row.problem
            said: Json = {
                "where": row.where,
                "columns": source.columns,
                "boxes": source.boxes,
                "draw_prompt": draw,
            }
            examples = list(examples_of(row.values, source.format, **said, languages=languages, unused=unused))
            for k, example in enumerate(examples, start=1):
                messages, images = with_frames(example, resolve, row.where, sampling)
                key = f"{name}/{example.id or number}" + (f"#{k}" if len(examples) > 1 else "")
                whole = {"messages": _checked(messages, row.where), "images": images, "source": name, "id": key}
                ready.append((whole, example.language))
        except RowError as error:
            reject(error)
        else:
            yield from ready


def _folders_of(source: Source, of_file: Path | None) -> Folders:
    """Where the images of a file's rows may lie: its own folder or the Hub's cache, and those that the source names."""
    whole = [source.path] if os.path.isdir(os.path.expanduser(source.path)) else []
    own = folders_of_hub(source.path) if of_file is None else [str(of_file), *whole]
    return Folders([*([source.images] if source.images else []), *own, *source.image_folders])


def _raw_rows(source: Source, stream: bool) -> Iterator[FileRow]:
    if source.format not in PUBLISHED:
        yield from read_rows(source.path, split=source.split, revision=source.revision, keep_wrong=True, stream=stream)
        return
    answers = [] if source.annotations is None else list_files(source.annotations)
    for path, where, found in read_published(source.format, list_files(source.path), source.image_name, answers):
        yield FileRow.of(where, path.parent, found)


def _prompts_of(source: Source, seed: str, where: str) -> Callable[[str], str]:
    """Language → one of the source's instructions in it; drawn anew at every call."""
    chance = random.Random(seed)

    def draw(language: str) -> str:
        prompts = source.prompts
        if isinstance(prompts, list):
            return chance.choice(prompts)
        if language not in prompts:
            raise UserError(
                f'{where}: the row is in "{short(language)}" and the source has prompts for {", ".join(prompts)} only: '
                "add prompts for it, or correct the column `language`."
            )
        return chance.choice(prompts[language])

    return draw


def _checked(messages: list[Message], where: str) -> list[Message]:
    try:
        messages = normalise_messages(messages)
    except UserError as error:
        raise RowError(f"{where}: {error}", where=where, reason="messages wrong") from None
    if not any(message["role"] == "assistant" and message.get("loss") is not False for message in messages):
        sentence = f"{where}: there is no answer to learn from: add an assistant's message or remove the row."
        raise RowError(sentence, where=where, reason="no answer")
    return messages
