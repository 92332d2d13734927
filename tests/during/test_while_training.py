"""A run is asked at its evaluations: it goes on as if it were not, keeps what answered best, and stops by it."""

from __future__ import annotations

import json

import pytest

from support.bundles import log
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.run_folder import read_lines
from vlm_sft.during import own_rows
from vlm_sft.during.while_training import WhileTraining
from vlm_sft.metrics.intervals import mean_of
from vlm_sft.metrics.measures import Measured
from vlm_sft.train import train

NO_ROWS = ["data.eval=[]"]
STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def asked_recipe(recipe_file, caption_file):
    """A recipe that evaluates at every step, with LoRA whose dropout draws numbers."""

    def make(name="recipe", steps=3, more=(), **evaluation):
        source = {"path": caption_file, "format": "caption"}
        path = recipe_file(
            name, chat_template="ziya", lora={"r": 2, "lora_dropout": 0.5}, evaluation=evaluation,
            data={"train": [source], "eval": [source]}, generation={"max_new_tokens": 3},
        )  # fmt: skip
        settings = [f"sft.{key}={value}" for key, value in STEPS.items()]
        return load_recipe(path, [*settings, f"sft.max_steps={steps}", *more])

    return make


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["quantization={load_in_4bit: true}"]], ids=["whole", "4 bits"])
def test_a_run_that_is_asked_is_bit_for_bit_the_run_that_is_not(asked_recipe, more):
    bare = train(asked_recipe("bare", more=more, samples=0))
    asked = train(asked_recipe("asked", more=more, samples=3, metrics=["exact_match", "contains"]))
    assert (asked / "trained.safetensors").read_bytes() == (bare / "trained.safetensors").read_bytes()
    assert (asked / "adapter_model.safetensors").read_bytes() == (bare / "adapter_model.safetensors").read_bytes()
    losses = [
        [row[key] for row in log(folder) for key in ("loss", "eval_loss") if key in row] for folder in (bare, asked)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert not (bare / "samples.jsonl").exists()
    samples = read_lines(asked / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    ids = [row["id"] for row in samples]
    assert ids == ids[:3] * 4 and len(set(ids)) == 3
    assert len({row["answer"] for row in samples}) > 1 and all(row["answers"] and row["images"] for row in samples)
    measured = [row for row in log(asked) if "eval_exact_match" in row]
    assert [row["step"] for row in measured] == [1, 2, 3] and all("eval_contains" in row for row in measured)


@pytest.mark.slow
def test_answers_choose_the_best_checkpoint_and_end_the_run(asked_recipe, monkeypatch, capsys):
    shares = iter([0.0, 0.2, 0.9, 0.4, 0.9, 0.5, 0.6])  # the first is asked of what packages are there

    def measured(asked):
        share = next(shares)
        return Measured([share] * len(asked), {"exact_match": mean_of([share] * len(asked))})

    monkeypatch.setitem(own_rows.MEASURES, "exact_match", measured)
    monkeypatch.setattr(own_rows.OwnRows, "names", ["exact_match"])
    more = ["sft.load_best_model_at_end=true", "sft.metric_for_best_model=exact_match"]
    folder = train(asked_recipe(steps=9, more=more, samples=0, patience=2))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(0.9) and state["best_model_checkpoint"].endswith("checkpoint-2")
    assert state["global_step"] == 4
    assert "no better by eval_exact_match in 2 evaluations" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_answers_so_far_and_forgets_later_ones(asked_recipe):
    first = asked_recipe(steps=2, samples=2)
    folder = train(first)
    lost = {"step": 7, "id": "x", "answer": "of a step that was never saved"}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(lost) + '\n{"step": 3, "id"')
    train(asked_recipe(steps=3, samples=2), resume=True)
    assert [row["step"] for row in read_lines(folder / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_a_recipe_asks_for_is_there(asked_recipe):
    for more, evaluation, said in (
        (["sft.metric_for_best_model=exakt_match"], {}, r'measures \'exakt_match\'; did you mean "exact_match"\?'),
        (["sft.metric_for_best_model=gqa_accuracy"], {}, "measures 'gqa_accuracy'.*loss, token_accuracy"),
        (["sft.metric_for_best_model=精确"], {}, "it can be one of these: loss"),
        (["sft.metric_for_best_model=eval_captions_CIDER"], {}, "measures 'eval_captions_CIDER'.*captions_ROUGE-L"),
        ([], {"patience": 2}, "needs `sft.metric_for_best_model`"),
        ([], {"metrics": ["exact"]}, "evaluation.metrics.0"),
        (["data.eval=[]", "sft.eval_strategy=no"], {"metrics": ["contains"]}, "`data.eval`, which has no source"),
        (["data.eval=[]", "sft.eval_strategy=no"], {"samples": 3}, "`data.eval`, which has no source"),
        ([*NO_ROWS, "sft.metric_for_best_model=loss"], {"benchmarks": ["gqa"]}, "measures 'loss'; .*gqa_<score>"),
        ([*NO_ROWS, "sft.load_best_model_at_end=true"], {"benchmarks": ["gqa"]}, "no source; choose by .*gqa_<score>"),
        ([*NO_ROWS, "sft.load_best_model_at_end=true", "sft.eval_strategy=no"], {}, "choose by nothing: add rows to"),
        (NO_ROWS, {}, "`sft.eval_strategy` asks for evaluations .* add one, or `evaluation.benchmarks`"),
    ):
        with pytest.raises(UserError, match=said):
            asked_recipe(more=more, **evaluation)
    for name in ("loss", "eval_loss", "image_use", "exact_match", "contains", "gqa", "captions_ROUGE-L"):
        WhileTraining(asked_recipe(more=[f"sft.metric_for_best_model={name}"]), print)


def test_a_benchmark_s_score_is_known_before_weights_are_read(asked_recipe, tmp_path):
    from support.benchmarks import PUBLISHED

    PUBLISHED["gqa"](tmp_path / "gqa")
    asked = {"benchmarks": ["gqa"], "data": str(tmp_path)}
    WhileTraining(asked_recipe(more=["sft.metric_for_best_model=gqa_accuracy"], **asked), print)
    with pytest.raises(UserError, match=r"measures 'gqa_F1'; it can be one of these: .*gqa_accuracy"):
        WhileTraining(asked_recipe(more=["sft.metric_for_best_model=gqa_F1"], **asked), print)


def test_a_model_in_shares_is_not_asked_and_that_is_said(asked_recipe):
    said: list[str] = []

    class Trainer:
        prefix, is_fsdp_enabled, processing_class = None, True, None

        class accelerator:  # noqa: N801
            distributed_type = "NO"

        add_callback = staticmethod(lambda callback: None)

    WhileTraining(asked_recipe(), said.append).attach(Trainer())
    assert said == ["The model is not asked while it is trained: its weights are split."]
    with pytest.raises(UserError, match=r"'exact_match' is measured by answers, and .* its weights are split"):
        WhileTraining(asked_recipe(more=["sft.metric_for_best_model=exact_match"]), said.append).attach(Trainer())
