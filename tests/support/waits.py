"""Where the host would wait for a device: what asks a tensor for its values, and which code of ours asked.

On a CPU nothing waits, so that the questions themselves are counted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_sft

PACKAGE = Path(vlm_sft.__file__).parent
# What gives the host a value, or a tensor whose size depends on values.
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
COPYING = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}


class Waits:
    """A context that counts questions to tensors by the code that asked.

    Attributes:
        ours: `module.function: operation` → how often, of code of `vlm_sft` and what torch does for it.
        theirs: The same of other libraries, by their files.
        on: Whether it counts.
    """

    def __init__(self) -> None:
        self.ours: Counter[str] = Counter()
        self.theirs: Counter[str] = Counter()
        self.on = True
        self._modes = (_Operations(self), _Methods(self))

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        """Enters a question for the innermost code outside torch and this file."""
        if not self.on:
            return
        for frame in reversed(traceback.extract_stack(limit=60)):
            path = Path(frame.filename)
            if path == Path(__file__) or "torch" in path.parts or path.name.startswith("<"):
                continue
            kind = self.ours if path.is_relative_to(PACKAGE) else self.theirs
            kind[f"{path.stem}.{frame.name}: {what}"] += 1
            return


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in ASKING or by_mask:
            self.waits.note(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Copies to the host that are none on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPYING:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))
