"""Boxes in rows: ms-swift's `objects`, columns of boxes, and boxes typed in text → parts of a message.

A part keeps the numbers as the row has them, with what they count (`SCALES`): no picture is opened here, and how they
are written depends on the model. What nobody says is not guessed: typed boxes are text until the source's `boxes` says
what their numbers count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..base.names import Json
from ..base.words import kind, short
from .box import SCALES, check_image, checked_box, either, is_number, only_image
from .messages import Message, Part, ref_part, text_part
from .raw_row import RowView, is_given

AS_WRITTEN = "as_written"  # the source says that boxes typed in text stay the text that they are
BBOX_TYPES = {"real": "pixels", "norm1": "unit", "norm1000": "thousand"}  # ms-swift's words
BOX_MARK, REF_MARK = "<bbox>", "<ref-object>"
LOCATIONS = 1024  # steps of PaliGemma's location tokens on each side

_NAMES = ("ref", "bbox", "bbox_type", "image_id")
_OF_OLDER_SWIFT = {"caption": "ref", "label": "ref", "bbox_2d": "bbox", "image": "image_id"}

_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_N = rf"\s*{_NUMBER}\s*"
_PAIR = rf"\({_N},{_N}\)"
_FOUR = rf"{_N},{_N},{_N},{_N}"
TYPED = re.compile(
    r"(?:<\|object_ref_start\|>(?P<ref1>.*?)<\|object_ref_end\|>|<ref>(?P<ref2>.*?)</ref>)"
    rf"|(?:<\|box_start\|>\s*(?P<pairs1>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*<\|box_end\|>"
    rf"|<box>\s*(?P<pairs2>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*</box>)"
    rf"|(?:<box>|<\|box_start\|>)\s*\[(?P<inner>{_FOUR})\]\s*(?:</box>|<\|box_end\|>)"
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
            check_image(row, part["image"], images, part["key"])
        elif given is None and images and part["text"] and (BOX_MARK in part["text"] or REF_MARK in part["text"]):
            what = f"the messages have {BOX_MARK} or {REF_MARK}, but the row has no boxes"
            raise row.error(what, "give it `objects`, or remove the marks", "marks differ")
    if given is None and not typed:
        return messages
    found: dict[str, Iterator[Part]] = {}
    if given is not None:
        said = _texts(messages)
        for mark, parts, what in ((BOX_MARK, given.boxes, "boxes"), (REF_MARK, given.refs, "words for them (ref)")):
            if (marks := said.count(mark)) != len(parts):
                problem = f"the messages have {mark} {marks} times, but the row has {len(parts)} {what}"
                raise row.error(problem, f"write {mark} where each of them belongs", "marks differ")
            found[mark] = iter(parts)
    scale = scale if typed else None
    return [_placed(row, message, index, images, scale, found) for index, message in enumerate(messages)]


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
        raise row.error(what, f"set the source's `boxes` to {either(SCALES)}", "box unclear")
    values = _listed(row, row.values[column], column)
    return Given([checked_box(row, box, scale, only_image(row, key, images), key, images) for key, box in values], [])


def _objects(row: RowView, objects: object, images: int, scale: str | None) -> Given | None:
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
            raise row.error(what, f"it must be {either(BBOX_TYPES)}", "box unclear")
        scale = BBOX_TYPES.get(own) or str(own)
    elif scale is None:
        scale = "pixels"  # what ms-swift says of rows that do not
        every = [number for _, box in values for number in box]
        if every and all(is_number(number) and number <= 1 for number in every):
            what = 'no number of "objects.bbox" is above 1, and without a "bbox_type" they would count pixels'
            raise row.error(what, 'write "bbox_type": "norm1", or set the source\'s `boxes`', "box unclear")
    numbers = fields.get("image_id")
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers] * len(values)
    if len(numbers) > len(values) or any(type(number) is not int for number in numbers):
        what = '"objects.image_id" is no list of numbers, one for each box'
        raise row.error(what, "count the images from 0", "wrong type")
    numbers += [0] * (len(values) - len(numbers))  # as ms-swift has it
    boxes = [checked_box(row, box, scale, n, key, images) for (key, box), n in zip(values, numbers, strict=True)]
    refs = fields.get("ref")
    refs = refs if isinstance(refs, list) else [] if refs is None else [refs]
    return Given(boxes, [ref_part(row.text(ref, f"objects.ref[{i}]")) for i, ref in enumerate(refs)])


def _fields(row: RowView, objects: Any) -> Json:
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


def _listed(row: RowView, value: object, key: str) -> list[tuple[str, Sequence[Any]]]:
    """(place in the row, numbers) of each box; four numbers alone are one box."""
    value = [] if value is None else value
    if isinstance(value, list | tuple) and value and all(is_number(number) for number in value):
        return [(key, value)]
    if not isinstance(value, list | tuple) or any(not isinstance(box, list | tuple) for box in value):
        raise row.error(f'"{key}" is no list of boxes', "write [[x1, y1, x2, y2], …]")
    return [(f"{key}[{index}]", box) for index, box in enumerate(value)]


def _texts(messages: Sequence[Message]) -> str:
    return "".join(part["text"] for m in messages for part in m["content"] if part["type"] == "text")


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
            parts.append(checked_box(row, box, own, only_image(row, place, images), place, images))
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
    lists, pairs = match["list"] or match["lists"] or match["inner"], match["pairs1"] or match["pairs2"]
    for piece in re.split(r";|\]\s*,\s*\[", lists) if lists else [pairs or match["point"]]:
        said = re.findall(_NUMBER, piece)
        yield [int(number) if re.fullmatch(r"-?\d+", number) else float(number) for number in said], scale


def has_typed_boxes(text: str) -> bool:
    """Whether a text has boxes in a way of writing that is nothing else; a bare list of numbers may be anything."""
    return ANY_TYPED.search(text) is not None
