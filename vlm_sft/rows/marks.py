"""The places of images in a text, as other formats mark them → `<image>`, and the row's images in their order.

Qwen-VL writes the file itself (`<img>photos/1.jpg</img>`), Phi and MMMU number the images (`<|image_1|>`,
`<image 1>`), MiniCPM names them (`<image_00>`, a key of the row's `image`), others have one word for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..base.names import IMAGE_TOKEN, VIDEO_TOKEN, Json, Values
from .raw_row import RowView, is_given

_MARK = re.compile(
    r"<img>(?P<file>[^<>\n]{1,1000})</img>"
    r"|<\|image_(?P<number>\d{1,3})\|>|<image[ _-]?(?P<other>\d{1,3})>"
    r"|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image\|>|<image_placeholder>|<ImageHere>|<Image>|<IMAGE>"
)
_VIDEO_MARK = re.compile(
    r"<\|vision_start\|><\|video_pad\|><\|vision_end\|>|<\|video\|>|<video_placeholder>|<VideoHere>|<Video>|<VIDEO>"
)
_TURNS = ("messages", "conversations", "conversation", "texts")
_SAID = ("content", "value", "human", "user")
_ASKED = ("prompt", "query", "instruction", "input", "question")
_ANSWERS = ("assistant", "gpt", "bot", "model", "chatbot", "chatgpt")


def read_marks(row: RowView) -> None:
    """Puts `<image>` in place of another format's marks, in `row.values`, and the images there in the marks' order.

    A row that has no images, or `<image>` too, says other marks as text; files named in the text are always images.
    The words for a video become `<video>` likewise.

    Raises:
        RowError: the marks name images that the row does not have, or leave some out.
    """
    texts = list(_asked(row.values))
    filmed = any(is_given(row.values.get(name)) for name in ("videos", "video"))
    if filmed and not any(VIDEO_TOKEN in text for text in texts):
        row.values = _replaced(row.values, _VIDEO_MARK, VIDEO_TOKEN)
        texts = list(_asked(row.values))
    marks = [mark for text in texts for mark in _MARK.finditer(text)]
    files = [mark["file"].strip() for mark in marks if mark["file"]]
    key = next((name for name in ("images", "image") if is_given(row.values.get(name))), "images")
    given = row.values.get(key)
    if not marks or (not files and (not is_given(given) or any(IMAGE_TOKEN in text for text in texts))):
        return
    if files and (is_given(given) or len(files) < len(marks)):
        what = "the text names the files of images (<img>…</img>), and others are given beside them"
        raise row.error(what, "give all of them in one way", "marks differ")
    row.values = {**_replaced(row.values, _MARK, IMAGE_TOKEN), key: files or _in_order(row, key, given, marks)}


def _in_order(row: RowView, key: str, given: object, marks: list[re.Match[str]]) -> list[Any]:
    """The row's images as their marks come; one may come twice, and none may be left out."""
    images = given if isinstance(given, dict) else list(given) if isinstance(given, list | tuple) else [given]
    numbers = [int(mark["number"] or mark["other"]) for mark in marks if mark["number"] or mark["other"]]
    names: list[Any] = [mark.group() for mark in marks]
    if isinstance(given, dict) and not set(names) & set(given):  # an image that says more of itself
        images = [given]
    if isinstance(images, list):
        begin = 0 if 0 in numbers else 1
        names = [number - begin for number in numbers] if len(numbers) == len(marks) else list(range(len(marks)))
    there = set(images if isinstance(images, dict) else range(len(images)))
    if set(names) != there:
        shown = " ".join(mark.group() for mark in marks[:8])
        what = f'its text marks images as {shown}, which are not the {len(images)} of "{key}"'
        raise row.error(what, "give every mark its image", "marks differ")
    return [images[name] for name in names]


def _asked(values: Values) -> Iterator[str]:
    """Every text that is not an answer and may hold a mark."""
    for name in _TURNS:
        turns = values.get(name)
        for turn in turns if isinstance(turns, list) else ():
            for key, text in turn.items() if isinstance(turn, dict) else ():
                if isinstance(text, str) and "<" in text and key in _SAID and _is_asked(turn):
                    yield text
    for key, text in values.items():
        if isinstance(text, str) and "<" in text and key in _ASKED:
            yield text


def _is_asked(turn: object) -> bool:
    return isinstance(turn, dict) and str(turn.get("role") or turn.get("from")).lower() not in _ANSWERS


def _replaced(values: Values, mark: re.Pattern[str], token: str) -> Json:
    def of(entry: Values, keys: tuple[str, ...]) -> Json:
        return {k: mark.sub(token, v) if k in keys and isinstance(v, str) else v for k, v in entry.items()}

    found = of(values, _ASKED)
    for name in _TURNS:
        if isinstance(turns := found.get(name), list):
            found[name] = [of(turn, _SAID) if _is_asked(turn) else turn for turn in turns]
    return found
