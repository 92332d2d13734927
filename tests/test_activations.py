"""What the empty pass counts, against real passes on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vlm_sft import build_stack, lora_config
from vlm_sft.activations import Step, StorageCounter, count_step
from vlm_sft.adapters import add_adapter
from vlm_sft.stack import build_empty_stack

# Frozen or not, before and behind what learns, with LoRA, with checkpointing.
CASES = {
    "projector": ("clip", None, {"train": {"projector": 1e-3}}),
    "qformer and projector": ("blip2", "blip2", {"train": {"resampler": 1e-3, "projector": 1e-3}}),
    "tower": ("clip", None, {"train": {"vision_tower": 1e-3}}),
    "language model": ("clip", None, {"train": {"language_model": 1e-3}}),
    "lora": ("clip", None, {"train": {"projector": 1e-3}, "lora": {"r": 2, "lora_dropout": 0.1}}),
    "four bits": ("clip", None, {"lora": {"r": 2, "lora_dropout": 0.1}, "quantization": {"load_in_4bit": True}}),
}
ROWS, LENGTH = 3, 60


def prepared(recipe, build):
    stack = build(recipe)
    model = stack.model
    if (config := lora_config(recipe, model)) is not None:
        model = add_adapter(model, config)
        stack.plan.apply(model)
    return model.train(), stack.processor


def real_batch(processor):
    tokens = processor.num_image_tokens
    ids = torch.full((ROWS, LENGTH), 5)
    ids[:, :tokens] = processor.image_token_id
    labels = ids.masked_fill(ids == processor.image_token_id, -100)
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0  # one row is shorter: the others need a mask
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": torch.randn(ROWS, 3, 28, 28)}


# Every case in one way each, and LoRA in four.
WAYS = [
    ("projector", torch.bfloat16, None),
    ("qformer and projector", torch.float32, {}),
    ("tower", torch.float32, None),
    ("language model", torch.bfloat16, {}),
    ("lora", torch.float32, None),
    ("lora", torch.bfloat16, {}),
    ("four bits", torch.float32, None),
]


@pytest.mark.parametrize(("case", "autocast", "checkpointing"), WAYS)
def test_a_real_pass_holds_what_was_counted(case, autocast, checkpointing, stack_recipe):
    tower, resampler, changes = CASES[case]
    recipe = stack_recipe(tower, resampler=resampler, **changes)
    empty, processor = prepared(recipe, build_empty_stack)
    step = Step(ROWS, LENGTH, (28, 28), autocast=autocast, checkpointing=checkpointing)
    counted = count_step(empty, step)

    model, processor = prepared(recipe, build_stack)
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = real_batch(processor)
    there = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with StorageCounter(there) as counter:
        with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
            loss = model(**{k: v.clone() for k, v in batch.items()}, supervised_only=True, use_cache=False).loss
        kept = counter.alive
        loss.backward()
    assert counted.kept == pytest.approx(kept, rel=0.03)
    assert counted.peak == pytest.approx(counter.peak, rel=0.03)


@pytest.mark.parametrize("case", ["qformer and projector", "lora"])
def test_autograd_itself_says_the_same(case, stack_recipe):
    """A count of another kind: what autograd asks to keep."""
    tower, resampler, changes = CASES[case]
    recipe = stack_recipe(tower, resampler=resampler, **changes)
    counted = count_step(prepared(recipe, build_empty_stack)[0], Step(ROWS, LENGTH, (28, 28)))
    model, processor = prepared(recipe, build_stack)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    there = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**real_batch(processor), supervised_only=True, use_cache=False).loss
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in there)
    assert loss.requires_grad and counted.kept == pytest.approx(size, rel=0.05)


def test_gradients_that_are_there_already_are_not_made_again(stack_recipe):
    recipe = stack_recipe(**CASES["language model"][2])
    peaks = [
        count_step(prepared(recipe, build_empty_stack)[0], Step(1, 20, (28, 28), accumulated=before)).peak
        for before in (False, True)
    ]
    assert peaks[1] < peaks[0]
