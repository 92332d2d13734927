"""Boxes in rows: ms-swift's `objects`, columns of boxes, and boxes typed in text → parts of a message.

A part keeps the numbers as the row has them, with what they count (`SCALES`): no picture is opened here, and how they
are written depends on the model. What nobody says is not guessed: typed boxes are text until the source's `boxes` says
what their numbers count.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..base.errors import row_error
from ..base.words import kind, short
from .messages import Message, Part, box_part, ref_part, text_part
from .raw_row import RowView, is_given

SCALES: dict[str, float | None] = {"pixels": None, "unit": 1.0, "thousand": 1000.0, "padded": 1.0}
"""What numbers count → their largest: pixels of the upright picture, 0 to 1 or 0 to 1000 of its sides, or 0 to 1 of the
square that the picture is centred on (LLaVA's own data)."""
AS_WRITTEN = "as_written"  # boxes typed in text stay as they are, and it is meant
BBOX_TYPES = {"real": "pixels", "norm1": "unit", "norm1000": "thousand"}  # ms-swift's words
BOX_MARK, REF_MARK = "<bbox>", "<ref-object>"
SLACK = 0.5  # pixels that a box may stick out of its picture; so far it is cut
LOCATIONS = 1024  # steps of PaliGemma's location tokens on each side

_NAMES = ("ref", "bbox", "bbox_type", "image_id")
_OF_OLDER_SWIFT = {"caption": "ref", "label": "ref", "bbox_2d": "bbox", "image": "image_id"}

_N = r"\s*-?\d+(?:\.\d+)?\s*"
_PAIR = rf"\({_N},{_N}\)"
_FOUR = rf"{_N},{_N},{_N},{_N}"
TYPED = re.compile(
    r"(?:<\|object_ref_start\|>(?P<ref1>.*?)<\|object_ref_end\|>|<ref>(?P<ref2>.*?)</ref>)"
    rf"|(?:<\|box_start\|>\s*(?P<pairs1>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*<\|box_end\|>"
    rf"|<box>\s*(?P<pairs2>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*</box>)"
    rf"|<box>\s*\[\s*(?P<lists>\[{_FOUR}\](?:\s*,\s*\[{_FOUR}\])*)\s*\]\s*</box>"
    r"|(?P<tokens>(?:<loc\d{4}>){4})"
    rf"|(?P<open>\"point_2d\"\s*:\s*)\[(?P<point>{_N},{_N})\]"
    rf"|\[(?P<list>{_FOUR}(?:;{_FOUR})*)\]",
    re.S,
)
"""Boxes, points and their words as people type them: Qwen-VL's and Qwen2-VL's, InternVL's, PaliGemma's tokens, JSON of
Qwen2.5, and the lists of Shikra and LLaVA."""
ANY_TYPED = re.compile(r"<box>|<\|box_start\|>|(?:<loc\d{4}>){4}|\"(?:bbox|point)_2d\"\s*:\s*\[")
UNREAD = re.compile(r"<\|(?:box|quad)_start\|>|<(?:box|quad)>")


class Given(NamedTuple):
    """What a row's own columns say of boxes: the boxes and the words for them, in the order of their marks."""

    boxes: list[Part]
    refs: list[Part]


def place_boxes(row: RowView, messages: list[Message], images: int, scale: str | None) -> list[Message]:
    """Puts a row's boxes where its messages mark them, and reads those that are typed in text.

    Args:
        row: for its columns, and to name it.
        messages: content as parts.
        images: how many the row has.
        scale: what the source says that boxes count: a key of `SCALES`, `AS_WRITTEN`, or None where it says nothing.

    Raises:
        RowError: marks and boxes differ in number, a box is none, or nothing says what it counts or which image it is
            on.
    """
    typed = scale in SCALES and images > 0  # without a picture, four numbers are no box
    given = _given(row, messages, images, scale if scale in SCALES else None)
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "box":  # the row wrote the part itself
            _check_image(row, part["image"], images, part["key"])
        elif given is None and images and part["text"] and (BOX_MARK in part["text"] or REF_MARK in part["text"]):
            what = f"the messages have {BOX_MARK} or {REF_MARK}, but the row has no boxes"
            raise row.error(what, "give it `objects`, or remove the marks", "marks differ")
    if given is None and not typed:
        return messages
    found: dict[str, Iterator[Part]] = {}
    if given is not None:
        _check_marks(row, messages, given)
        found = {BOX_MARK: iter(given.boxes), REF_MARK: iter(given.refs)}
    return [
        _placed(row, message, index, images, scale if typed else None, found) for index, message in enumerate(messages)
    ]


def _placed(
    row: RowView, message: Message, index: int, images: int, scale: str | None, found: Mapping[str, Iterator[Part]]
) -> Message:
    parts: list[Part] = []
    for part in message["content"]:
        pieces = [part]
        if part["type"] == "text" and found:
            cut = re.split(f"({BOX_MARK}|{REF_MARK})", part["text"])
            pieces = [next(found[piece]) if piece in found else text_part(piece) for piece in cut if piece]
        for piece in pieces:
            typed = piece["type"] == "text" and scale is not None
            parts += _typed(row, piece["text"], scale or "", images, f"messages[{index}]") if typed else [piece]
    return {**message, "content": parts}


# ------------------------------------------------------------------------------------------------------------- columns


def _given(row: RowView, messages: Sequence[Message], images: int, scale: str | None) -> Given | None:
    """The boxes of a row's `objects`, or of its `bbox` or `bboxes` where its messages mark a box; None without any."""
    if is_given(objects := row.get("objects")):
        return _objects(row, objects, images, scale)
    column = next((name for name in ("bboxes", "bbox") if is_given(row.values.get(name))), None)
    if column is None or BOX_MARK not in _texts(messages):
        return None  # a column that no text speaks of is counted, as others that are not used
    row.get(column)
    if scale is None:
        what = f'nothing says what the numbers of "{column}" count'
        raise row.error(what, f"set the source's `boxes` to {_or(SCALES)}", "box unclear")
    values = _listed(row, row.values[column], column)
    return Given([_box(row, box, scale, _only(row, key, images), key, images) for key, box in values], [])


def _objects(row: RowView, objects: Any, images: int, scale: str | None) -> Given | None:
    """ms-swift's `objects`; its older form, a list of objects with one box each, is read too."""
    fields = _fields(row, objects)
    if not is_given(fields.get("bbox")) and not is_given(fields.get("ref")):
        row.leave("objects")  # whatever it says, it has no boxes
        return None
    values = _listed(row, fields.get("bbox"), "objects.bbox")
    own = fields.get("bbox_type")
    if is_given(own):
        if own not in {*BBOX_TYPES, *SCALES}:
            what = f'"objects.bbox_type" is "{short(str(own))}"'
            raise row.error(what, f"it must be {_or(BBOX_TYPES)}", "box unclear")
        scale = BBOX_TYPES.get(own, own)
    elif scale is None:
        scale = "pixels"  # what ms-swift says of rows that do not
        if values and all(_is_number(n) and n <= 1 for _, box in values for n in box):
            what = 'no number of "objects.bbox" is above 1, and without a "bbox_type" they would count pixels'
            raise row.error(what, 'write "bbox_type": "norm1", or set the source\'s `boxes`', "box unclear")
    numbers = fields.get("image_id")
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers] * len(values)
    if len(numbers) > len(values) or any(type(number) is not int for number in numbers):
        what = '"objects.image_id" is no list of numbers, one for each box'
        raise row.error(what, "count the images from 0", "wrong type")
    numbers += [0] * (len(values) - len(numbers))  # as ms-swift has it
    boxes = [_box(row, box, scale, n, key, images) for (key, box), n in zip(values, numbers, strict=True)]
    refs = fields.get("ref")
    refs = refs if isinstance(refs, list) else [] if refs is None else [refs]
    return Given(boxes, [ref_part(row.text(ref, f"objects.ref[{i}]")) for i, ref in enumerate(refs)])


