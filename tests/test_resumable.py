"""A run that is killed at any moment goes on to the weights and the log of one that never was."""

from __future__ import annotations

import json
import random
import signal

import pytest
import yaml
from forge import Forge
from safetensors.torch import load_file

from vlm_sft import run_folder

# Named by transformers, TRL and us: what depends on the clock.
TIMES = ("runtime", "per_second", "data_wait_share")


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.close()


@pytest.fixture
def mixed_recipe(recipe_file, caption_file, tmp_path):
    """Two sources, two micro-batches a step, LoRA with dropout, a log and an evaluation out of step with the saves.

    13 rows of 2 in 7 micro-batches are 4 steps an epoch, the last of one micro-batch.
    """
    few = {"path": caption_file, "format": "caption", "name": "few", "max_rows": 5}
    data = {"train": [{"path": caption_file, "format": "caption"}, few], "eval": [few], "sampling": "proportional"}
    path = recipe_file(data=data, chat_template="ziya", lora={"r": 2, "lora_dropout": 0.2})
    recipe = yaml.safe_load(path.read_text())
    recipe["sft"] |= {
        "max_steps": 11, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3,
        "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine",
        "save_total_limit": 2,
    }  # fmt: skip

    def write(name, **sft):
        out = tmp_path / "runs" / name
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, "sft": {**recipe["sft"], "output_dir": str(out), **sft}}))
        return file, out

    return write


def weights(folder):
    tensors = {}
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        tensors |= {f"{name}: {key}": tensor for key, tensor in load_file(folder / name).items()}
    return tensors


def assert_same(got, wanted):
    """Bit for bit: weights, and every number of the log that does not depend on the clock."""
    one, other = weights(got), weights(wanted)
    assert one.keys() == other.keys()
    assert [key for key in one if not one[key].equal(other[key])] == []
    assert log(got) == log(wanted)


def log(folder):
    history = json.loads((folder / "metrics.json").read_text())
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in history]


@pytest.mark.slow
def test_twenty_four_kills_change_nothing(forge, mixed_recipe):
    whole, calm = mixed_recipe("whole")
    assert forge.run(whole) == 0, forge.said()
    assert len(log(calm)) == 3 + 3 + 1, "three logs, three evaluations, the end"
    draw = random.Random(7)
    killed = 0
    for round_ in range(4):
        path, out = mixed_recipe(f"killed-{round_}")
        for _ in range(6):
            # Of a run of eleven steps, at most three saves.
            code = forge.run(path, kill_at=draw.randint(1, 240))
            assert code in (0, -signal.SIGKILL), forge.said()
            killed += code != 0
            assert not [p for p in run_folder.checkpoints(out) if run_folder.flaw_of(p)]
        assert forge.run(path) == 0, forge.said()
        assert_same(out, calm)
        assert not list(out.glob(".unfinished-*")) and len(run_folder.checkpoints(out)) == 2
    assert killed >= 20
