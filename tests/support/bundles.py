"""Bundles of models whose trained parameters have moved, and what tells two of them apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlm_sft.bundle.handover import hand_over, settle_adapter
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.stack.adapters import fill_adapter
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.lora import add_adapter, lora_config

LLAVA = {"tower": "clip", "resampler": None, "projector": {"type": "mlp"}, "chat_template": "vicuna_v1",
         "vision": {"feature_layer": -2, "feature_select": "patch"}, "lora": {"r": 2}}  # fmt: skip
BLIP2 = {"chat_template": "ziya", "lora": {"r": 2}}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？ What?"}]}]

# Named by transformers, TRL and us: what depends on the clock.
TIMES = ("runtime", "per_second", "data_wait_share")
ALTERED = {
    "vision_tower": ("tower", "blip2", "vision_model.post_layernorm.weight"),
    "resampler": ("resampler", "blip2", "query_tokens"),
    "language_model": ("lm", "llama", "model.norm.weight"),
}


def trained(made, folder, state_dict=False, moves=True):
    """A bundle of a model whose trained parameters have moved (unless not); gives the model that was saved."""
    made = settle_adapter(made)
    stack = build_stack(made)
    if made.init_from:
        hand_over(stack, made.init_from, made.lora_from)
    model = stack.model
    if (lora := lora_config(made, model)) is not None:
        model = add_adapter(model, lora)
    if made.lora_from == "continue":
        fill_adapter(Path(made.init_from), model)
    stack.plan.apply(model)
    if moves:
        move(model)
    state = {n: t.clone() for n, t in model.state_dict().items()} if state_dict else None
    save_bundle(folder, model, stack.processor, stack.plan, Provenance(made, stack.pieces), state_dict=state)
    return model.eval()


def move(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logits(model, processor):
    tokens = [processor.image_token_id] * processor.num_image_tokens
    ids = torch.tensor([[1, *tokens, 40, 41, *tokens, 42], [1, 50, *tokens, *tokens, 51, 52]])
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def altered(folder, target, change):
    """A copy of a checkpoint whose tensors were changed by `change(state)`."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def bump(name):
    def change(state):
        state[name] = state[name] + 1

    return change


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got, wanted):
    """Bit for bit: weights, and every number of the log that does not depend on the clock."""
    one, other = weights(got), weights(wanted)
    assert one.keys() == other.keys()
    assert [key for key in one if not one[key].equal(other[key])] == []
    assert log(got) == log(wanted)


def weights(folder):
    tensors = {}
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        tensors |= {f"{name}: {key}": tensor for key, tensor in load_file(folder / name).items()}
    return tensors


def log(folder):
    history = json.loads((folder / "metrics.json").read_text())
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in history]
