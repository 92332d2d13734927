"""Rows of a benchmark, from files or the Hub → questions: what is asked, its pictures, and what is right."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.names import ImageEntry, Json, Values
from ..base.words import closest, short, whole_number
from ..metrics.choices import lettered
from ..metrics.measures import NEEDS_CHOICES
from ..reading.image_refs import LONGEST_LIKELY, Folders, resolve_image
from .pictures import Pictures
from .scoring import FEWEST_ANSWERS
from .task_files import at, files_of, has, literal, place_of, rows_of
from .tasks import FIELD, Column, Layout, Task, plain, render_prompt

ROTATION = 1_000_000  # MMBench's index of a rotation: the question's, and so many for each shift
_IMAGE_FOLDERS = ("", "images", "image", "val2014", "test2015", "train_val_images/train_images", "val", "test", "png")


@dataclass
class Asked:
    """A question of a benchmark.

    Attributes:
        id: Its own in the benchmark.
        text: What is asked, prompt included.
        images: As rows have them, or places in `Pictures`.
        answers: What is right: of choices the letters.
        choices: Letter to option, or none.
        kind: The benchmark's own category, or "".
        group: What it belongs together by, or "".
        where: Its row in words.
        columns: What the prompt of its judge sees of its row, where there is one.
    """

    id: str
    text: str
    images: list[ImageEntry]
    answers: list[str]
    choices: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    group: str = ""
    where: str = ""
    columns: Json = field(default_factory=dict)

    def names(self) -> list[str]:
        """What its pictures are called: the path of a file, or a digest of what lies in a table."""
        return [image["path"] if "place" not in image else f"sha256:{image['digest']}" for image in self.images]


def read_task(name: str, task: Task, data: str | None, pictures: Pictures, max_rows: int | None = None) -> list[Asked]:
    """All questions of a benchmark.

    Args:
        name: Of the benchmark.
        task: What it says.
        data: Folder or file with its rows, or with a folder of that name; None for the task's own, then the Hub's.
        pictures: Keeps what lies in tables.
        max_rows: Only so many.

    Raises:
        UserError: It is not there, a row lacks a column, no row has one that a task of one's own names, or two rows
            have one id.
    """
    most = min((limit for limit in (task.max_rows, max_rows) if limit is not None), default=None)
    place = place_of(name, task, data)
    layout: Layout = task
    if isinstance(place, Path):
        layout = next((other for other in task.layouts if other.files and files_of(place, other.files)), task)
    seen: dict[str, str] = {}
    by_id: dict[str, list[ImageEntry]] = {}
    found: list[Asked] = []
    columns: set[str] = set()
    lacking = layout.named_columns() if task.own else {}
    rows = rows_of(place, layout, task.hub)
    for number, (where, folder, values) in enumerate(rows, start=1):
        columns |= values.keys()
        lacking = {column: key for column, key in lacking.items() if not has(values, column)}
        other = _other_row(at(values, layout.images), by_id) if isinstance(layout.images, str) else None
        values = values if other is None else {**values, str(layout.images): None}
        asked = _asked(task, layout, values, where, number, folder, pictures)
        asked.images = asked.images if other is None else other
        if asked.id in seen:
            raise UserError(
                f'{where}: the id "{asked.id}" is that of {seen[asked.id]} too; each question needs its own.'
            )
        seen[asked.id], by_id[asked.id] = where, asked.images
        found.append(asked)
        if most is not None and len(found) >= most:
            break
    if not found:
        raise UserError(f'Benchmark "{name}": {place} holds no rows of it.')
    for _, _, values in rows if lacking else ():  # a column may begin behind the rows that are asked
        lacking = {column: key for column, key in lacking.items() if not has(values, column)}
    _check_columns(name, task, layout, found, columns, lacking)
    return rotated(task, found) if task.circular else found


def _check_columns(
    name: str, task: Task, layout: Layout, found: Sequence[Asked], columns: Set[str], lacking: Mapping[str, str]
) -> None:
    """Refuses a benchmark none of whose rows has what it names or needs: its names of columns are those of other rows.

    Raises:
        UserError: No row has a column of pictures, options, or answers enough, or one of those that are `lacking`.
    """
    there = f"the rows have {', '.join(short(each) for each in sorted(columns)[:12] if each != '_file')}"
    named = [layout.images] if isinstance(layout.images, str) else layout.images
    heads = {part for column in named for part in (column, re.split(r"[.\[]", column)[0])}
    if named and not any(one.images for one in found) and not heads & columns:
        raise UserError(
            f'Benchmark "{name}": no row has the column {" or ".join(map(short, named))} of its pictures ({there}); '
            "correct `images`, or write `images: []` where questions have none."
        )
    if task.metric in NEEDS_CHOICES and not any(one.choices for one in found):
        raise UserError(
            f'Benchmark "{name}": no row has options, which the metric "{task.metric}" needs ({there}); correct '
            "`choices`."
        )
    if task.metric.startswith("vqa") and max(len(one.answers) for one in found) < FEWEST_ANSWERS:
        raise UserError(
            f'Benchmark "{name}": the metric "{task.metric}" compares with the answers of ten annotators, and rows '
            "have one to three; take `exact_match`."
        )
    for column, key in lacking.items():
        near = closest(column, columns - {"_file"})
        mend = f'did you mean "{short(near)}"?' if near else f"correct `{key}`, or leave it out."
        raise UserError(f'Benchmark "{name}": no row has the column "{short(column)}" of its `{key}` ({there}); {mend}')


def _other_row(image: object, known: Mapping[str, list[ImageEntry]]) -> list[ImageEntry] | None:
    """The pictures of the row that an image names by its id, as the tables of MMBench's authors do; else None."""
    return known.get(image) if isinstance(image, str) and image.isdigit() else None