def _fields(row: RowView, objects: Any) -> dict[str, Any]:
    """The fields of `objects` by ms-swift's names."""
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except ValueError:
            raise row.error('"objects" is text and no JSON', 'write {"ref": [...], "bbox": [...]}') from None
    if isinstance(objects, list) and all(isinstance(entry, dict) for entry in objects):
        entries = [{_OF_OLDER_SWIFT.get(name, name): value for name, value in entry.items()} for entry in objects]
        types = {str(entry.get("bbox_type") or "") for entry in entries}
        if len(types) > 1:
            raise row.error('the entries of "objects" have several "bbox_type"s', "write one for all", "box unclear")
        for name in {name for entry in entries for name in entry} - set(_NAMES):
            row.leave(f"objects[].{name}")
        objects = {name: [entry[name] for entry in entries if name in entry] for name in ("ref", "bbox", "image_id")}
        objects["bbox_type"] = next(iter(types), None)
    if not isinstance(objects, dict):
        raise row.error(f'"objects" is {kind(objects)}', 'write {"ref": [...], "bbox": [...]}')
    for name in objects.keys() - set(_NAMES):
        if is_given(objects[name]):
            row.leave(f"objects.{name}")
    return objects


def _listed(row: RowView, value: Any, key: str) -> list[tuple[str, Sequence[Any]]]:
    """(place in the row, numbers) of each box; four numbers alone are one box."""
    value = [] if value is None else value
    if isinstance(value, list | tuple) and value and all(_is_number(number) for number in value):
        return [(key, value)]
    if not isinstance(value, list | tuple) or any(not isinstance(box, list | tuple) for box in value):
        raise row.error(f'"{key}" is no list of boxes', "write [[x1, y1, x2, y2], …]")
    return [(f"{key}[{index}]", box) for index, box in enumerate(value)]


