"""What the page says, in English and Chinese: labels by the language of the browser, sentences by that of a request."""

from __future__ import annotations

from collections.abc import Mapping

LABELS: dict[str, tuple[str, str]] = {
    "title": ("Ask about pictures", "看图提问"),
    "pictures": ("Pictures", "图片"),
    "question": ("Question, in Chinese or English", "问题（中文或英文）"),
    "example": ("What is in the picture?", "图中有什么？"),
    "blank": ("Also ask with the pictures blanked", "同时用空白图片再问一次"),
    "blank_info": (
        "An answer that stays the same did not come from the pictures.",
        "如果回答不变，说明模型没有看图。",
    ),
    "ask": ("Ask", "提问"),
    "stop": ("Stop", "停止"),
    "answer_blank": ("With the pictures blanked", "图片换成空白时"),
    "good": ("Keep as good", "留作好答案"),
    "bad": ("Keep as bad", "留作坏答案"),
    "note": ("What was done", "结果"),
    "correct": ("Correct the answer in its box before you keep it.", "保存前可以直接在框里改正答案。"),
}
"""Name of a label → the English and the Chinese one."""

SENTENCES: dict[str, tuple[str, str]] = {
    "no_question": ("Write a question or give a picture.", "请写下问题或放入图片。"),
    "nothing": ("There is no answer here yet: ask first.", "这里还没有回答：请先提问。"),
    "unfinished": (
        "The answer is still being written: wait for its end, or stop it.",
        "回答还没有写完：请等它结束，或先停止。",
    ),
    "no_answer": (
        "The answer is empty: write the right one in its box, then keep it.",
        "答案是空的：请在框里写下正确答案，再保存。",
    ),
    "kept_good": ("Kept in {}: {}.", "已存入 {}，共 {}。"),
    "kept_bad": (
        "Kept as bad in {}: {}. Correct the answer and keep it again to train on it.",
        "已作为坏答案存入 {}，共 {}。改正后再保存即可用于训练。",
    ),
    "again": ("It is in {} already: {}.", "{} 中已有这一行，共 {}。"),
    "too_long": (
        "The text has {:,} characters; at most {:,} are taken: shorten it.",
        "文字有 {:,} 个字符，最多 {:,} 个：请缩短。",
    ),
    "length": ("It ends at the most tokens of an answer.", "已达到回答的长度上限。"),
}
"""What the server says of itself; sentences on pictures are those of the command line, by `spoken.catalogue`."""


def translations() -> dict[str, dict[str, str]]:
    """The labels for Gradio's `I18n`: by language of the browser."""
    english = {name: both[0] for name, both in LABELS.items()}
    chinese = {name: both[1] for name, both in LABELS.items()}
    return {"en": english, **dict.fromkeys(("zh", "zh-CN", "zh-TW"), chinese)}


def sentence(name: str, chinese: bool, *values: object) -> str:
    """One of `SENTENCES` with its values."""
    return SENTENCES[name][chinese].format(*values)


def is_chinese(headers: Mapping[str, str]) -> bool:
    """Whether a browser would rather read Chinese than English."""
    first = headers.get("accept-language", "").partition(",")[0].strip().lower()
    return first.startswith("zh")