def _given(value: object) -> bool:
    """Whether a column holds something: tables of pandas write what is missing as nan."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return not missing and not (isinstance(value, str) and value.strip().lower() in ("", "nan", "none"))


def _texts(values: Values, columns: Column) -> list[str]:
    found = [at(values, column) for column in ([columns] if isinstance(columns, str) else columns)]
    flat = [each for value in found for each in (value if isinstance(value, list | tuple) else [value])]
    return [_text(each) for each in flat if each is not None and not (isinstance(each, float) and math.isnan(each))]


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _options(values: Values, columns: Column | None) -> list[str]:
    if columns is None:
        return []
    if isinstance(columns, list):
        found = [at(values, column) for column in columns]
        return [_text(value) for value in found if _given(value)]
    value = at(values, columns)
    value = literal(value) if isinstance(value, str) else value
    return [_text(each) for each in value] if isinstance(value, list | tuple) else []


def _asked(
    task: Task, layout: Layout, values: Json, where: str, number: int, folder: Path | None, pictures: Pictures
) -> Asked:
    choices = lettered(_options(values, layout.choices))
    alone = task.judge is not None and not task.judge.compare
    answers = _texts(values, layout.answers)[:1] if alone else _right(layout, values, choices, where)
    question = at(values, layout.question) if layout.question else ""
    if layout.question and not _given(question):
        raise UserError(
            f'{where}: the column "{layout.question}" of the question is missing or empty; {_there(values)}.'
        )
    options = _lines(choices)
    columns = {name: value if _given(value) else "" for name, value in values.items() if name.isidentifier()}
    seen = {**columns, "question": str(question), "options": options, "choices": choices, "row": values}
    text = render_prompt(task.prompt, where, seen)
    if task.judge is not None:  # a column that its prompt lacks is known before hours of asking
        unknown = dict.fromkeys(("answer", "reference", "first", "second", "kind"), "")
        render_prompt(task.judge.prompt, where, {**seen, **unknown})
    named = at(values, layout.id) if layout.id else None
    return Asked(
        id=_text(named) if _given(named) else str(number),
        text=text,
        images=[pictures.keep(image) for image in _images(layout, values, where, folder)],
        answers=answers,
        choices=choices,
        kind=_text(kind) if layout.kind and _given(kind := at(values, layout.kind)) else "",
        group=_text(group) if layout.group and _given(group := at(values, layout.group)) else "",
        where=where,
        columns=plain(seen) if task.judge is not None else {},
    )


def _right(layout: Layout, values: Json, choices: dict[str, str], where: str) -> list[str]:
    """The right answers; of choices their letters."""
    found = _texts(values, layout.answers)
    if len(found) == 1 and found[0].startswith("[") and isinstance(several := literal(found[0]), list):
        found = [_text(each) for each in several]
    if not found or not any(text.strip() for text in found):
        named = layout.answers if isinstance(layout.answers, str) else ", ".join(layout.answers)
        raise UserError(
            f'{where}: the column "{named}" of the right answer is missing or empty ({_there(values)}); a split '
            "without answers is measured by its benchmark's own server."
        )
    if not choices:
        return found
    letters = list(choices)
    if layout.answer_is == "number":
        numbers = [(text, whole_number(text)) for text in found]
        found = [text if n is None or n >= len(letters) else letters[n] for text, n in numbers]
    elif layout.answer_is == "text":
        found = [
            next((letter for letter in letters if choices[letter].strip() == text.strip()), text) for text in found
        ]
    if strange := [text for text in found if text not in choices]:
        raise UserError(f'{where}: the right answer "{short(strange[0])}" is none of its {len(choices)} options.')
    return found


def _images(layout: Layout, values: Json, where: str, folder: Path | None) -> Iterator[ImageEntry]:
    columns = [layout.images] if isinstance(layout.images, str) else layout.images
    for column in columns:
        if FIELD.search(column):
            given: Any = FIELD.sub(lambda found: _text(at(values, found[1])).zfill(int(found[2] or 0)), column)
        else:
            given = at(values, column)
        for image in given if isinstance(given, list) else [given]:
            if _given(image) if not isinstance(image, bytes | Mapping) else True:
                yield _image(image, where, folder)


def _image(image: object, where: str, folder: Path | None) -> ImageEntry:
    if isinstance(image, str) and folder is not None and len(image) < LONGEST_LIKELY:
        places = (os.path.join(folder, each, image) for each in _IMAGE_FOLDERS)
        image = next((path for path in places if os.path.isfile(path)), image)
    found = resolve_image(
        image, None if folder is None else str(folder), where, within=None if folder is None else Folders([folder])
    )
    if found["bytes"] is None and not os.path.isfile(found["path"]):
        raise UserError(
            f"{where}: its picture {found['path']} is not there; put the benchmark's pictures into {folder}."
        )
    return found


def _there(values: Values) -> str:
    return f"the row has {', '.join(short(name) for name in list(values)[:12] if name != '_file')}"


def rotated(task: Task, found: list[Asked]) -> list[Asked]:
    """Questions with every rotation of their options, as MMBench numbers them; as they are where the data has them."""
    numbers = [whole_number(asked.id) for asked in found]
    if any(number is not None and number >= ROTATION for number in numbers):
        for asked, number in zip(found, numbers, strict=True):
            asked.group = asked.id if number is None else str(number % ROTATION)
        return found
    return [turned(asked, shift) for asked in found for shift in range(max(1, len(asked.choices)))]


def turned(asked: Asked, shift: int) -> Asked:
    """A question with its options rotated to the left, as a row of MMBench's own; one without options as it is."""
    if not asked.choices:
        return replace(asked, group=asked.id)
    letters, options = list(asked.choices), list(asked.choices.values())
    choices = dict(zip(letters, [*options[shift:], *options[:shift]], strict=True))
    plain = whole_number(asked.id)
    number = f"{asked.id}+{shift}" if plain is None else str(plain + shift * ROTATION)
    return replace(
        asked,
        id=number if shift else asked.id,
        text=asked.text.replace(_lines(asked.choices), _lines(choices)),
        answers=[letters[(letters.index(letter) - shift) % len(letters)] for letter in asked.answers],
        choices=choices,
        group=asked.id,
    )


def _lines(choices: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in choices.items())
