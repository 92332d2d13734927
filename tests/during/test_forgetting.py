"""A run that spoils its language model says so at the evaluation where it shows, and keeps the checkpoint before."""

from __future__ import annotations

import json

import pytest

from support.bundles import log
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.during.while_training import WhileTraining
from vlm_sft.train import train

STEPS = ["sft.eval_strategy=steps", "sft.eval_steps=1", "sft.save_strategy=steps", "sft.save_steps=1"]


@pytest.fixture
def recipe(recipe_file, caption_file):
    def make(*more, **evaluation):
        source = {"path": caption_file, "format": "caption"}
        path = recipe_file(
            chat_template="ziya", train={"language_model": 0.5}, data={"train": [source], "eval": [source]},
            evaluation={"forgetting": True, "samples": 0, **evaluation},
        )  # fmt: skip
        return load_recipe(path, [*STEPS, *more])

    return make


@pytest.mark.slow
def test_what_is_lost_is_logged_and_warned_of_and_the_best_is_kept(recipe, capsys, tmp_path):
    (texts := tmp_path / "texts.jsonl").write_text('{"text": "zzz qqq xxx"}\n{"text": "狗狗"}\n', encoding="utf-8")
    best = ["sft.load_best_model_at_end=true", "sft.metric_for_best_model=text_loss"]
    folder = train(recipe("sft.max_steps=2", *best, forgetting_texts=str(texts), forgetting_limit=1.001))
    losses = {row["step"]: row["eval_text_loss"] for row in log(folder) if "eval_text_loss" in row}
    assert list(losses) == [1, 2] and len({*losses.values()}) == 2
    assert all(
        {"eval_text_perplexity_en", "eval_text_perplexity_zh"} <= row.keys()
        for row in log(folder)
        if "eval_text_loss" in row
    )
    noted = json.loads((folder / "bundle.json").read_text())["forgetting"]["before"]
    assert noted["loss"] not in losses.values() and set(noted["perplexity"]) == {"en", "zh"}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(losses.values())), "smaller is better"
    assert (
        "warning: the language model forgets: the perplexity of texts without pictures (en)" in capsys.readouterr().err
    )
    train(recipe("sft.max_steps=3", forgetting_texts=str(texts)), resume=True)
    assert json.loads((folder / "bundle.json").read_text())["forgetting"]["before"] == noted


def test_texts_are_read_before_weights_are_and_the_metric_needs_them(recipe):
    with pytest.raises(UserError, match=r"gone\.jsonl.* cannot be read"):
        WhileTraining(recipe(forgetting_texts="gone.jsonl"), print)
    with pytest.raises(UserError, match="measures 'text_loss'"):
        recipe("sft.metric_for_best_model=text_loss", forgetting=False)
    with pytest.raises(UserError, match=r"evaluation\.forgetting_limit"):
        recipe(forgetting_limit=0.5)
