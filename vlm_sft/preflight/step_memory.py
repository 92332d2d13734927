"""What a training step holds beside weights and optimizer, counted without weights.

The real model runs forward and backward on a real batch, with weights that have shapes and types but no data, while
every storage that is made and dropped is counted. What autograd keeps, what is frozen, checkpointing and autocast need
no formula then: torch itself decides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .weightless import StorageCounter, without_weights


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        batch: What the model takes, as the collator makes it.
        autocast: Type that the run computes in; float32 for no autocast.
        checkpointing: Arguments of activation checkpointing; None where it is off.
        accumulated: Whether gradients of earlier batches are there already.
    """

    batch: Mapping[str, torch.Tensor]
    autocast: torch.dtype = torch.float32
    checkpointing: dict[str, Any] | None = None
    accumulated: bool = False


@dataclass(frozen=True)
class Counted:
    """Bytes of a step.

    Attributes:
        kept: What the forward pass leaves behind for the backward pass.
        peak: The most that lives at any moment, new gradients included.
    """

    kept: int
    peak: int


def count_step(model: nn.Module, step: Step) -> Counted:
    """Counts a step of a model that lies on the meta device, and leaves it without weights, of no further use.

    Args:
        model: A model that takes `supervised_only`, or PEFT's wrapper of one, in the types of the run, freeze plan
            applied.
        step: What it is trained on, and how.
    """
    unpacked = _unquantise(model, step.autocast)
    if step.checkpointing is not None:
        # Tensors without data have no random states to keep.
        options = {"use_reentrant": False, **step.checkpointing, "preserve_rng_state": False}
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.activation_checkpointing_enable(options)
    model.train()
    with without_weights(model):
        there = [*model.parameters(), *model.buffers(), *step.batch.values()]
        if step.accumulated:
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.empty_like(parameter)
                there.append(parameter.grad)
        with StorageCounter(there) as counter:
            with torch.autocast("cpu", step.autocast, enabled=step.autocast != torch.float32):
                loss = model(**step.batch, supervised_only=True, use_cache=False).loss
            kept = counter.alive
            loss.backward()
    return Counted(kept, counter.peak + unpacked)


def _unquantise(model: nn.Module, dtype: torch.dtype) -> int:
    """Puts plain frozen layers in the place of quantised ones; returns the bytes of the largest when it is unpacked.

    bitsandbytes keeps no input of a layer, and unpacks one weight at a time; a plain frozen layer keeps none either.
    """
    largest = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__module__.startswith("bitsandbytes"):  # PEFT calls its wrappers by the same names
                with torch.device("meta"):
                    plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, dtype=dtype)
                setattr(module, name, plain.requires_grad_(False))
                largest = max(largest, plain.weight.numel() * plain.weight.element_size())
    return largest
