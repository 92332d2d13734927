"""What a training step holds beside weights and optimizer, counted without memory: every tensor of it is empty.

The real modules run a real forward and backward pass on fake tensors, which have shapes and types but no data, while
every storage that is made and dropped is counted. What autograd keeps, what is frozen, checkpointing and autocast need
no formula then: torch itself decides them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .losses import score_positions
from .modeling import VLMForConditionalGeneration


@dataclass(frozen=True)
class Step:
    """The shapes of a step.

    Attributes:
        rows: Rows of a batch.
        length: Tokens of a row, those of its image included.
        image: (height, width) in pixels; each row has one.
        words: Tokens of the instruction, for a resampler that reads it.
        autocast: Type that the run computes in; float32 for no autocast.
        checkpointing: Arguments of activation checkpointing; None where it is off.
        accumulated: Whether gradients of earlier batches are there already.
    """

    rows: int
    length: int
    image: tuple[int, int]
    words: int = 128
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


@dataclass
class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, until it is dropped.

    Attributes:
        known: Storages that are not to be counted.
        alive: Bytes that live now.
        peak: The most that lived at once.
    """

    known: set[int] = field(default_factory=set)
    alive: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at what it gives."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def count_step(model: nn.Module, step: Step) -> Counted:
    """Counts a step of a model that lies on the meta device, and leaves it on fake tensors, of no further use.

    Every token but the image's is counted as one that the loss scores, and several rows as unequally long.

    Args:
        model: A composed model, or PEFT's wrapper of one, in the types of the run, freeze plan applied.
        step: The shapes.
    """
    whole = next(m for m in model.modules() if isinstance(m, VLMForConditionalGeneration))
    with FakeTensorMode():
        dequantised = _fill_quantised(whole, step.autocast)
        _fill(model)
        model.train()
        if step.checkpointing is not None:
            # Tensors without data have no random states to keep.
            options = {"use_reentrant": False, **step.checkpointing, "preserve_rng_state": False}
            whole.activation_checkpointing_enable(options)
        there = [*model.parameters(), *model.buffers()]
        if step.accumulated:
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.empty_like(parameter)
                there.append(parameter.grad)
        with StorageCounter({tensor.untyped_storage()._cdata for tensor in there}) as counter:
            with torch.autocast("cpu", step.autocast, enabled=step.autocast != torch.float32):
                loss = _loss(whole, step)
            kept = counter.alive
            loss.backward()
    return Counted(kept, counter.peak + dequantised)


def _loss(whole: VLMForConditionalGeneration, step: Step) -> torch.Tensor:
    """`VLMForConditionalGeneration.forward` without what looks at values, which fake tensors do not have."""
    instruction = {
        "qformer_input_ids": torch.zeros(step.rows, step.words, dtype=torch.long),
        "qformer_attention_mask": torch.ones(step.rows, step.words, dtype=torch.long),
    }
    features = whole.get_image_features(torch.zeros(step.rows, 3, *step.image), **instruction)
    ids = torch.zeros(step.rows, step.length, dtype=torch.long)
    embeds = whole.get_input_embeddings()(ids)
    places = torch.zeros(step.rows, step.length, 1, dtype=torch.bool)
    embeds = embeds.masked_scatter(places, features.to(embeds.dtype).flatten(0, 1))
    mask = torch.ones(step.rows, 1, step.length, step.length, dtype=torch.bool) if step.rows > 1 else None
    outputs = whole.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1)
    scored = torch.zeros(step.rows * max(step.length - features.shape[1], 1), dtype=torch.long)
    losses, _ = score_positions(whole._score, hidden.index_select(0, scored), scored)
    return losses.sum()


def _fill(model: nn.Module) -> None:
    """Gives every weight and buffer of the meta device a fake tensor in its place; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and id(weight) not in made:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            if weight is not None:
                module._parameters[name] = made[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fill_quantised(model: nn.Module, dtype: torch.dtype) -> int:
    """Puts plain frozen layers in the place of quantised ones; returns the bytes of the largest when it is unpacked.

    bitsandbytes keeps no input of a layer, and unpacks one weight at a time; a plain frozen layer keeps none either.
    """
    largest = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__module__.startswith("bitsandbytes"):  # PEFT calls its wrappers by the same names
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, dtype=dtype)
                setattr(module, name, plain.requires_grad_(False))
                largest = max(largest, plain.weight.numel() * plain.weight.element_size())
    return largest
