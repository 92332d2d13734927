"""`evaluation:` in a recipe: benchmarks at each evaluation, the best checkpoint by one, and of the finished bundle."""

from __future__ import annotations

import json

import pytest

from support.benchmarks import PUBLISHED, own_task
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
