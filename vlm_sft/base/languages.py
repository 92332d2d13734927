"""Which language a text is in, as far as prompts and balance need it: Chinese, or not."""

from __future__ import annotations

import re

CHINESE, OTHER = "zh", "en"
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_KANA_HANGUL = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_]+")
_LONG = 2000  # characters that decide; a long conversation does not take longer


def language_of(text: str) -> str:
    """`zh` where there are at least as many Chinese characters as words of other scripts, else `en`.

    A Chinese sentence with a few Latin names in it is Chinese, an English one that quotes a sign is not. Text with
    Japanese kana or Korean letters is `en`, which stands for every other language: data in, say, German and Chinese
    says so in a `language` column.
    """
    text = text[:_LONG]
    if text.isascii():
        return OTHER
    others, runs = _HAN.subn(" ", text)
    chinese = len(text) - len(others) + runs
    if not chinese or _KANA_HANGUL.search(text):
        return OTHER
    return CHINESE if chinese >= len(_WORD.findall(others)) else OTHER
