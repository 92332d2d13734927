"""What files tell of a run: while it goes on, after a kill, of an earlier version, and when they are broken."""

from __future__ import annotations

import json
import os
import random
import time

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.watching.runs import read_run, read_runs


@pytest.fixture
def folder(tmp_path):
    (run := tmp_path / "运行").mkdir()
    lines = [{"step": 10, "loss": 2.0, "time": 100.0}, {"step": 20, "loss": "nan", "time": 130.0}]
    lines += [{"step": 20, "eval_loss": 1.5, "time": 140.0}]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    (run / "run.json").write_text(json.dumps({"step": 20, "max_steps": 120, "recipe": "a.yaml"}))
    return run


def test_a_run_that_goes_on_is_told_by_its_lock(folder):
    run = read_run(folder)
    assert (run.state, run.step, run.steps, run.name) == ("stopped", 20, 120, "运行") and run.seconds_left is None
    (folder / ".run.lock").write_text("{}")
    run = read_run(folder)
    assert run.state == "running" and run.seconds_left == pytest.approx(4.0 * 100)
    os.utime(folder / ".run.lock", (time.time() - 500,) * 2)
    assert read_run(folder).state == "stopped"
    (folder / "metrics.json").write_text("[]")
    assert read_run(folder).state == "finished"


def test_numbers_come_in_order_and_what_is_no_number_is_left_to_the_chart(folder):
    run = read_run(folder)
    assert run.series("eval_loss") == [(20, 1.5)] and run.series("gone") == []
    (first, second) = run.series("loss")
    assert first == (10, 2.0) and second[0] == 20 and second[1] != second[1]
    assert run.keys() == ["step", "loss", "time", "eval_loss"]


def test_a_run_of_an_earlier_version_is_read_from_its_metrics_or_its_newest_checkpoint(tmp_path):
    (old := tmp_path / "old").mkdir()
    (old / "metrics.json").write_text('[{"step": 1, "loss": NaN}, {"step": 2, "loss": 1.0}, {"train_runtime": 3}]')
    assert [step for step, _ in read_run(old).series("loss")] == [1, 2] and read_run(old).state == "finished"
    (killed := tmp_path / "killed" / "checkpoint-9").mkdir(parents=True)
    (killed.parent / "checkpoint-10").mkdir()
    (killed.parent / "checkpoint-10" / "trainer_state.json").write_text('{"log_history": [{"step": 5, "loss": 3.0}]}')
    assert read_run(killed.parent).series("loss") == [(5, 3.0)]


@pytest.mark.parametrize("broken", ["", "[", "[1, 2]", "null", '{"step": "x"}\n{"loss": 1}', "\x00\xff" * 9])
def test_files_that_are_broken_leave_gaps(folder, broken):
    for name in ("run.json", "samples.jsonl", "watch.jsonl", "metrics.json", "bundle.json"):
        (folder / name).write_text(broken)
    run = read_run(folder)
    assert run.series("loss") and run.samples == [] and run.strange == [] and run.steps == 0


def test_what_is_no_run_is_one_sentence(tmp_path):
    (tmp_path / "photos").mkdir()
    (file := tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{half")
    for path, said in (
        (tmp_path / "photos", "neither history.jsonl nor"),
        (tmp_path / "broken", "nothing in its metrics.json can be read; give"),
        (tmp_path / "gone", "no such folder"),
        (file, "it is a file; give"),
    ):
        with pytest.raises(UserError, match=said):
            read_run(path)


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "out").mkdir(parents=True)
        (tmp_path / parent / "out" / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    names = [run.name for run in read_runs([str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")])]
    assert len(set(names)) == 2 and read_runs([str(tmp_path / "a" / "out")])[0].name == "out"


ODD = (
    *(None, True, -1, 0, 10**15, 10**400, -(10**400), 5e-324, 1e-323, 1e308, -1e308, float("nan"), float("inf")),
    *(1e17, 1e17 + 16, "", "nan", "-inf", "x\x1b]52;c;aGk=\x07", "\ud800", [], [[1]], {}, {"rows": 10**400}),
    {"value": 10**400, "by": []},
)  # fmt: skip
KEYS = ("step", "loss", "time", "eval_loss", "eval_x", "learning_rate", "grad_norm", "id", "answer", "answers", "shown",
        "question", "score", "error", "images", "rows", "why", "max_steps", "best", "parts", "ledger", "train_rows",
        "batch", "device", "processes", "recipe")  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_whatever_stands_in_a_runs_files_its_page_is_made(tmp_path, seed):
    from vlm_sft.watching.page import run_page

    rng = random.Random(seed)

    def odd(depth=0):
        if depth < 2 and rng.random() < 0.3:
            return {rng.choice(KEYS): odd(depth + 1) for _ in range(3)} if rng.random() < 0.5 else [odd(depth + 1)]
        return rng.choice(ODD)

    def entry():
        step = {"step": rng.choice([1, 2, 3, 10**14])} if rng.random() < 0.9 else {}
        return {key: odd() for key in rng.sample(KEYS, 6)} | step

    for _ in range(12):
        for name in ("history.jsonl", "samples.jsonl", "watch.jsonl"):
            (tmp_path / name).write_text("".join(json.dumps(entry()) + "\n" for _ in range(6)))
        (tmp_path / "run.json").write_text(json.dumps(entry()))
        (tmp_path / "metrics.json").write_text(json.dumps([entry(), odd()]))
        (tmp_path / ".run.lock").write_text("")
        assert "</html>" in run_page([read_run(tmp_path), read_run(tmp_path)])
