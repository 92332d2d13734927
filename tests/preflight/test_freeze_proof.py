"""Real steps: who moved, who did not, and what cannot fool them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.data.dataset import load_mixture
from vlm_sft.preflight.freeze_proof import FEWEST, SETTINGS, Witness, fingerprint, prove
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.kinds import compose
from vlm_sft.training.build_trainer import build_collator, build_trainer
from vlm_sft.training.run_rows import RunRows

pytestmark = pytest.mark.slow


@pytest.fixture
def trainer(recipe_file, tmp_path):
    def make(**changes):
        sft = {"output_dir": str(tmp_path / "p"), "learning_rate": 1e-3, "bf16": False,
               "per_device_train_batch_size": 4, **changes.pop("sft", {}), **SETTINGS}  # fmt: skip
        recipe = load_recipe(recipe_file(sft=sft, **changes))
        args, composed = build_sft_config(recipe), compose(recipe)
        rows = RunRows(load_mixture(recipe.data.train), None, {})
        return build_trainer(
            recipe, args, build_collator(recipe, composed.processor, args), rows, composed, lambda line: None
        )

    return make


def test_every_trained_tensor_moves_and_no_frozen_one(trainer):
    proof = prove(trainer(chat_template="ziya", lora={"r": 2}, train={"projector": 1e-3}))
    assert proof.steps == FEWEST, "in one step LoRA's A would not move"
    assert len(proof.moved) == 2 + 2 * 14 and not proof.still and not proof.unused
    assert any("lora_A" in name for name in proof.moved) and any("projector" in name for name in proof.moved)
    assert proof.frozen > 50 and not proof.changed
    assert proof.finite and len(proof.losses) == 2
    assert proof.seconds_per_step > 0 and proof.tokens_per_second > 0 and proof.device == "the CPU"


def test_a_warm_up_from_zero_does_not_hide_what_moves(trainer):
    proof = prove(trainer(sft={"warmup_steps": 100, "lr_scheduler_type": "cosine"}))
    assert len(proof.moved) == 2 and not proof.still


def test_weight_decay_does_not_move_what_has_no_gradient(trainer):
    made = trainer(sft={"weight_decay": 0.5})
    weight = next(p for n, p in made.model.named_parameters() if n.endswith("projector.linear.weight"))
    weight.register_hook(torch.zeros_like)
    proof = prove(made)
    ((name, why),) = proof.still.items()
    assert name.endswith("projector.linear.weight") and why == "its gradient is zero"


def test_a_step_too_small_for_its_type_is_told_from_no_gradient(trainer):
    made = trainer(train={"projector": 1e-12})
    proof = prove(made)
    assert "projector" in next(iter(proof.still))
    assert set(proof.still.values()) == {
        "its gradient is not zero, but float32 cannot hold a step this small: raise its rate"
    }


class Changes(TrainerCallback):
    """A callback that does what it must not."""

    def __init__(self, tensor):
        self.tensor = tensor

    def on_step_end(self, *args, **kwargs):
        self.tensor.data.add_(1)


def test_a_frozen_tensor_that_changes_is_named(trainer):
    made = trainer()
    frozen = next(p for n, p in made.model.named_parameters() if "vision_tower" in n)
    made.add_callback(Changes(frozen))
    (name,) = prove(made).changed
    assert "vision_tower" in name


def test_layers_that_are_not_reached_are_told(trainer, pieces):
    stack = tiny_stack(pieces, "clip", None, vision={"feature_layer": -2})
    proof = prove(trainer(stack=stack, train={"vision_tower": 1e-3}))
    assert proof.unused and not proof.still
    assert all("layers.2." in name or "post_layernorm" in name for name in proof.unused)
    assert proof.moved


def test_fingerprints_know_every_bit():
    one = torch.zeros(3, dtype=torch.bfloat16)
    other = one.clone()
    assert fingerprint(one) == fingerprint(other)
    other[1] = -0.0
    assert fingerprint(one) != fingerprint(other), "minus zero is equal, and not the same"
    assert fingerprint(torch.tensor(3)) and fingerprint(torch.empty(0)) and fingerprint(torch.eye(3).t()[1:])


def test_buffers_are_witnessed():
    assert set(Witness(nn.BatchNorm1d(2)).frozen) == {"running_mean", "running_var", "num_batches_tracked"}


def test_words_that_no_row_has_are_told_from_what_does_not_move(trainer):
    """No gradient reaches their rows of the embeddings; those of the head learn from every answer."""
    proof = prove(trainer(lora={"r": 2, "add_tokens": ["<defect>"]}))
    assert [name.split(".")[-4] for name in proof.unused] == ["embed_tokens"] and not proof.still
    assert any("lm_head.token_adapter" in name for name in proof.moved)
