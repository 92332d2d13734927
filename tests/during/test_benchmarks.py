"""`evaluation:` in a recipe: benchmarks at each evaluation, the best checkpoint by one, and of the finished bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.benchmark_files import own_task
from support.benchmarks import PUBLISHED
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.during import benchmarks as while_training
from vlm_sft.metrics.intervals import mean_of
from vlm_sft.metrics.measures import MEASURES, Measured
from vlm_sft.pages.records import read_records
from vlm_sft.train import train

EACH_STEP = [
    "sft.eval_strategy=steps",
    "sft.save_strategy=steps",
    "sft.eval_steps=1",
    "sft.save_steps=1",
    "sft.max_steps=3",
]


@pytest.mark.slow
def test_a_benchmark_picks_the_best_checkpoint_and_the_bundle_is_asked_at_the_end(
    recipe_file, caption_file, tmp_path, monkeypatch
):
    PUBLISHED["gqa"](tmp_path / "gqa")
    source = {"path": caption_file, "format": "caption"}
    path = recipe_file(
        chat_template="ziya",
        data={"train": [source], "eval": [source]},
        evaluation={"benchmarks": ["gqa"], "data": str(tmp_path), "max_rows": 3, "batch_size": 2},
        generation={"max_new_tokens": 2},
    )
    shares, modes = iter([0.0, 0.2, 0.9, 0.4]), []  # the first is asked for the names of the scores
    real = MEASURES["gqa"]

    def measured(asked):  # an untrained model answers nothing right: scores are given to it
        share = next(shares, None)
        return (
            real(asked)
            if share is None
            else Measured([share] * len(asked), {"accuracy": mean_of([share] * len(asked))})
        )

    monkeypatch.setitem(MEASURES, "gqa", measured)
    asker = while_training.Asker
    monkeypatch.setattr(
        while_training, "Asker", lambda model, *more: modes.append(model.training) or asker(model, *more)
    )
    recipe = load_recipe(
        path, [*EACH_STEP, "sft.load_best_model_at_end=true", "sft.metric_for_best_model=gqa_accuracy"]
    )
    folder = train(recipe)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(0.9) and state["best_model_checkpoint"].endswith("checkpoint-2")
    logged = [
        row["eval_gqa_accuracy"]
        for row in json.loads((folder / "metrics.json").read_text())
        if "eval_gqa_accuracy" in row
    ]
    assert logged == pytest.approx([0.2, 0.9, 0.4]) and modes == [False] * 3
    assert len(read_records(folder / "evaluation" / "gqa.jsonl")) == 3
    assert json.loads((folder / "evaluation" / "gqa.json").read_text())["questions"] == 3


SAVES = ["sft.max_steps=4", "sft.save_strategy=steps", "sft.save_steps=2", "sft.load_best_model_at_end=true"]


@pytest.fixture
def asked_recipe(recipe_file, caption_file, tmp_path):
    """A recipe that asks a benchmark, with rows to evaluate on or without."""
    PUBLISHED["gqa"](tmp_path / "gqa")

    def make(*more, rows=False):
        source = {"path": caption_file, "format": "caption"}
        path = recipe_file(
            chat_template="ziya", generation={"max_new_tokens": 2},
            data={"train": [source], "eval": [source] if rows else []},
            evaluation={"benchmarks": ["gqa"], "data": str(tmp_path), "max_rows": 2, "samples": 0},
        )  # fmt: skip
        return path, more

    return make


def scored(monkeypatch, *shares):
    """Scores that are given to the evaluations while a run trains, in turn; the steps at which they were asked for."""
    left, steps = iter(shares), []

    def scores(self, benchmark, model, pupil):
        steps.append(pupil.trainer.state.global_step)
        return {"eval_gqa_accuracy": next(left)}

    monkeypatch.setattr(while_training.Benchmarks, "_scores", scores)
    return steps


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_every_save_is_evaluated_once_without_rows_and_the_best_is_kept_through_a_kill(
    asked_recipe, monkeypatch, tmp_path
):
    path, more = asked_recipe(*SAVES, "sft.max_steps=6", "sft.metric_for_best_model=gqa_accuracy")
    monkeypatch.setattr(while_training.Benchmarks, "finish", lambda self, folder: None)
    whole, killed = f"sft.output_dir={tmp_path}/whole", f"sft.output_dir={tmp_path}/killed"
    steps = scored(monkeypatch, 0.1, 0.7, 0.4)
    folder = train(load_recipe(path, [*more, whole]))
    assert steps == [2, 4, 6]

    class Killed(BaseException):
        """What nothing catches."""

    def dies():
        yield from (0.1, 0.7)
        raise Killed

    monkeypatch.setattr(while_training.Benchmarks, "_scores", _given(dies()))
    with pytest.raises(Killed):
        train(load_recipe(path, [*more, killed]))
    # What was trained is not lost, though it is not chosen yet.
    assert json.loads((tmp_path / "killed" / "trainer_state.json").read_text())["global_step"] == 6
    assert (tmp_path / "killed" / "bundle.json").is_file() and not (tmp_path / "killed" / "checkpoint-6").exists()
    steps = scored(monkeypatch, 0.4)
    again = train(load_recipe(path, [*more, killed]), resume=True)
    assert steps == [6]
    states = [json.loads((each / "trainer_state.json").read_text()) for each in (folder, again)]
    assert [Path(state["best_model_checkpoint"]).name for state in states] == ["checkpoint-4"] * 2
    assert states[0]["best_metric"] == states[1]["best_metric"] == pytest.approx(0.7)
    for at in (folder, again):
        best, last, end = (
            load_file(each / "trained.safetensors") for each in (at / "checkpoint-4", at / "checkpoint-6", at)
        )
        assert all(torch.equal(best[name], end[name]) for name in end)
        assert any(not torch.equal(last[name], end[name]) for name in end)
    scores = [
        [row["eval_gqa_accuracy"] for row in history(each) if "eval_gqa_accuracy" in row] for each in (folder, again)
    ]
    assert scores[0] == scores[1] == pytest.approx([0.1, 0.7, 0.4])


def _given(shares):
    return lambda self, benchmark, model, pupil: {"eval_gqa_accuracy": next(shares)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "at"),
    [
        (["sft.eval_strategy=no"], [2, 4]),
        (["sft.eval_strategy=steps", "sft.eval_steps=1"], [1, 2, 3, 4]),
        (["sft.eval_strategy=steps", "sft.eval_steps=3"], [2, 3, 4]),
        (["sft.eval_strategy=epoch"], [2, 4]),
        (["sft.eval_strategy=steps", "sft.eval_steps=3", "sft.save_strategy=epoch"], [2, 3, 4]),
        (["sft.save_strategy=no"], []),
    ],
)
def test_benchmarks_are_asked_at_saves_and_evaluations_and_never_twice_at_one(asked_recipe, monkeypatch, more, at):
    path, _ = asked_recipe(rows=True)
    finished = []
    monkeypatch.setattr(while_training.Benchmarks, "finish", lambda self, folder: finished.append(folder))
    steps = scored(monkeypatch, *[0.5] * 9)
    folder = train(load_recipe(path, [*SAVES[:3], "sft.per_device_train_batch_size=4", *more]))
    assert steps == at and finished == [folder]
    rows = [row["step"] for row in history(folder) if "eval_loss" in row]
    assert rows == (at or [4])  # what has rows is evaluated at the end, if it never was


def test_a_benchmark_that_is_not_there_stops_the_run_before_weights_are_read(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.training.build_trainer.build_trainer", lambda *more: pytest.fail("weights are read"))
    for benchmarks, said in (
        (["gqq"], 'there is no benchmark "gqq"'),
        ([own_task(tmp_path, path="gone.jsonl")], "gone.jsonl"),
    ):
        with pytest.raises(UserError, match=said):
            train(load_recipe(recipe_file(evaluation={"benchmarks": benchmarks})))


def test_a_recipe_names_at_least_one(recipe_file):
    with pytest.raises(UserError, match=r"evaluation\.benchmarks"):
        load_recipe(recipe_file(evaluation={"benchmarks": []}))
