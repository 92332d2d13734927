"""In which types the parts of a recipe's model are kept, and a tower that overflows in one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.configuration import VLMConfig
from ..recipe.libraries import computes_in

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

# EVA ViT-g, with which BLIP-2's loss became infinite in fp16 (LAVIS#267); upstream trains it under loss scaling.
OVERFLOWING = ("blip_2_vision_model", "instructblip_vision_model")


def dtype_of(recipe: Recipe, part: str) -> torch.dtype:
    """Type of a part's weights: the recipe's, else fp32 where it is trained, else what the run computes in.

    What is trained stays in fp32 under autocast: bf16 weights lose small updates.
    """
    spec = recipe.model if part == "model" else getattr(recipe.stack, part)
    if name := getattr(spec, "dtype", None):
        return getattr(torch, name)
    return torch.float32 if part in recipe.train else getattr(torch, computes_in(recipe))


def precision_warning(recipe: Recipe, config: VLMConfig) -> str | None:
    """One sentence when fp16 is asked for with a vision tower that is known to overflow in it, else None."""
    if recipe.stack is None:
        return None
    kind = config.vision_config.model_type  # type: ignore[union-attr]
    autocast = getattr(torch, computes_in(recipe))
    if kind not in OVERFLOWING or torch.float16 not in (dtype_of(recipe, "vision_tower"), autocast):
        return None
    return (
        f"fp16 with the vision tower of {recipe.stack.vision_tower.pretrained}: this ViT is known to overflow in fp16 "
        f"(LAVIS#267), and the loss becomes NaN or infinite then; use sft.bf16=true, or fp32 (sft.fp16=false "
        f"sft.bf16=false) where the device has no bf16."
    )
