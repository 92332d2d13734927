"""A whole stage from a recipe, on tiny pieces in real layouts: what moved, what was written, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.paths import accelerate_config
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.train import train

FAKE_PARITY = {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4, "equal": True}


def run(path, *overrides):
    return train(load_recipe(path, list(overrides)))


@pytest.fixture
def no_parity(monkeypatch):
    """Leaves out the fresh process, which takes most of a short run's time and is tested once."""
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: FAKE_PARITY)


def test_a_stage_trains_and_writes_a_bundle_that_gives_the_same_logits(recipe_file, capsys, drawn_curves):
    folder = run(recipe_file())
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 1000
    names = {p.name for p in folder.iterdir()}
    assert {"bundle.json", "recipe.yaml", "trained.safetensors", "chat_template.jinja", "curves.png"} <= names
    assert not any(n.startswith(("model", "adapter")) for n in names), "no frozen weight, no adapter"
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["parity"]["equal"] and manifest["parity"]["positions"] > 0
    assert manifest["trained"] == ["projector"] and not manifest["adapter"]
    assert set(manifest["pieces"]) == {"vision_tower", "resampler", "language_model"}
    assert manifest["train_rows"]["rows"] == 8 and manifest["train_rows"]["longest"] > 4
    model, processor = load(folder)
    assert processor.num_image_tokens == 4 and not model.training
    said = capsys.readouterr().err
    assert "train: 8 rows" in said and "had no <image> token: it was added" in said and "had no <pad> token" in said
    assert "step 2/2: loss" in said and f"Bundle: {folder}\nCurves: {folder / 'curves.png'}" in said


