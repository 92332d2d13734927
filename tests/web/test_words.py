"""What the page says: both languages, and the one that a browser asks for."""

from __future__ import annotations

import string

import pytest

from vlm_sft.web.words import LABELS, SENTENCES, is_chinese, sentence, translations


@pytest.mark.parametrize("name", [*LABELS, *SENTENCES])
def test_every_text_is_there_in_both_languages_with_the_same_places(name: str) -> None:
    english, chinese = (LABELS | SENTENCES)[name]
    assert english.isascii() and any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
    places = [
        [field for _, field, _, _ in string.Formatter().parse(each) if field is not None] for each in (english, chinese)
    ]
    assert places[0] == places[1]


def test_the_language_is_that_of_the_browser() -> None:
    assert is_chinese({"accept-language": "zh-CN,zh;q=0.9,en;q=0.8"}) and is_chinese({"accept-language": "ZH"})
    assert not any(map(is_chinese, ({}, {"accept-language": "en-GB,zh"}, {"accept-language": ""})))
    assert sentence("kept_good", True, "a/rows.jsonl", "3 行") == "已存入 a/rows.jsonl，共 3 行。"
    told = translations()
    assert (
        told["zh-CN"]["ask"] == "提问"
        and told["en"]["ask"] == "Ask"
        and set(told["en"]) == set(told["zh"]) == set(LABELS)
    )