def _texts(messages: Sequence[Message]) -> str:
    return "".join(part["text"] for m in messages for part in m["content"] if part["type"] == "text")


def _check_marks(row: RowView, messages: Sequence[Message], given: Given) -> None:
    said = _texts(messages)
    for mark, parts, what in ((BOX_MARK, given.boxes, "boxes"), (REF_MARK, given.refs, "words for them (ref)")):
        if (marks := said.count(mark)) != len(parts):
            found = f"the messages have {mark} {marks} times, but the row has {len(parts)} {what}"
            raise row.error(found, f"write {mark} where each of them belongs", "marks differ")


# ---------------------------------------------------------------------------------------------------------------- text


def _typed(row: RowView, text: str, scale: str, images: int, key: str) -> list[Part]:
    """A text as parts, its boxes and their words taken out."""
    parts: list[Part] = []
    end, count = 0, 0
    for match in TYPED.finditer(text):
        _check_read(row, text[end : match.start()], key)
        parts.append(text_part(text[end : match.start()] + (match["open"] or "")))
        end = match.end()
        if (ref := match["ref1"] if match["ref1"] is not None else match["ref2"]) is not None:
            parts.append(ref_part(ref))
            continue
        for box, own in _numbers_of(match, scale):
            place = f"{key}, box {count + 1} of its text"
            parts.append(_box(row, box, own, _only(row, place, images), place, images))
            count += 1
    _check_read(row, text[end:], key)
    return [part for part in [*parts, text_part(text[end:])] if part["text"] != ""]


def _check_read(row: RowView, text: str, key: str) -> None:
    if unread := UNREAD.search(text):
        what = f'{key} has "{unread[0]}" and no box that is known there: "{short(text[unread.start() :])}"'
        mend = "write (x1,y1),(x2,y2) in it, or `boxes: as_written` in the source to train on the text as it is"
        raise row.error(what, mend, "box unclear")


def _numbers_of(match: re.Match[str], scale: str) -> Iterator[tuple[list[float], str]]:
    """The boxes in a match of `TYPED`, and what each counts."""
    if match["tokens"]:
        top, left, bottom, right = (int(step) / LOCATIONS for step in re.findall(r"\d{4}", match["tokens"]))
        yield [left, top, right, bottom], "unit"
        return
    lists, pairs = match["list"] or match["lists"], match["pairs1"] or match["pairs2"]
    for piece in re.split(r";|\]\s*,\s*\[", lists) if lists else [pairs or match["point"]]:
        yield [float(number) if "." in number else int(number) for number in re.findall(r"-?[\d.]+", piece)], scale


# --------------------------------------------------------------------------------------------------------------- a box


