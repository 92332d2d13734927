"""`sft:`, `lora:` and `generation:` as the libraries' own classes take and refuse them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.recipe_texts import TEXT, problem, write
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.libraries import (
    build_lora_config,
    build_sft_config,
    validate_libraries,
)
from vlm_sft.recipe.schema import load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path, TEXT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.max_step=3", 'override "sft.max_step=3": unknown key "sft.max_step"; did you mean "max_steps"?'),
        ("sft.zzzzzz=3", 'unknown key "sft.zzzzzz"; trl.SFTConfig has nothing like it.'),
        ("sft.max_steps=1e3", 'override "sft.max_steps=1e3": "sft.max_steps" must be a valid integer, not 1000.0.'),
        ("sft.bf16=yes", "\"sft.bf16\" must be a valid boolean, not 'yes'."),
        ("sft.lr_scheduler_type=cosin", "trl.SFTConfig refuses `sft`: cosin is not a valid SchedulerType"),
        ("sft.optim=adam", "trl.SFTConfig refuses `sft`: adam is not a valid OptimizerNames"),
        ("lora.alpha=3", 'override "lora.alpha=3": unknown key "lora.alpha"; did you mean'),
        ("lora.r=x", "\"lora.r\" must be a valid integer, not 'x'."),
        ("lora.bias=some", "\"lora.bias\" must be 'none', 'all' or 'lora_only', not 'some'."),
        ("generation.max_newtokens=4", 'unknown key "generation.max_newtokens"; did you mean "max_new_tokens"?'),
    ],
)
def test_library_keys_and_types(recipe_file: Path, override: str, message: str) -> None:
    assert message in problem(recipe_file, override)


def test_library_key_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "  max_step: 3\n")
    assert problem(path) == f'{path}, line 16: unknown key "sft.max_step"; did you mean "max_steps"?'


def test_configs_are_the_libraries_own(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["lora={r: 4, lora_alpha: 8}", "sft.max_steps=3", "sft.save_strategy=no"])
    args, lora = build_sft_config(recipe), build_lora_config(recipe)
    assert (args.max_steps, args.save_strategy, args.remove_unused_columns) == (3, "no", False)
    assert lora is not None
    assert (lora.r, lora.lora_alpha) == (4, 8)
    assert build_lora_config(load_recipe(recipe_file)) is None


def test_resume_may_be_true_or_a_folder(recipe_file: Path) -> None:
    for value in ("true", "outputs/x/checkpoint-3"):
        validate_libraries(load_recipe(recipe_file, [f"sft.resume_from_checkpoint={value}"]))


def test_recipe_for_a_gpu_is_valid_on_a_laptop_but_says_so_when_it_runs(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load_recipe(recipe_file, ["sft.bf16=true", "sft.tf32=true"])
    validate_libraries(recipe)
    assert recipe.sft["bf16"] is True
    if not torch.backends.cuda.is_built():
        with pytest.raises(UserError, match=r"sft\.bf16=true.*cannot compute in bf16.*set sft\.bf16=false"):
            build_sft_config(recipe)


@pytest.mark.parametrize(
    "name", ["galore_adamw", "apollo_adamw", "lomo", "grokadamw", "schedule_free_adamw", "stable_adamw"]
)
def test_an_optimizer_whose_package_is_missing_is_refused_early(recipe_file: Path, name: str) -> None:
    recipe = load_recipe(recipe_file, [f"sft.optim={name}", "sft.bf16=false"])
    with pytest.raises(UserError, match=rf"`sft.optim: {name}` cannot be used here: .*install.*; mend that") as error:
        build_sft_config(recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "adamw_torch_fused"])
def test_optimizers_that_are_there_are_taken(recipe_file: Path, name: str) -> None:
    assert build_sft_config(load_recipe(recipe_file, [f"sft.optim={name}", "sft.bf16=false"])).optim == name
