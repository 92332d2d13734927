"""Many prompts before a judge: a few at a time, each once, what it cost, and what stops it."""

from __future__ import annotations

import json
import time

import pytest

from vlm_sft.base.console import make_console
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.judging.judge import Judge, ask_all


def prompts(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def ask(judge, given, path, **settings):
    return ask_all(judge, given, {"temperature": 0.2, **settings}, path, make_console())


def test_each_is_asked_once_and_found_again(double, tmp_path):
    judge, path = Judge(double.url, "m", price=(2.5, 10), settings={"max_tokens": 5}), tmp_path / "verdicts.jsonl"
    replies, cost = ask(judge, prompts("甲", "b", "甲"), path)
    assert [reply.text for reply in replies] == ["8 7\n甲", "8 7\nb", "8 7\n甲"]
    assert len(double.asked) == 2 and all(one["max_tokens"] == 5 and one["temperature"] == 0.2 for one in double.asked)
    report = cost.report(judge.price)
    assert report == {"asked": 2, "kept": 0, "prompt_tokens": 200, "completion_tokens": 20, "uncounted": 0,
                      "paid_prompt_tokens": 200, "paid_completion_tokens": 20, "cost": 0.0007,
                      "paid": 0.0007}  # fmt: skip
    again, cost = ask(judge, prompts("甲", "b", "c"), path)
    assert len(double.asked) == 3 and again[:2] == replies[:2]
    report = cost.report(judge.price)
    assert (report["asked"], report["kept"], report["cost"], report["paid"]) == (1, 2, 0.00105, 0.00035)
    ask(Judge(double.url, "another"), prompts("甲"), path)
    assert len(double.asked) == 4 and "cost" not in cost.report(None)


def test_no_more_at_a_time_than_wanted(double, tmp_path):
    double.seconds = 0.02
    ask(Judge(double.url, "m", requests=3), prompts(*map(str, range(12))), tmp_path / "v.jsonl")
    assert double.most_at_once == 3 and len(double.asked) == 12


def test_tokens_that_the_server_does_not_count_are_said(double, tmp_path):
    double.usage = None
    _, cost = ask(Judge(double.url, "m"), prompts("a"), tmp_path / "v.jsonl")
    assert cost.uncounted == 1 and cost.prompt_tokens == 0


def test_what_came_before_a_failure_is_kept(double, tmp_path):
    path = tmp_path / "v.jsonl"
    double.next = [double.completion({"model": "m", "messages": [{"content": "a"}]}), (404, {}, b"")]
    with pytest.raises(UserError, match="answers 404"):
        ask(Judge(double.url, "m", requests=1), prompts("a", "b", "c"), path)
    assert len(double.asked) == 2 and len(path.read_text(encoding="utf-8").splitlines()) == 1
    ask(Judge(double.url, "m", requests=1), prompts("a", "b", "c"), path)
    assert len(double.asked) == 4


def test_nobody_waits_for_a_server_that_hangs_once_another_answer_failed(double, tmp_path):
    double.says = lambda prompt: time.sleep(5) or "8 7"
    double.next = [(404, {}, b"")]
    began = time.monotonic()
    with pytest.raises(UserError, match="answers 404"):
        ask(Judge(double.url, "m", requests=4), prompts(*"abcdefgh"), tmp_path / "v.jsonl")
    assert time.monotonic() - began < 3 and len(double.asked) <= 4


def test_a_prompt_that_is_refused_leaves_the_others(double, tmp_path):
    double.next = [(400, {}, b'{"error": "too long"}')]
    replies, cost = ask(Judge(double.url, "m", requests=1), prompts("a", "b", "a"), tmp_path / "v.jsonl")
    assert isinstance(replies[0], RowError) and replies[0] is replies[2] and replies[1].text == "8 7\nb"
    assert (cost.asked, cost.kept) == (1, 0)


@pytest.mark.parametrize("count", [2, 30])
def test_a_server_that_refuses_everything_stops_it(double, tmp_path, count):
    double.next = [(400, {}, json.dumps({"error": {"message": "max_tokens is not supported"}}).encode())] * 30
    with pytest.raises(UserError, match=r"max_tokens is not supported.*correct --judge-set"):
        ask(Judge(double.url, "m", requests=1), prompts(*map(str, range(count))), tmp_path / "v.jsonl")
    assert len(double.asked) <= 10


def test_a_wrong_address_is_known_before_anything_is_done():
    with pytest.raises(UserError, match="--judge is no URL"):
        Judge("localhost", "m")
