"""The page in a real browser: curves, answers, and a stranger's words that stay words."""

from __future__ import annotations

import json

import pytest

from support.browser import EVIL, Elements, opened
from vlm_sft.during.samples import thumbnails
from vlm_sft.watching.page import asked_of, panels_of, run_page
from vlm_sft.watching.runs import read_run, read_runs


@pytest.fixture
def runs(tmp_path, photos):
    """Two runs, whose rows, names and files are as strange as files can be."""
    for number, name in enumerate(("一", "two<b>")):
        (folder := tmp_path / name).mkdir()
        lines = [
            {"step": step, "loss": 3.0 / step, "learning_rate": 1e-4, "learning_rate_lora": 1e-4,
             "learning_rate_projector": 1e-5, "tokens_per_second": 100.0, "data_wait_share": 0.1, "memory_gib": 1.5}
            for step in range(1, 30)
        ]  # fmt: skip
        lines += [{"step": 10, "eval_loss": 1.0, "eval_exact_match": 0.25 + number / 4, f"eval_{EVIL}": 1.0}]
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        parts = [{"part": "projector", "kind": EVIL, "total": 13_000_000, "trained": 13_000_000, "adapted": 0,
                  "dtypes": ["float32"], "learning_rate": 1e-4}]  # fmt: skip
        sources = {EVIL: {"read": 10, "used": 9, "truncated": 2, "rejected": {"broken": 1}}}
        facts = {"max_steps": 60, "step": 29, "recipe": EVIL, "parts": parts, "ledger": {"train": {"sources": sources}}}
        (folder / "run.json").write_text(json.dumps(facts))
        small = thumbnails([photos[0]])[0]
        samples = [
            {"step": step, "id": "a/1", "images": [photos[0], "/gone.png"], "shown": [small, EVIL], "question": EVIL,
             "answers": ["两只", "两只"], "answer": f"{EVIL} {step}", "score": float(step > 20)}
            for step in range(30)
        ]  # fmt: skip
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
        (folder / "watch.jsonl").write_text(json.dumps({"step": 4, "why": EVIL, "loss": 9.0, "rows": [[EVIL]]}) + "\n")
    return [str(tmp_path / name) for name in ("一", "two<b>")]


@pytest.mark.parametrize("count", [1, 2])
def test_a_browser_shows_it_and_obeys_nothing_that_a_run_says(runs, tmp_path, count):
    page = run_page(read_runs(runs[:count]), refresh=7)
    shown = Elements(opened(page, tmp_path, width=390 if count == 1 else 1280))
    assert ("meta", {"http-equiv": "refresh", "content": "7"}) in shown.tags
    names = [tag for tag, _ in shown.tags]
    assert "script" not in names and "b" in names and not [a for _, a in shown.tags if "onerror" in a]
    for text in ("Curves", "曲线", "Answers at each evaluation", "What is trained", "Rows", "Steps that went wrong"):
        assert text in shown.text
    assert shown.text.count(EVIL) >= 6 * count and "13.0M" in shown.text and "29 / 60" in shown.text
    pictures = [attributes["src"] for tag, attributes in shown.tags if tag == "img"]
    assert len(pictures) == count and pictures[0].startswith("data:image/jpeg;base64,")
    assert not [a for _, a in shown.tags for key in ("src", "href") if a.get(key, "data:")[:5] != "data:"]
    curves = [attributes for tag, attributes in shown.tags if tag == "path"]
    assert len([a for a in curves if "dashed" in a["class"]]) == (0 if count == 1 else 4)


def test_panels_are_those_that_a_run_measured(runs):
    titles = [panel.title for panel in panels_of([read_run(runs[0])])]
    assert titles[0] == "loss" and "learning rate" in titles and "exact match" in titles
    assert "gradient norm" not in titles and "token accuracy" not in titles
    (rates,) = (panel for panel in panels_of([read_run(runs[0])]) if panel.title == "learning rate")
    assert [drawn.line.label for drawn in rates.lines] == ["lora", "projector"]


def test_of_many_answers_the_first_the_last_and_some_between_are_shown(runs):
    (one,) = asked_of(read_run(runs[0]))
    assert len(one.said) == 12 and one.said[0][0] == 0 and one.said[-1][0] == 29 and one.hidden == 18
    assert one.answers == ["两只"] and one.said[-1][2] and not one.said[0][2] and len(one.pictures) == 1


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {"a": 1}, {"sources": {"a": 1}}, [{"dtypes": 1}]])
def test_facts_of_another_shape_are_left_out(runs, tmp_path, value):
    (folder := tmp_path / "odd").mkdir()
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    keys = ("parts", "best", "ledger", "train_rows", "max_steps", "recipe", "device", "batch", "step")
    (folder / "run.json").write_text(json.dumps(dict.fromkeys(keys, value)))
    for file in ("samples.jsonl", "watch.jsonl"):
        lines = {"images": value, "answers": value, "rows": value, "loss": value, "question": value, "step": 1}
        (folder / file).write_text(json.dumps(lines))
    assert "Curves" in run_page([read_run(folder)])


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / ".run.lock").write_text("{}")
    page = run_page([read_run(tmp_path)])
    assert "Nothing is logged yet" in page and "running" in page and 'http-equiv="refresh"' not in page


def test_no_picture_that_a_run_names_is_read(tmp_path, photos):
    links = [photos[0], "http://127.0.0.1/x.png", "data:image/svg+xml;base64,PHN2Zz4="]
    links += ['data:image/jpeg;base64,x" onerror=', "data:image/jpeg;base64," + "A" * 300_000, 3, None]
    lines = [{"step": 1, "id": "a", "images": [photos[0]], "shown": links, "answers": [], "answer": "a"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "<img" not in run_page([read_run(tmp_path)])
