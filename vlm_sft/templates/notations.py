"""How boxes are written: a table of notations, one for each way in which models were taught to say where things are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..base.errors import UserError
from ..rows.messages import Part

RESIZED, UNIT, GRID = "resized", "unit", "grid"
DEFAULT = "shikra"
GRID_SIDE = 32  # KOSMOS-2 divides each side into so many cells


@dataclass(frozen=True)
class Notation:
    """How boxes are written.

    Attributes:
        steps: What the numbers count: pixels of the picture as the model gets it (`RESIZED`), 0 to 1 (`UNIT`), cells of
            a grid (`GRID`), or so many steps of each side.
        box: A box; a format of x1, y1, x2, y2, or of `first` and `last`, its corner cells in a grid.
        point: A point; a format of x and y; "" where there is none.
        frame: What stands around the boxes of one thing: a format of `boxes`.
        between: What stands between two of them.
        ref: Words without a box: a format of `ref`.
        named: Words with their boxes: a format of `ref` and of `boxes`, framed.
        each: Words with each of their boxes, and `between` between them, in place of `named`: a format of `ref`, its
            JSON text `label`, of `box`, and of `kind`, `bbox` or `point`.
        token: How its numbers look where they are tokens that the tokenizer must have, or "".
        last: The largest number, where it is not `steps`.
    """

    steps: str | int
    box: str
    point: str = ""
    frame: str = "{boxes}"
    between: str = ""
    ref: str = "{ref}"
    named: str = "{ref}{boxes}"
    each: str = ""
    token: str = ""
    last: int | None = None


_CORNERS, _PAIRS = "[{x1}, {y1}, {x2}, {y2}]", "({x1},{y1}),({x2},{y2})"
_QWEN_JSON = '{{"{kind}_2d": {box}, "label": {label}}}'

NOTATIONS: dict[str, Notation] = {
    "qwen2_5_vl": Notation(RESIZED, _CORNERS, "[{x}, {y}]", between=", ", each=_QWEN_JSON),
    "qwen3_vl": Notation(1000, _CORNERS, "[{x}, {y}]", between=", ", each=_QWEN_JSON),
    "internvl": Notation(1000, _CORNERS, "[{x}, {y}]", frame="<box>[{boxes}]</box>", between=", ",
                         ref="<ref>{ref}</ref>", named="<ref>{ref}</ref>{boxes}"),
    "qwen_vl": Notation(1000, f"<box>{_PAIRS}</box>", "<box>({x},{y})</box>",
                        ref="<ref>{ref}</ref>", named="<ref>{ref}</ref>{boxes}"),
    "qwen2_vl": Notation(1000, f"<|box_start|>{_PAIRS}<|box_end|>", "<|box_start|>({x},{y})<|box_end|>",
                         ref="<|object_ref_start|>{ref}<|object_ref_end|>",
                         named="<|object_ref_start|>{ref}<|object_ref_end|>{boxes}"),
    "kosmos2": Notation(GRID, "<patch_index_{first:04d}><patch_index_{last:04d}>",
                        frame="<object>{boxes}</object>", between="</delimiter_of_multi_objects/>",
                        ref="<phrase>{ref}</phrase>", named="<phrase>{ref}</phrase>{boxes}",
                        token=r"<patch_index_\d+>"),
    "paligemma": Notation(1024, "<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}>", between=" ; ",
                          each="{box} {ref}", token=r"<loc\d+>", last=1023),
    "shikra": Notation(UNIT, "{x1:.3f},{y1:.3f},{x2:.3f},{y2:.3f}", "{x:.3f},{y:.3f}", frame="[{boxes}]", between=";"),
    "llava": Notation(UNIT, "[{x1:.2f}, {y1:.2f}, {x2:.2f}, {y2:.2f}]", "[{x:.2f}, {y:.2f}]", between=", ",
                      named="{ref} {boxes}"),
}  # fmt: skip
"""The notations there are, under the names that `box_notation` of a recipe and `Family.boxes` give them."""


def notation_of(name: str) -> Notation:
    """The notation of that name.

    Raises:
        UserError: There is none.
    """
    if name not in NOTATIONS:
        raise UserError(f"box_notation is {name!r}: it must be one of {', '.join(NOTATIONS)}.")
    return NOTATIONS[name]


def written_box(notation: Notation, box: Sequence[float], size: tuple[float, float], grid: int) -> str:
    """A box or point in 0 to 1 of what the model sees, as text.

    Args:
        notation: How it is written.
        box: 4 or 2 numbers.
        size: (width, height) in pixels of what the model sees.
        grid: Cells of a side, for a notation that counts them.
    """
    if notation.steps == GRID:  # as in transformers, models/kosmos2/processing_kosmos2.py
        left, top = (min(math.floor(number * grid), grid - 1) for number in box[:2])
        right, bottom = (max(math.ceil(number * grid - 1), 0) for number in box[2:])
        return notation.box.format(first=top * grid + left, last=bottom * grid + right)
    numbers: Sequence[float] = box
    if notation.steps != UNIT:
        most = [size[i % 2] if notation.steps == RESIZED else float(notation.steps) for i in range(len(box))]
        numbers = [round(number * steps) for number, steps in zip(box, most, strict=True)]
        numbers = numbers if notation.last is None else [min(number, notation.last) for number in numbers]
    if len(box) == 2:
        return notation.point.format(x=numbers[0], y=numbers[1])
    return notation.box.format(x1=numbers[0], y1=numbers[1], x2=numbers[2], y2=numbers[3])


def written_group(notation: Notation, ref: str | None, boxes: Sequence[str], points: Sequence[bool]) -> list[Part]:
    """Words, or boxes, or words and their boxes, as parts of text. What people wrote in them is text like any other.

    Args:
        notation: How they are written.
        ref: The words, or None.
        boxes: Each as `written_box` gives it.
        points: For each, whether it is a point.
    """
    if not boxes:
        return _around(notation.ref, ref or "", {})
    if ref is not None and notation.each:
        parts: list[Part] = []
        for box, point in zip(boxes, points, strict=True):
            if parts:
                parts.append(_ours(notation.between))
            parts += _around(notation.each, ref, {"box": box, "kind": "point" if point else "bbox"})
        return parts
    framed = notation.frame.format(boxes=notation.between.join(boxes))
    return [_ours(framed)] if ref is None else _around(notation.named, ref, {"boxes": framed})


def joined(parts: Sequence[Part]) -> list[Part]:
    """Parts in which text that follows text is one part, as if it had been typed."""
    found: list[Part] = []
    for part in parts:
        if part["type"] != "text" or not found or found[-1]["type"] != "text":
            found.append(dict(part))
            continue
        before = len(found[-1]["text"])
        moved = [(start + before, end + before) for start, end in part.get("written", ())]
        found[-1] |= {"text": found[-1]["text"] + part["text"], "written": [*found[-1].get("written", ()), *moved]}
    return found


def missing_token(notation: Notation, vocabulary: Collection[str], grid: int) -> str | None:
    """The first token of a notation that a tokenizer does not have."""
    if not notation.token:
        return None
    last = written_box(notation, [0.0, 0.0, 1.0, 1.0], (1.0, 1.0), grid)
    return next((token for token in re.findall(notation.token, last) if token not in vocabulary), None)


def _ours(text: str) -> Part:
    """Text in which tokens are tokens."""
    return {"type": "text", "text": text, "written": [(0, len(text))]}


def _around(form: str, ref: str, values: Mapping[str, str]) -> list[Part]:
    """A format filled in, the row's own words in it as text of their own."""
    mark = "\0"
    before, _, after = form.format(ref=mark, label=f'"{mark}"', **values).partition(mark)
    own = json.dumps(ref, ensure_ascii=False)[1:-1] if "{label}" in form else ref
    return [part for part in (_ours(before), {"type": "text", "text": own}, _ours(after)) if part["text"]]
