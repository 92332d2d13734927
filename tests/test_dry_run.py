"""`--dry-run`: the resolved recipe, the plan and the memory of a device, without a weight being read."""

from __future__ import annotations

import os

import pytest

from vlm_sft import load_recipe
from vlm_sft.assets import accelerate_config_path
from vlm_sft.dry_run import step_of
from vlm_sft.recipe import build_sft_config
from vlm_sft.stack import build_empty_stack
from vlm_sft.train import main


def test_dry_run_reads_no_weight(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr("vlm_sft.parts.load_language_model", lambda *args: pytest.fail("weights were read"))
    path = recipe_file(chat_template="ziya", lora={"r": 2}, train={"projector": 1e-3})
    main([str(path), "sft.max_steps=7", "--dry-run"])
    shown = capsys.readouterr().out
    assert "max_steps: 7" in shown and "r: 2" in shown, "the resolved recipe"
    for words in ("vision_tower", "frozen", "0.001", "An image becomes 4 tokens.", "No weight was read."):
        assert words in shown
    model = 16 * 32 + 32
    assert f"{model:,}" in shown, "the projector's parameters"
    assert not os.path.exists(load_recipe(path).sft["output_dir"])


def test_dry_run_says_which_piece_cannot_be_had(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ziya_stage1", "--dry-run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: stack.vision_tower.pretrained: 'Salesforce/blip2-opt-2.7b' is no folder here and")


def test_it_says_what_a_device_of_many_takes(recipe_file, capsys):
    path = str(recipe_file(chat_template="ziya", lora={"r": 2}))
    main([path, "--dry-run"])
    alone = capsys.readouterr().out
    assert "Memory of a device (one process)" in alone and "A step: 4 rows of 128 tokens, an image in each" in alone
    main([path, "--dry-run", "--accelerate-config", str(accelerate_config_path("cpu_2"))])
    assert "Memory of a device (2 processes, DDP)" in capsys.readouterr().out


def test_an_optimizer_that_is_not_known_is_named(recipe_file, capsys):
    main([str(recipe_file()), "sft.optim=stable_adamw", "--dry-run"])
    assert "What sft.optim=stable_adamw keeps is not known here; it is counted as AdamW." in capsys.readouterr().out


def test_the_shapes_are_those_of_the_recipe(recipe_file):
    options = ["sft.gradient_accumulation_steps=2", "sft.activation_checkpointing=true", "sft.max_length=null"]
    recipe = load_recipe(recipe_file(), options)
    step = step_of(recipe, build_empty_stack(recipe), build_sft_config(recipe))
    assert (step.rows, step.length, step.image, step.accumulated) == (4, 2048, (28, 28), True)
    assert step.checkpointing is not None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sft.max_length=3", "--dry-run"], "sft.max_length is 3, but an image alone takes 4 tokens; raise it."),
        (["--dry-run", "--accelerate-config", "no.yaml"], "--accelerate-config no.yaml: it cannot be read"),
        (["--accelerate-config", "no.yaml"], "--accelerate-config belongs to --dry-run; to train, use: accelerate"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, recipe_file, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(recipe_file()), *arguments])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
