"""Rows of VCR as published: a question, four answers and four reasons, whose words point to things in the picture.

Zellers et al. 2019 (arXiv 1811.10830): `train.jsonl` and `val.jsonl` of its annotations, with a JSON file of boxes
beside each picture. Here they are plain values; what a model reads of them is made in `encoders.vcr`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Any

from ..base.errors import row_error
from ..base.names import Json, Values
from ..base.whole_files import IrregularError, read_text
from ..base.words import kind, reason_of, short

CHOICES = 4
TASKS = ("q2a", "qa2r")
"""What is asked: which answer is right, and which reason is one for the right answer."""
# As VLE calls the persons of a picture, in this order.
PERSONS = ("Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Payton",
           "Skyler", "Frankie", "Pat", "Quinn")  # fmt: skip
COPIES = ("metadata_fn", "movie", "interesting_scores", "answer_likelihood", "img_id", "question_number", "match_fold",
          "match_index", "answer_orig", "question_orig", "rationale_orig", "answer_match_iter", "answer_sources",
          "rationale_sources", "rationale_match_iter")  # fmt: skip
"""Keys of a row that say where it comes from, or the same once more."""
_MEND_BOXES = "give `boxes` one [x1, y1, x2, y2] in pixels for each of `objects`, with `width` and `height`"

Error = Callable[[str, str], Exception]
"""Makes what is raised of what is wrong and how to mend it."""


def choices_of(row: Values, tasks: Sequence[str], error: Error) -> Iterator[Json]:
    """What a row asks, one a task, as values that JSON can hold.

    Args:
        row: Column name to value.
        tasks: Of `TASKS`.
        error: See `Error`.

    Yields:
        `task`; `names` of its things; `before`, lists of words that stand before each choice (the question, and for
        a reason the right answer); four `choices` of such words; `said`, the same as people write them; `right`, the
        number of the right one; `boxes`, a share of the picture for each thing, or None where they lie beside it.
    """
    things = _listed(row.get("objects"), "objects", "write what is seen: person, car", error)
    if strange := [thing for thing in things if not isinstance(thing, str)]:
        raise error(f'"objects" has {short(str(strange[0]))}, which is no text', "write what is seen: person, car")
    persons = cycle(PERSONS)
    names = [next(persons) if thing == "person" else thing for thing in things]
    boxes = row.get("boxes")
    if boxes is not None:
        boxes = _shares(boxes, row.get("width"), row.get("height"), len(names), lambda what: error(what, _MEND_BOXES))
    before = [_words(row.get("question"), "question", len(names), error)]
    for task in tasks:
        kind_of, label = (
            ("answer_choices", "answer_label") if task == TASKS[0] else ("rationale_choices", "rationale_label")
        )
        if task == TASKS[1]:
            answers = _four(row, "answer_choices", len(names), error)
            before = [*before[:1], answers[_right(row, "answer_label", error)]]
        choices = _four(row, kind_of, len(names), error)
        said = [in_words(words, names) for words in choices]
        yield {"task": task, "names": names, "before": before, "choices": choices, "said": said,
               "right": _right(row, label, error), "boxes": boxes}  # fmt: skip


def shown(asked: Json) -> str:
    """What people read of `choices_of`: a line for what stands before, and one a choice."""
    lines = [in_words(words, asked["names"]) for words in asked["before"]]
    return "\n".join([*lines, *(f"{letter}. {said}" for letter, said in zip("ABCD", asked["said"], strict=True))])


def in_words(words: Sequence[Any], names: Sequence[str]) -> str:
    """Words, and lists of numbers of things, as people write them."""
    text = " ".join(word if isinstance(word, str) else " and ".join(names[n] for n in word) for word in words)
    return re.sub(r" (?=[.,;:?!]|'\w)", "", "".join(c for c in text if unicodedata.category(c) != "Co"))


def boxes_beside(picture: str | None, asked: Json, where: str) -> list[list[float]]:
    """The boxes that VCR has in a JSON file of a picture's name beside it.

    Args:
        picture: Path of the picture; None where it has none.
        asked: As `choices_of` gives it.
        where: The row, in words.

    Raises:
        RowError: There is no such file, or it does not have a box for each thing.
    """
    if picture is None:
        raise row_error(where, "its picture is no file, beside which its boxes lie", _MEND_BOXES, "no boxes")
    path = Path(picture).with_suffix(".json")
    try:
        held = json.loads(read_text(path))
    except (OSError, ValueError, IrregularError, RecursionError) as error:
        what = f"{path}, where its boxes lie, cannot be read ({reason_of(error)})"
        raise row_error(where, what, f"fetch VCR's pictures again, or {_MEND_BOXES}", "no boxes") from None
    held = held if isinstance(held, dict) else {}

    def wrong(what: str) -> Exception:
        return row_error(where, f"{path}: {what}", f"fetch VCR's pictures again, or {_MEND_BOXES}", "no boxes")

    return _shares(held.get("boxes"), held.get("width"), held.get("height"), len(asked["names"]), wrong)


def _shares(boxes: Any, width: Any, height: Any, things: int, wrong: Callable[[str], Exception]) -> list[list[float]]:
    """Boxes in pixels → [x1, y1, x2, y2] as shares of the picture's sides."""
    listed = [box for box in boxes if isinstance(box, list) and len(box) >= 4] if isinstance(boxes, list) else []
    numbers = [width, height, *(n for box in listed for n in box[:4])]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not isfinite(n) for n in numbers):
        raise wrong("a box, the width or the height is no number")
    if not len(listed) == len(boxes) == things or min(width, height) <= 0:
        raise wrong(f"there are {len(listed)} boxes of four numbers for {things} objects, or a side is not above 0")
    return [[n / (height if k % 2 else width) for k, n in enumerate(box[:4])] for box in listed]


def _four(row: Values, key: str, things: int, error: Error) -> list[list[Any]]:
    given = _listed(row.get(key), key, "give it four lists of words", error)
    if len(given) != CHOICES:
        raise error(f'"{key}" has {len(given)} entries, not four', "give it four lists of words")
    return [_words(words, f"{key}[{number}]", things, error) for number, words in enumerate(given)]


def _words(words: Any, key: str, things: int, error: Error) -> list[Any]:
    mend = "write words, and [0] for the first of `objects`"
    for number, word in enumerate(_listed(words, key, mend, error)):
        pointed = word if isinstance(word, list) else []
        if isinstance(word, str) or (pointed and all(type(n) is int and 0 <= n < things for n in pointed)):
            continue
        raise error(f'"{key}[{number}]" is {short(str(word))}, no word and none of the {things} objects', mend)
    return list(words)


def _listed(value: Any, key: str, mend: str, error: Error) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise error(f'"{key}" is {"empty" if value == [] else "missing" if value is None else kind(value)}', mend)
    return value


def _right(row: Values, key: str, error: Error) -> int:
    right = row.get(key)
    if type(right) is not int or not 0 <= right < CHOICES:
        raise error(f'"{key}" is {short(str(right))}, not a number from 0 to 3', "write which choice is right")
    return right
