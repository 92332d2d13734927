"""The layers of which a model is a stack, and parameters of which each process holds a share: FSDP2's DTensors and
DeepSpeed's partitions.

Shares are put together to be saved, one after the other and only those that a bundle holds, and cut again when a bundle
is loaded. Every process must take part: one that does not call these functions lets the others wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

VARIANTS = 64
"""Of a compiled layer, at most: with a mask or without, of one row, first (its input takes no gradient), evaluating."""


def is_sharded(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any process holds only a share of any of these, so that using one takes all processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters)


def others_wait_for(parameters: Iterable[torch.Tensor], training: bool) -> bool:
    """Whether other processes wait for this one to use these, although its batch does not need them.

    They wait for its gradients (DeepSpeed#7170: ZeRO and DDP without end), or for its share of the weights; for that
    also where nothing is trained, and in an evaluation.
    """
    weights = list(parameters)
    return (training and any(p.requires_grad for p in weights)) or is_sharded(weights)


def repeated_layers(model: nn.Module) -> list[str]:
    """Names of the classes of which a model is a stack: what FSDP gathers, uses and gives back one after the other.

    transformers lists such classes in `_no_split_modules`, but also those of parts that a composed model lacks (a text
    encoder's embeddings), on which accelerate stops, and attentions without the rest of their layer.
    """
    return sorted({type(layers[0]).__name__ for layers in _stacks(model)})


def compile_layers(model: nn.Module, **options: Any) -> list[str]:
    """Has `torch.compile` compile each layer of a model when it is first used, and gives the names of their classes.

    Layers of a class share what is compiled, and lengths stay open in it, so that another length, batch or layer
    compiles nothing anew. Names of weights stay, and hooks of DDP, FSDP and checkpointing run as before.

    Args:
        model: A language model, or any other stack of layers.
        **options: Of `torch.compile`: `backend`, `mode`.
    """
    found = _stacks(model)
    for layer in (layer for layers in found for layer in layers):
        layer.compile(dynamic=True, recompile_limit=VARIANTS, **options)
    return sorted({type(layers[0]).__name__ for layers in found})


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers of one class, which is none of torch's or PEFT's own."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            kinds = {type(layer) for layer in module}
            if len(kinds) == 1 and not kinds.pop().__module__.startswith(("torch.", "peft.")):
                found[name] = module
    return list(found.values())


@torch.no_grad()
def gather(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor] | None:
    """Whole parameters of a model whose engine keeps shares, or fp32 masters, of them.

    Args:
        model: The model as the engine left it, without DDP's or DeepSpeed's wrapper.
        wanted: Says by its name whether a parameter is needed.

    Returns:
        Name → whole tensor, on every process; None when no engine holds anything back and the model's own will do.
    """
    chosen = {name: p for name, p in model.named_parameters() if wanted(name)}
    if not is_sharded(chosen.values()) and not any(hasattr(p, "_hp_mapping") for p in chosen.values()):
        return None
    return {name: _whole(parameter) for name, parameter in chosen.items()}


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().cpu()
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return parameter.detach().cpu()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # DeepSpeed trains fp32 masters of its bf16 parameters; they are what was learned.
    if parameter.requires_grad and (master := safe_get_full_fp32_param(parameter)) is not None:
        return master.detach().cpu().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


@torch.no_grad()
def fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a whole tensor into a parameter, or into the shares of it.

    Args:
        target: A parameter, or a tensor of a state dict that shares its memory.
        value: The whole tensor, the same on every process.
    """
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        # Each process has read the same file and cuts its own share out of it: nothing is sent.
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(value)
