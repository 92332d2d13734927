"""Scores in verdicts, and verdicts on disk."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.judging.server import Reply
from vlm_sft.judging.verdicts import Kept, key_of, scores_of


@pytest.mark.parametrize(
    ("verdict", "scores"),
    [
        ("8 7\nAssistant 1 …", [8, 7]),
        ("8.5 7", [8.5, 7]),
        ("\n  9, 10  \n因为…", [9, 10]),
        ("8分，7分。\n理由", [8, 7]),
        ("**８** ７", [8, 7]),
        ("(8; 7)", [8, 7]),
        ("[6、9]", [6, 9]),
        ("<think>8 9 maybe\n2 3</think>\n\n7 6", [7, 6]),
        ("Assistant 1: 8\nAssistant 2: 7", None),
        ("8/10 7/10", None),
        ("8 / 7", None),
        ("8", None),
        ("8 7 6", None),
        ("Scores: 8 7", None),
        ("85 90", None),
        ("0 7", None),
        ("11 7", None),
        ("-8 7", None),
        ("8 nan", None),
        ("87", None),
        ("<think>8 7", None),
        ("I cannot judge this.\n8 7", None),
        ("", None),
        ("8 7" + " " * 100_000 + "x", None),
    ],
)
def test_two_scores_stand_in_the_first_line_and_nothing_else(verdict, scores):
    assert scores_of(verdict, 2, 1, 10) == scores


def test_one_score_on_a_scale_of_ones_own():
    assert scores_of("4\n好", 1, 1, 5) == [4] and scores_of("6", 1, 1, 5) is None and scores_of("4 4", 1, 1, 5) is None


def test_the_judge_and_everything_it_was_asked_decide():
    messages = [{"role": "user", "content": "甲"}]
    base = key_of("m", messages, {"temperature": 0.2})
    assert base == key_of("m", [dict(messages[0])], {"temperature": 0.2}) and len(base) == 64
    others = [("n", messages, {"temperature": 0.2}), ("m", [{"role": "user", "content": "乙"}], {"temperature": 0.2}),
              ("m", messages, {"temperature": 0}), ("m", [*messages, *messages], {"temperature": 0.2}),
              ("m", [{"role": "system", "content": "甲"}], {"temperature": 0.2})]  # fmt: skip
    assert len({base, *(key_of(*other) for other in others)}) == 6


def test_verdicts_outlive_a_kill(tmp_path):
    path = tmp_path / "deep" / "verdicts.jsonl"
    with Kept(path) as kept:
        kept.add("a", "m", Reply("8 7\n好", 100, 10))
        kept.add("b", "m", Reply("half \ud83d", None, None))
    with path.open("ab") as stream:
        stream.write('{"key": "c", "text": "半'.encode()[:-1])
    with Kept(path) as kept:
        assert kept.replies == {"a": Reply("8 7\n好", 100, 10), "b": Reply("half ?", None, None)}
        kept.add("c", "m", Reply("9 9", 1, 1))
    assert [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"key": 1}', '{"key": "a", "text": "", "prompt_tokens": "x", "completion_tokens": 1}']
)
def test_a_file_that_is_no_verdicts_is_one_sentence(tmp_path, line):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1 is no verdict: remove the line"), Kept(path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"), Kept(tmp_path / "file" / "verdicts.jsonl"):
        pass