def test_two_stages_hand_over(recipe_file, no_parity):
    first = run(recipe_file("one"))
    second = run(recipe_file("two", chat_template="ziya", init_from=str(first), lora={"r": 2, "lora_alpha": 4}))
    assert (second / "adapter_model.safetensors").is_file() and (second / "trained.safetensors").is_file()
    before, _ = load(first)
    after, _ = load(second)
    moved = after.get_base_model().model.projector.linear.weight - before.model.projector.linear.weight
    assert moved.abs().max() > 0
    frozen = [(n, p) for n, p in before.named_parameters() if "projector" not in n]
    others = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in after.named_parameters()}
    assert all(torch.equal(p, others[n]) for n, p in frozen)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(recipe_file, no_parity):
    settings = ["sft.max_steps=4", "sft.save_strategy=steps", "sft.save_steps=2", "sft.lr_scheduler_type=linear"]
    # Dropout and two kinds of trained weights, so that random states and the order of rows matter.
    path = recipe_file(chat_template="ziya", lora={"r": 2, "lora_dropout": 0.1})
    whole = run(path, *settings)
    checkpoint = whole / "checkpoint-2"
    assert (checkpoint / "bundle.json").is_file() and not (checkpoint / "model.safetensors").exists()
    again = run(path, *settings, f"sft.resume_from_checkpoint={checkpoint}", f"sft.output_dir={whole}-again")
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        wanted, got, early = (load_file(folder / name) for folder in (whole, again, checkpoint))
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) for key in wanted)
        assert any(not torch.equal(wanted[key], early[key]) for key in wanted), "the last two steps moved something"
    losses = [[row["loss"] for row in history(folder) if "loss" in row] for folder in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_resume_true_goes_on_from_the_last_checkpoint(recipe_file, no_parity, capsys):
    settings = ["sft.save_strategy=steps", "sft.save_steps=2"]
    folder = run(recipe_file(), *settings, "sft.max_steps=2")
    capsys.readouterr()
    run(recipe_file(), *settings, "sft.max_steps=3", "sft.resume_from_checkpoint=true")
    said = capsys.readouterr().err
    assert "step 3/3" in said and "step 2/3" not in said
    assert [row["step"] for row in history(folder) if "loss" in row] == [1, 2, 3]


def test_the_best_checkpoint_is_what_is_saved_at_the_end(recipe_file, caption_file, no_parity):
    source = {"path": caption_file, "format": "caption"}
    path = recipe_file(data={"train": [source], "eval": [source]}, chat_template="ziya", lora={"r": 2})
    folder = run(
        path, "sft.max_steps=2", "sft.save_strategy=steps", "sft.save_steps=1", "sft.eval_strategy=steps",
        "sft.eval_steps=1", "sft.load_best_model_at_end=true", "sft.metric_for_best_model=loss",
        "sft.greater_is_better=true",  # the wrong way round, so that the first is the best
    )  # fmt: skip
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        first, second, end = (load_file(at / name) for at in (folder / "checkpoint-1", folder / "checkpoint-2", folder))
        assert all(torch.equal(first[key], end[key]) for key in end)
        assert any(not torch.equal(second[key], end[key]) for key in end)


def history(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_tensorboard_gets_our_metrics(recipe_file, caption_file, no_parity):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = {"path": caption_file, "format": "caption"}
    path = recipe_file(
        data={"train": [source], "eval": [source]}, lora={"r": 2}, train={"projector": 0.01}, chat_template="ziya"
    )
    folder = run(path, "sft.report_to=tensorboard", "sft.eval_strategy=steps", "sft.eval_steps=1")
    (events,) = folder.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {f"train/{n}" for n in ("loss", "token_accuracy", "tokens_per_second", "data_wait_share")} <= tags
    assert {"train/learning_rate_projector", "train/learning_rate_lora"} <= tags
    assert {f"eval/{n}" for n in ("loss", "token_accuracy", "image_use", "loss_own_image")} <= tags
    assert len(accumulator.Scalars("eval/image_use")) == 2


def test_rows_for_evaluation_are_used_once_at_the_end_without_a_strategy(recipe_file, caption_file, no_parity):
    source = {"path": caption_file, "format": "caption"}
    folder = run(recipe_file(data={"train": [source], "eval": [source]}))
    assert [row["step"] for row in history(folder) if "eval_image_use" in row] == [2]


def test_rows_are_looked_at_before_any_weight(recipe_file, monkeypatch):
    monkeypatch.setattr("vlm_sft.training.build_trainer.build_stack", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"row captions/1: .*sft\.max_length is 5; raise max_length"):
        run(recipe_file(), "sft.max_length=5")


def test_libraries_are_asked_first(recipe_file):
    path = recipe_file(lora={"lora_alfa": 8})
    with pytest.raises(UserError, match=r'line \d+: unknown key "lora\.lora_alfa"; did you mean "lora_alpha"'):
        run(path)


def test_an_error_takes_the_bar_away(recipe_file, no_parity, monkeypatch):
    closed = []
    monkeypatch.setattr("vlm_sft.training.progress.RichProgress.close", lambda self: closed.append(True))
    monkeypatch.setattr("vlm_sft.training.trainer.VLMSFTTrainer.training_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(recipe_file())
    assert closed


def test_logs_are_no_reason_to_refuse_a_folder(recipe_file, no_parity, tmp_path):
    (tmp_path / "out" / "recipe" / "runs").mkdir(parents=True)
    assert (run(recipe_file(), "sft.max_steps=1") / "bundle.json").is_file()


@pytest.mark.slow
def test_two_processes_train_speak_once_and_write_one_bundle(recipe_file, fresh_python):
    path = recipe_file()
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2")),
         "--main_process_port", "0", "-m", "vlm_sft.train", str(path), "sft.use_cpu=true"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: 8 rows") == done.stderr.count("Parity: reloaded") == 1
    assert "Traceback" not in done.stderr and "destroy_process_group" not in done.stderr
    # Two processes see all eight rows in a step of four each.
    assert history(load_recipe(path).sft["output_dir"])[-1]["epoch"] == 2
    _, processor = load(load_recipe(path).sft["output_dir"])
    assert processor.num_image_tokens == 4


# Trains a step, and says what was imported until then.
ONE_STEP = """
import json, sys, vlm_sft.train

vlm_sft.train.finish = lambda *arguments: None
vlm_sft.train.main(sys.argv[1:])
print(json.dumps([name for name, module in sys.modules.items() if name.startswith("bitsandbytes") and module]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, {"load_in_4bit": True}])
def test_bitsandbytes_is_imported_for_few_bits_alone(recipe_file, bits):
    """PEFT would import it for every LoRA."""
    path = recipe_file(lora={"r": 2}, chat_template="ziya", quantization=bits)
    command = [sys.executable, "-c", ONE_STEP, str(path), "sft.max_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bool(json.loads(done.stdout.splitlines()[-1])) == bool(bits)


def test_several_gpus_without_a_launcher_are_refused(recipe_file, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match=r"There are 2 GPUs but no launcher.*`accelerate launch -m vlm_sft\.train"):
        train(load_recipe(recipe_file()))
