"""Answers before a judge: what it is asked is LLaVA's to the letter, in both orders and languages."""

from __future__ import annotations

import pytest

from support.benchmarks import AUTHORS, PUBLISHED
from support.chat_server import ChatServerDouble
from vlm_sft.base.console import make_console
from vlm_sft.evaluation.benchmark import read_benchmarks
from vlm_sft.evaluation.tasks import Judging, load_task, render_prompt
from vlm_sft.judging.judge import Judge
from vlm_sft.judging.reviews import in_words, review

RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with {}\n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)  # LLaVA, llava/eval/table/rule.json
WILD = RULE.format("a few sentences describing the image. ")
COCO = RULE.format(
    "five descriptive sentences describing the same image and the bounding box coordinates of each object in the "
    "scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with floating numbers "
    "ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, and bottom right y. "
)


def record(number, answer="some answer", **keys):
    return {"id": number, "answers": ["the reference"], "answer": answer, "answer_blank": None, "kind": "conv"} | keys


def judged(double, tmp_path, records, rules, columns, **judge):
    found = review(records, columns, rules, render_prompt, Judge(double.url, "m", requests=1, **judge),
                   tmp_path / "v.jsonl", make_console())  # fmt: skip
    return found, [each["messages"] for each in double.asked]


@pytest.mark.parametrize("name", ["llava_bench", "llava_bench_coco"])
@pytest.mark.parametrize("writers", [PUBLISHED, AUTHORS])
def test_the_judge_is_asked_in_llavas_words(name, writers, tmp_path):
    writers[name](tmp_path)
    one = read_benchmarks([name], str(tmp_path))[0]
    first = one.asked[0]
    with ChatServerDouble() as double:
        records = [record(first.id, answers=first.answers, answer="A cat.")]
        _, asked = judged(double, tmp_path, records, one.task.judge, {first.id: first.columns})
    context, rule = (
        ("A bay.\nSunny.", WILD)
        if name == "llava_bench"
        else ("A cat.\nTwo cats.\n\ncat: [0.1, 0.2, 0.3, 0.4]\ncat: [0.5, 0.5, 0.75, 1.0]", COCO)
    )
    if name == "llava_bench" and writers is PUBLISHED:
        context = "A bay."

    def content(one, two):
        # LLaVA, llava/eval/eval_gpt_review_bench.py and eval_gpt_review_visual.py
        return (f"[Context]\n{context}\n\n[Question]\n{first.text}\n\n[Assistant 1]\n{one}\n\n[End of Assistant 1]\n\n"
                f"[Assistant 2]\n{two}\n\n[End of Assistant 2]\n\n[System]\n{rule}\n\n").strip()  # fmt: skip

    system = {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    reference = first.answers[0]
    assert asked == [[system, {"role": "user", "content": content(reference, "A cat.")}],
                     [system, {"role": "user", "content": content("A cat.", reference)}]]  # fmt: skip


def test_chinese_is_judged_in_chinese(tmp_path):
    PUBLISHED["llava_bench_zh"](tmp_path)
    one = read_benchmarks(["llava_bench_zh"], str(tmp_path))[0]
    with ChatServerDouble() as double:
        records = [record(one.asked[0].id, answer="一只猫")]
        _, asked = judged(double, tmp_path, records, one.task.judge, {one.asked[0].id: one.asked[0].columns})
    said = asked[0][1]["content"]
    assert said.startswith(
        "[描述]\n海湾。\n\n[问题]\n这是哪里？\n\n[助手 1]\nthe reference\n\n[助手 1 结束]\n\n[助手 2]\n一只猫\n"
    )
    assert all(word in said for word in ("有帮助", "切题", "准确", "详细", "1 到 10")) and said.endswith(
        "影响你的判断。"
    )


def test_both_orders_the_blank_and_what_names_no_scores(tmp_path):
    rules = Judging(prompt="{{ question }} {{ first }} / {{ second }}", system=None)
    said = {"reference": "8 6", "some": "5 9", "blank": "thanks"}
    with ChatServerDouble(lambda prompt: said[prompt.split()[1]]) as double:
        records = [
            record("1", answers=["reference one"], answer_blank="blank one"),
            record("2", error="its picture is gone"),
        ]
        found, asked = judged(
            double, tmp_path, records, rules, {"1": {"question": "为什么"}, "2": {"question": "?"}}, price=(1, 1)
        )
    assert len(asked) == 4 and asked[1] == [{"role": "user", "content": "为什么 some answer / reference one"}]
    assert records[0]["verdicts"] == [
        {"order": "reference first", "reference": 8.0, "answer": 6.0, "text": "8 6"},
        {"order": "answer first", "reference": 9.0, "answer": 5.0, "text": "5 9"},
    ]
    assert records[0]["verdicts_blank"][1] == {
        "order": "answer first",
        "reference": None,
        "answer": None,
        "text": "thanks",
    }
    assert records[1]["verdicts"] is records[1]["verdicts_blank"] is None
    assert (found["verdicts"], found["unparsable"], found["refused"]) == (4, 1, 0)
    assert in_words(found) == (
        "Judged by m: 4 verdicts (4 asked for now), 400 tokens asked and 40 answered, which cost 0.00044 (0.00044 "
        "now); 1 name no scores, and count nowhere."
    )


def test_a_judge_of_ones_own_scores_an_answer_alone(tmp_path):
    rules = Judging(prompt="{{ kind }}: {{ answer }} ({{ row.hint }})", compare=False, scale=[1, 5], settings={})
    with ChatServerDouble(lambda prompt: "4") as double:
        records = [record("1", answers=[])]
        found, asked = judged(double, tmp_path, records, rules, {"1": {"row": {"hint": "看图"}}}, settings={"seed": 1})
    assert asked == [[{"role": "user", "content": "conv: some answer (看图)"}]] and double.asked[0]["seed"] == 1
    assert records[0]["verdicts"] == [{"order": "alone", "reference": 5.0, "answer": 4.0, "text": "4"}]
    assert found["settings"] == {"seed": 1}


def test_a_refused_verdict_says_why(tmp_path):
    rules = Judging(prompt="{{ first }} / {{ second }}")
    with ChatServerDouble() as double:
        double.next = [(400, {}, b'{"error": "too long"}')]
        records = [record("1")]
        found, _ = judged(double, tmp_path, records, rules, {"1": {}})
    assert found["refused"] == 1 and found["unparsable"] == 0 and "too long" in found["first"]
    assert "too long" in records[0]["verdicts"][0]["error"] and records[0]["verdicts"][0]["answer"] is None


def test_the_rules_that_ship_say_both_orders():
    for name in ("llava_bench", "llava_bench_coco", "llava_bench_zh"):
        rules = load_task(name)[1].judge
        assert rules.compare and rules.scale == [1, 10] and rules.settings == {"temperature": 0.2, "max_tokens": 1024}
