"""What the rows of a file mean: the format in which most of its first rows can be read, and how its columns are called.

Nothing is guessed where two would do: names are looked at first, then what stands in the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import RowError, UserError
from ..base.names import Json, Values
from ..reading.image_kinds import PICTURES, kind_of
from ..rows.formats import examples_of

LOOKED_AT = 64  # rows of a file that are looked at
_NAMES = {
    "image": "image images img imgs image_path img_path image_file image_name image_url picture photo pic file "
             "filename file_name filepath file_path path url 图片 图像 照片 图片路径 文件 文件名 图",
    "caption": "caption captions text texts description desc title alt alt_text caption_text sentence sentences label "
               "annotation comment prompt 描述 说明 标题 文本 文字 内容 标注 图片描述",
    "question": "question questions query instruction ask 问题 提问 问 指令",
    "answer": "answer answers response reply multiple_choice_answer ground_truth gt label output 答案 回答 答 回复",
    "label": "label labels class classes category categories tag target breed species kind type 类别 标签 分类 种类 类",
}  # fmt: skip
NAMES = {ours: words.split() for ours, words in _NAMES.items()}
"""Ours → how people call such a column, the likeliest first."""
_CHATS = ("llava", "messages", "cauldron")
# Texts are classes where they are fewer than this share of the rows, and no longer than so many letters.
FEW_CLASSES, LONGEST_CLASS = 0.5, 40


class Guess(NamedTuple):
    """What rows mean.

    Attributes:
        format: A key of `FORMATS`.
        columns: Our name of a column → theirs, where they differ.
        labels: Whether the captions are classes.
    """

    format: str
    columns: tuple[tuple[str, str], ...] = ()
    labels: bool = False


def guess(rows: Sequence[Values]) -> Guess | None:
    """What rows mean; None where most can be read as nothing that is known.

    Args:
        rows: The first rows of a file, as they are written.
    """
    if not rows:
        return None
    candidates: list[tuple[str, dict[str, str]]] = [(name, {}) for name in _CHATS]
    if (questions := _columns(rows, "question", "answer")) is not None:
        candidates.append(("vqa", questions))
    labels = _columns(rows, "label")
    captions = _columns(rows, "caption")
    for columns in (captions, labels, _only_text(rows)):
        if columns is not None:
            candidates.append(("caption", columns))
    for name, columns in candidates:
        if sum(_reads(row, name, columns) for row in rows) * 2 > len(rows):
            theirs = columns.get("caption", "caption")
            classes = name == "caption" and _are_classes([row.get(theirs) for row in rows], theirs)
            return Guess(name, tuple(sorted(columns.items())), classes)
    return None


def _reads(row: Values, name: str, columns: Mapping[str, str]) -> bool:
    try:
        return bool(list(examples_of(row, name, where="", columns=columns, languages=False)))
    except RowError:
        return False


def _columns(rows: Sequence[Values], *wanted: str) -> dict[str, str] | None:
    """Ours → theirs for a picture's column and others by their names; None where one is missing."""
    there = {key: key.strip().lower() for row in rows for key in row}
    picture = _picture_column(rows, there)
    if picture is None:
        return None
    found = {} if picture in ("image", "images") else {"image": picture}
    for ours in wanted:
        names = [key for name in NAMES[ours] for key, said in there.items() if said == name and key != picture]
        theirs = next((key for key in names if _holds_text(rows, key)), None)
        if theirs is None:
            return None
        ours = "caption" if ours == "label" else ours
        if (
            theirs != ours
            and not (ours == "answer" and theirs == "answers")
            and theirs != {"caption": "text"}.get(ours)
        ):
            found[ours] = theirs
    return found


def _only_text(rows: Sequence[Values]) -> dict[str, str] | None:
    """Where a picture's column has one column of text beside it, that is what is learned."""
    there = {key: key.strip().lower() for row in rows for key in row}
    picture = _picture_column(rows, there)
    texts = [key for key in there if key != picture and _holds_text(rows, key) and there[key] not in ("id", "language")]
    if picture is None or len(texts) != 1:
        return None
    return {**({} if picture in ("image", "images") else {"image": picture}), "caption": texts[0]}


def _picture_column(rows: Sequence[Values], there: Mapping[str, str]) -> str | None:
    likely = [key for name in NAMES["image"] for key, said in there.items() if said == name]
    shown = [key for key in there if sum(_is_picture(row.get(key)) for row in rows) * 2 > len(rows)]
    return next((key for key in likely if key in shown), None) or next(iter(shown), None) or next(
        (key for key in likely if key.strip().lower() not in ("path", "url", "file", "text")), None
    )  # fmt: skip


def _is_picture(value: object) -> bool:
    """Whether a value names or is a picture, or several."""
    if isinstance(value, list):
        return bool(value) and _is_picture(value[0])
    if isinstance(value, Mapping):
        return any(_is_picture(value.get(key)) for key in ("bytes", "path", "image", "url"))
    if isinstance(value, bytes):
        return kind_of(value[:16]) is not None
    return isinstance(value, str) and (
        Path(value.split("?")[0]).suffix.lower() in PICTURES or value[:11] == "data:image/"
    )


def _holds_text(rows: Iterable[Values], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) not in (None, "", [])]
    texts = [value for value in values if isinstance(value, str | list | int) and not isinstance(value, bool)]
    return bool(values) and len(texts) == len(values)


def _are_classes(values: Sequence[object], name: str) -> bool:
    """Whether texts are names of classes: they come again and again and are short, or their column says so."""
    texts = [str(value).strip() for value in values if isinstance(value, str | int)]
    if not texts or len(texts) < len(values) or max(map(len, texts)) > LONGEST_CLASS:
        return False
    called_so = name.strip().lower() in NAMES["label"]
    return len(set(texts)) > 1 and len(set(texts)) <= max(2, len(texts) * FEW_CLASSES) and (called_so or len(texts) > 9)


def why_not(rows: Sequence[Values]) -> str | None:
    """Why rows are not learned although they could be read, or None.

    A table without a header has its first row for one, and texts without a letter are most often boxes.
    """
    first = rows[0] if rows else {}
    if any(isinstance(key, str) and Path(key.strip()).suffix.lower() in PICTURES for key in first):
        return "its first line looks like a row and not like a header: write one above it, such as image,caption."
    texts = [value for row in rows for value in row.values() if isinstance(value, str) and not _is_picture(value)]
    if texts and not any(letter.isalpha() for text in texts for letter in text) and any(" " in text for text in texts):
        return "its texts hold numbers alone (boxes?), and no words that could be learned."
    return None


def published_kind(document: object) -> str | None:
    """Which published data set a JSON document is; `answers` for the answers of VQAv2.

    Raises:
        UserError: It is COCO's, but holds boxes and no captions.
    """
    if not isinstance(document, dict) or not document:
        return None
    first = _first_of(document.get("annotations"))
    if "caption" in first and "image_id" in first:
        return "coco" if isinstance(document.get("images"), list) else "cc_sbu_align"
    if "question_id" in first and ("answers" in first or "multiple_choice_answer" in first):
        return "answers"
    if {"question_id", "image_id"} <= _first_of(document.get("questions")).keys():
        return "vqav2"
    if "bbox" in first or "segmentation" in first:
        raise UserError(
            "it holds boxes and masks of COCO, and no captions or questions; only those can be learned here."
        )
    entry = next(iter(document.values()))
    return "gqa" if isinstance(entry, dict) and {"question", "imageId", "answer"} <= entry.keys() else None


def _first_of(entries: object) -> Json:
    return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
