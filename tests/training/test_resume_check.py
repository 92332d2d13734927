"""What of a recipe may differ between a run and its resumption."""

from __future__ import annotations

import pytest

from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.training.resume_check import check_resumption


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
