"""What a training step holds beside weights and optimizer, counted without weights.

The real model runs forward and backward on a real batch, with weights that have shapes and types but no data, while
every storage that is made and dropped is counted. What autograd keeps, what is frozen, checkpointing and autocast need
no formula then: torch itself decides them.

What is computed from weights is empty (torch's fake tensors). What is computed from a batch alone is really computed:
models look at it, to cut images into windows or to find the places of their features.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..base.names import Options
from ..model.losses import chunks_as_on
from ..model.parts import passes

aten = torch.ops.aten
# What makes a tensor from nothing. One of floats may be filled from weights later, so it is empty from its start.
CONTAINERS = {aten.zeros, aten.ones, aten.empty, aten.empty_strided, aten.full, aten.rand, aten.randn}
# What takes a list of indices, of which a mask would need the count of its true places.
INDEXED = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        batch: What the model takes, as the collator makes it.
        autocast: Type that the run computes in; float32 for no autocast.
        checkpointing: Arguments of activation checkpointing; None where it is off.
        accumulated: Whether gradients of earlier batches are there already.
        on_cpu: Whether logits are held as on a CPU, or as elsewhere.
    """

    batch: Mapping[str, torch.Tensor]
    autocast: torch.dtype = torch.float32
    checkpointing: Options | None = None
    accumulated: bool = False
    on_cpu: bool = False


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
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.activation_checkpointing_enable(options)
    model.train()
    with without_weights(model):
        there = [*model.parameters(), *model.buffers(), *step.batch.values()]
        if step.accumulated:
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.empty_like(parameter)
                there.append(parameter.grad)
        with StorageCounter(there) as counter:
            autocast = torch.autocast("cpu", step.autocast, enabled=step.autocast != torch.float32)
            with passes(model):
                with autocast, chunks_as_on(step.on_cpu):
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


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, but the `known` ones, until it is dropped.

    Attributes:
        alive: Bytes that live now.
        peak: The most that lived at once.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> object:
        """Runs the operation and looks at what it gives."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@contextmanager
def without_weights(model: nn.Module) -> Iterator[None]:
    """Within, a model of the meta device runs on batches of real numbers; afterwards it is of no further use."""
    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode())
        _fill(model)
        stack.enter_context(_RealNumbers(fake))
        yield


class _RealNumbers(TorchDispatchMode):
    """Really computes what no empty tensor takes part in; the mode `fake` computes the rest."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> object:
        """Runs the operation with data where all its inputs have data, and without where one has none."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        operation = func.overloadpacket
        if all(map(_has_data, tensors)):
            kind = kwargs.get("dtype") or torch.get_default_dtype()
            if not tensors and operation in CONTAINERS and kind.is_floating_point:
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if operation in INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        args, kwargs = tree_map(lambda leaf: self._fake.from_tensor(leaf) if _has_data(leaf) else leaf, (args, kwargs))
        if operation is aten._grouped_mm:  # of experts, which without data torch multiplies in bfloat16 alone
            half = [leaf.bfloat16() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
                    for leaf in args]  # fmt: skip
            return func(*half, **kwargs).to(args[0].dtype)
        result = func(*args, **kwargs)
        if operation is aten.native_layer_norm and len({tensor.dtype for tensor in tensors}) > 1:
            # Between types, mean and deviation are float32 everywhere; without data torch gives them the input's type.
            return result[0], *(each.float() for each in result[1:])
        return result


def _has_data(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)


def _places(index: torch.Tensor) -> Iterable[torch.Tensor]:
    """One index of a list, or those of its true places in place of a mask."""
    if not (_has_data(index) and index.dtype == torch.bool):
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


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
