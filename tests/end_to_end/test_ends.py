"""A run that ends, ends: within seconds, with its exit code, and nothing that it started outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.paths import ROOT, accelerate_config
from vlm_sft import load

pytestmark = pytest.mark.slow

LIMIT = 120  # seconds, of which an idle machine needs three; a run that hangs never ends
SFT = {"max_steps": 50, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "bf16": False, "use_cpu": True,
       "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "max_length": 128}  # fmt: skip
WORDS = {
    "jpeg": (2, "cut.jpg"), "collator": (1, "a hole in the dictionary"), "memory": (1, "MemoryError"),
    "model": (1, "a hole in the model"), "device": (1, "CUDA out of memory"), "ctrl-c": (130, "Stopped at once"),
}  # fmt: skip


@pytest.fixture
def failing(recipe_file, photos, tmp_path):
    """Writes a recipe whose run ends badly, in this way, with so many workers, of a stream or of a set."""

    def write(how: str, workers: int, streaming: bool, rank: int | None = None, split: str = "train") -> Path:
        images = list(photos)
        if how == "jpeg":
            images[3] = str(tmp_path / "cut.jpg")
            Image.effect_noise((64, 64), 90).convert("RGB").save(images[3], quality=95)
            os.truncate(images[3], 700)
        rows = [{"image": image, "caption": "two dogs" if k == 3 else "一只猫"} for k, image in enumerate(images)]
        file = tmp_path / "captions.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        source = {"path": str(file), "format": "caption"}
        data = {"train": [{**source, "max_rows": 8 if split == "train" else 3}], "decode_rows": 0}
        data |= {} if split == "train" else {"eval": [source]}
        data |= {"streaming": True, "shuffle_buffer": 2} if streaming else {}
        options = {**SFT, "output_dir": str(tmp_path / "out"), "dataloader_num_workers": workers}
        faults = {"collator": "support.faults:Fails", "collator_args": {"how": how, "rank": rank}}
        return recipe_file(data=data, sft=options, **(faults if how not in ("jpeg", "ctrl-c") else {}))

    return write


@pytest.mark.parametrize("streaming", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("how", WORDS)
def test_one_process(forge, failing, how, workers, streaming):
    code, words = WORDS[how]
    send = {"send": [2, signal.SIGINT, 2]} if how == "ctrl-c" else {}
    assert forge.run(failing(how, workers, streaming), timeout=LIMIT, resume=False, **send) == code, forge.said()
    assert words in forge.said()


@pytest.mark.parametrize("streaming", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("how", [how for how in WORDS if how != "ctrl-c"])
def test_two_processes(failing, how, workers, streaming):
    """Where the model fails, one of them fails alone: in turn the first and the second."""
    rank = workers % 2 if how in ("model", "device") else None
    recipe = failing(how, workers, streaming, rank)
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2")),
         "--main_process_port", "0", "-m", "vlm_sft.train", str(recipe)],
        capture_output=True, text=True, cwd=ROOT, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 1 and WORDS[how][1] in done.stderr, done.stderr


def test_workers_that_wait_for_the_next_epoch_end_with_the_run(forge, failing):
    recipe = failing("ctrl-c", 2, False)
    options = ["sft.max_steps=2", "sft.dataloader_persistent_workers=true"]
    assert forge.run(recipe, *options, timeout=LIMIT, resume=False) == 0, forge.said()


def test_an_evaluation_that_fails(forge, failing):
    recipe = failing("jpeg", 2, False, split="eval")
    assert forge.run(recipe, "sft.max_steps=2", timeout=LIMIT, resume=False) == 2, forge.said()
    assert "cut.jpg" in forge.said()


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch", "best"])
def test_a_run_that_is_killed_in_its_last_evaluation_has_its_bundle(forge, failing, tmp_path, strategy):
    settings = ["sft.max_steps=3", f"sft.eval_strategy={strategy}", "sft.eval_steps=3"]
    if strategy == "best":  # the only one that there is
        settings[1:2] = ["sft.eval_strategy=steps", "sft.save_strategy=steps", "sft.save_steps=3"]
        settings += ["sft.load_best_model_at_end=true"]
    killed = failing("kill", 0, False, split="eval")
    assert forge.run(killed, *settings, timeout=LIMIT, resume=False) == -signal.SIGKILL, forge.said()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3
    calm = failing("never", 0, False, split="eval")
    assert forge.run(calm, *settings, f"sft.output_dir={tmp_path}/calm", timeout=LIMIT, resume=False) == 0, forge.said()
    load(tmp_path / "out", device="cpu")
    weights = [load_file(tmp_path / name / "trained.safetensors") for name in ("out", "calm")]
    assert weights[0] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    # Of the one that was not killed, everything that is written at the end knows of the evaluation.
    found = {name: (tmp_path / "calm" / name).read_text() for name in ("trainer_state.json", "metrics.json")}
    assert all(text.count('"eval_loss"') == 1 for text in found.values())
    ledgers = [json.loads((tmp_path / name / "bundle.json").read_text())["ledger"] for name in ("out", "calm")]
    assert ledgers[0]["train"] == ledgers[1]["train"]
    assert forge.run(killed, *settings) == 2 and "its bundle can be used as it is" in forge.said()