def given_box(row: RowView, part: Mapping[str, Any], key: str) -> Part:
    """A part of type `box` that a row writes itself, as `vlm-sft data convert` does."""
    box, scale, image = part.get("box"), part.get("scale"), part.get("image", 0)
    if scale not in SCALES or not isinstance(box, list) or type(image) is not int:
        what = f"{key} is no box"
        raise row.error(what, f'write {{"type": "box", "box": [x1, y1, x2, y2], "scale": …}}, of {_or(SCALES)}')
    return _box(row, box, scale, image, f"{key}.box", None)


def _check_image(row: RowView, image: int, images: int, key: str) -> None:
    if not 0 <= image < images:
        have = f"image {image} (from 0), and the row has {images}" if images else "an image, and the row has none"
        raise row.error(f'"{key}" is a box on {have}', "correct the row", "box without image")


def _box(row: RowView, box: Sequence[Any], scale: str, image: int, key: str, images: int | None) -> Part:
    """A box whose numbers can be one."""
    if images is not None:
        _check_image(row, image, images, key)
    if problem := problem_of(box, scale):
        what, mend = problem
        raise row.error(f'"{key}" {what}', mend, "box wrong")
    return box_part(box, scale, image, key)


def _only(row: RowView, key: str, images: int) -> int:
    if images > 1:
        what = f'"{key}" is a box, the row has {images} images, and nothing says which it lies on'
        raise row.error(what, "write the boxes as ms-swift's `objects` with `image_id`", "box unclear")
    return 0


def problem_of(box: Sequence[Any], scale: str) -> tuple[str, str] | None:
    """What is wrong with the numbers of a box or point, and how to mend it; None where nothing is."""
    said = short(str(list(box)))
    if not all(_is_number(number) for number in box):
        return f"is {said}", "write numbers"
    if len(box) not in (2, 4):
        if len(box) >= 6 and len(box) % 2 == 0:
            return f"has {len(box)} numbers, as a polygon has", "write the box around it, [x1, y1, x2, y2]"
        return f"has {len(box)} numbers", "write [x1, y1, x2, y2] for a box or [x, y] for a point"
    if len(box) == 4 and (box[2] <= box[0] or box[3] <= box[1]):
        mend = "write [x1, y1, x2, y2], the left upper corner first"
        return f"is {said}, which has no width or height (x2 <= x1 or y2 <= y1)", mend
    most = SCALES[scale]
    if min(box) < (0 if most else -SLACK) or (most and max(box) > most):
        unit = f"0 to {most:g}" if most else "pixels from 0 on"
        mend = "correct it" if most is None else "correct it, or what the source's `boxes` or its bbox_type says"
        return f"is {said}, outside of its picture ({scale}: {unit})", mend
    return None


def to_unit(part: Mapping[str, Any], size: tuple[int, int], where: str) -> list[float]:
    """A box part's numbers as 0 to 1 of the sides of its picture.

    Args:
        part: as `box_part` makes it.
        size: (width, height) in pixels of the upright picture, as it lies in the file.
        where: the row in words.

    Raises:
        RowError: the box lies outside of its picture.
    """
    convert: Callable[[float, int], float]
    side = max(size)
    convert = {
        "pixels": lambda number, length: number / length,
        "unit": lambda number, length: number,
        "thousand": lambda number, length: number / 1000,
        "padded": lambda number, length: (number * side - (side - length) // 2) / length,
    }[part["scale"]]
    lengths = [size[i % 2] for i in range(len(part["box"]))]
    found = [convert(number, length) for number, length in zip(part["box"], lengths, strict=True)]
    slack = math.inf if part["scale"] == "padded" and len(found) == 4 else SLACK
    over = any(not -slack <= number * length <= length + slack for number, length in zip(found, lengths, strict=True))
    kept = [min(max(number, 0.0), 1.0) for number in found]
    if over or (len(kept) == 4 and (kept[2] <= kept[0] or kept[3] <= kept[1])):
        what = f'"{part["key"]}" is {short(str(part["box"]))} ({part["scale"]}), outside of its picture of '
        mend = "correct it, or what the source's `boxes` or its bbox_type says"
        raise row_error(where, f"{what}{size[0]:,} x {size[1]:,} pixels", mend, "box wrong")
    return kept


def has_typed_boxes(text: str) -> bool:
    """Whether a text has boxes in a way of writing that is nothing else; a bare list of numbers may be anything."""
    return ANY_TYPED.search(text) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or(names: Mapping[str, Any]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
