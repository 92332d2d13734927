"""A run that is killed at any moment goes on to the weights and the log of one that never was.

And what of a recipe may differ between a run and its resumption.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from support.bundles import assert_same, log
from support.paths import ROOT
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle import run_folder
from vlm_sft.training.checkpointing import check_resumption


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


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_what_was_saved(forge, mixed_recipe):
    path, out = mixed_recipe("full", max_steps=4)
    assert forge.run(path, "sft.max_steps=2") == 0, forge.said()
    # The optimizer's file is the largest of a checkpoint: it does not fit any more.
    largest = max(file.stat().st_size for file in (out / "checkpoint-2").iterdir())
    assert forge.run(path, limit=largest - 1000) == 2, forge.said()
    said = forge.said().splitlines()[-1]
    assert said.startswith(f"error: {out / 'checkpoint-3'} cannot be written (") and "Traceback" not in forge.said()
    assert said.endswith(f"{out / 'checkpoint-2'} is whole, go on from it with --resume.")
    assert [p.name for p in run_folder.checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(out.glob(".unfinished-*")) and run_folder.flaw_of(out / "checkpoint-2") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "epoch", "logging_strategy": "epoch"},
        {"gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 7},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 3, "max_steps": -1, "dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    ],
    ids=["saves at an epoch's end", "saves where an epoch ends by step", "an epoch of uneven steps", "rows by length"],
)
def test_each_checkpoint_goes_on_to_the_same_end(forge, mixed_recipe, settings):
    path, calm = mixed_recipe("whole", **{"save_total_limit": None, **settings})
    assert forge.run(path) == 0, forge.said()
    found = run_folder.checkpoints(calm)
    assert len(found) >= 2
    for checkpoint in (found[0], found[-1]):
        again, out = mixed_recipe(f"from-{checkpoint.name}", **{"save_total_limit": None, **settings})
        assert forge.run(again, f"sft.resume_from_checkpoint={checkpoint}") == 0, forge.said()
        assert_same(out, calm)


@pytest.mark.slow
def test_the_command_itself_is_killed_and_goes_on(mixed_recipe, forge):
    """The whole process, data-loader worker and all, killed from outside as soon as a checkpoint is there."""
    whole, calm = mixed_recipe("whole", dataloader_num_workers=1)
    assert forge.run(whole) == 0, forge.said()
    path, out = mixed_recipe("killed", dataloader_num_workers=1)
    command = [sys.executable, "-m", "vlm_sft.train", str(path), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = forge.start(command, env=environment, stderr=subprocess.PIPE)
    assert run.stderr is not None
    for line in run.stderr:
        if run_folder.checkpoints(out):
            break
        assert "error" not in line, line
    run.kill()
    run.communicate()
    assert run_folder.newest(out) is not None and not (out / "bundle.json").exists()
    assert forge.run(path) == 0, forge.said()
    assert_same(out, calm)


@pytest.fixture
def go_on(recipe_file, tmp_path):
    """Goes on from a checkpoint of the recipe with these changes; returns what was said."""
    path = recipe_file("mine", train={"projector": 1e-2}, lora={"r": 4})
    begun = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml(), encoding="utf-8")

    def run(*overrides: str) -> list[str]:
        said: list[str] = []
        check_resumption(load_recipe(path, overrides), tmp_path, said.append)
        return said

    return run


def test_the_same_recipe_and_what_a_run_tells_and_saves_are_silent(go_on):
    assert go_on() == []
    assert go_on("sft.save_steps=7", "sft.logging_steps=5", "sft.output_dir=elsewhere", "sft.dataloader_num_workers=2",
                 "generation={max_new_tokens: 3}", "watch.nonfinite=skip", "data.max_rejected=0.5") == []  # fmt: skip


def test_what_changes_the_rest_of_the_run_is_said(go_on):
    (said,) = go_on("sft.max_steps=9", "data.train.0.max_rows=3", "sft.gradient_accumulation_steps=2")
    assert said == (
        "The recipe has changed since the run began: data.train, sft.max_steps (2 → 9), "
        "sft.gradient_accumulation_steps (not set → 2). From here on the new one counts."
    )


@pytest.mark.parametrize(
    ("override", "was", "becomes"),
    [
        ("train.projector=1e-3", "train.projector: 0.01", "0.001"),
        ("train.vision_tower=1e-3", "train.vision_tower: not set", "0.001"),
        ("lora.r=8", "lora.r: 4", "8"),
        ("lora=null", "lora: {'r': 4}", "not set"),
        ("sft.learning_rate=1e-5", "sft.learning_rate: 0.001", "1e-05"),
        ("sft.weight_decay=0.1", "sft.weight_decay: not set", "0.1"),
        ("stack.projector.type=mlp", "stack.projector.type: 'linear'", "'mlp'"),
        ("stack.vision_tower.feature_layer=-2", "stack.vision_tower.feature_layer: -1", "-2"),
        ("chat_template=ziya", "chat_template: 'plain'", "'ziya'"),
        ("system=Hello.", "system: not set", "'Hello.'"),
    ],
)
def test_another_model_plan_or_optimizer_is_refused(go_on, override, was, becomes):
    with pytest.raises(UserError) as refused:
        go_on(override)
    said = str(refused.value)
    assert said.startswith(f'override "{override}": the run of ')
    assert f" was begun with {was}, which cannot become {becomes} on the way; use the recipe of that run" in said


def test_pieces_may_lie_elsewhere(go_on):
    """Their fingerprints are compared, once they are read."""
    assert go_on("stack.language_model.pretrained=elsewhere/llama", "stack.language_model.revision=v1") == []


def test_a_checkpoint_without_a_recipe_is_taken_as_it_is(recipe_file, tmp_path):
    check_resumption(load_recipe(recipe_file()), tmp_path / "nothing", pytest.fail)
