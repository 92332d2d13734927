"""Models that run without their weights: tensors that have shapes and types but no data, and numbers that have theirs.

What is computed from weights is empty (torch's fake tensors). What is computed from a batch alone is really computed:
models look at it, to cut images into windows or to find the places of their features.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# What makes a tensor from nothing. One of floats may be filled from weights later, so it is empty from its start.
CONTAINERS = {aten.zeros, aten.ones, aten.empty, aten.empty_strided, aten.full, aten.rand, aten.randn}
# What takes a list of indices, of which a mask would need the count of its true places.
INDEXED = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, until it is dropped.

    Args:
        known: Tensors that are not to be counted.

    Attributes:
        alive: Bytes that live now.
        peak: The most that lived at once.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    """Really computes what no empty tensor takes part in.

    Args:
        fake: The mode that computes the rest.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation with data where all its inputs have data, and without where one has none."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        operation = func.overloadpacket
        if all(map(_has_data, tensors)):
            if not tensors and operation in CONTAINERS and _of_floats(kwargs):
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if operation in INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        args, kwargs = tree_map(self._emptied, (args, kwargs))
        return func(*args, **kwargs)

    def _emptied(self, leaf: Any) -> Any:
        return self._fake.from_tensor(leaf) if _has_data(leaf) else leaf


def _has_data(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)


def _of_floats(options: dict[str, Any]) -> bool:
    return (options.get("dtype") or torch.get_default_dtype()).is_floating_point


def _places(index: Any) -> Iterable[Any]:
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
