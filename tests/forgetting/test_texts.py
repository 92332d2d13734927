"""The texts that ship, those of one's own, and what is wrong with a file in one sentence."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.base.words import language_of
from vlm_sft.forgetting.texts import Asked, read_texts


def test_those_that_ship_are_english_and_chinese_and_no_text_is_there_twice():
    found = read_texts()
    assert found.name == "everyday" and set(found.texts) == {"en", "zh"}
    texts = [(language, text) for language, some in found.texts.items() for text in some]
    assert len(texts) == len(set(texts)) >= 40 and all(language_of(text) == language for language, text in texts)
    assert len(found.questions) >= 12 and all(asked.answers for asked in found.questions)
    assert read_texts("everyday").mark == found.mark


def test_one_s_own_may_leave_out_languages_and_answers(tmp_path):
    lines = [{"text": "a dog"}, {"text": "一只狗在跑"}, {"text": "ein Hund", "language": "de"}, {"question": "why?"}]
    lines += [{"question": "几点?", "answers": "三点"}]
    (path := tmp_path / "我的.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = read_texts(str(path))
    assert found.texts == {"en": ["a dog"], "zh": ["一只狗在跑"], "de": ["ein Hund"]}
    assert found.questions == [Asked("why?"), Asked("几点?", ("三点",))] and found.mark != read_texts().mark


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "line 1 is no JSON"),
        ('{"text": "a"}\n[1]', "line 2 is no object"),
        ('{"text": "a", "question": "b"}', "needs a `text` or a `question`, one of them"),
        ('{"words": "a"}', "needs a `text` or a `question`"),
        ('{"text": "  "}', "`text` must be text that is not empty"),
        ('{"question": 3}', "`question` must be text"),
        ('{"question": "a", "answers": [1]}', "`answers` must be a list of texts"),
        ('{"text": "a", "language": "x y"}', "`language` must be a short name"),
        ('{"question": "a"}', "has no text"),
        ("", "has no text"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, said):
    (path := tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_texts(str(path))


def test_a_file_that_is_not_there_or_no_file_is_one_sentence(tmp_path):
    for path, said in ((tmp_path / "gone.jsonl", "cannot be read"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=said):
            read_texts(str(path))
