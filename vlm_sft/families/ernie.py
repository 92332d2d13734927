"""ERNIE 4.5 VL, a mixture of experts of which some read images alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.names import Inputs
from ..model.sharding import is_sharded
from .model import FamilyModel


class Ernie(FamilyModel):
    """ERNIE 4.5 VL, whose experts of images its own class leaves out where a batch has text alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if hasattr(module, "vision_moe"):  # a hook that stays: checkpoints run a layer again on the way back
                module.register_forward_hook(_add_idle_experts)

    def complete(self, inputs: Inputs) -> Inputs:
        """Without its own balance of the experts, which it cannot take of a cached step; training adds ours."""
        return {**inputs, "output_router_logits": False}


def _add_idle_experts(
    block: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero, as a function of the experts of images, added to what a block makes of text alone."""
    hidden, kinds = args
    experts = block.get_submodule("vision_moe")
    if (kinds is not None and kinds.any()) or not (block.training or is_sharded(experts.parameters())):
        return output
    made, routed = experts(hidden[:1, :1])
    return output[0] + (made.sum() + routed.sum()).to(hidden.dtype) * 0.0, output[1]
