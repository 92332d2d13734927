"""In which types the parts of a recipe's model are kept, and a tower that overflows in one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from ..pieces.piece import specs_of
from ..recipe.libraries import computes_in

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

# EVA ViT-g, with which BLIP-2's loss became infinite in fp16 (LAVIS#267); upstream trains it under loss scaling.
OVERFLOWING = ("blip_2_vision_model", "instructblip_vision_model")


def dtype_of(recipe: Recipe, part: str) -> torch.dtype:
    """Type of a part's weights: the recipe's, else fp32 where it is trained, else what the run computes in.

    What is trained stays in fp32 under autocast: bf16 weights lose small updates.
    """
    if name := getattr(specs_of(recipe).get(part), "dtype", None):
        return getattr(torch, name)
    return torch.float32 if part in recipe.train else getattr(torch, computes_in(recipe))


def dtypes_of(recipe: Recipe) -> dict[str, torch.dtype]:
    """Piece → type of its weights."""
    return {part: dtype_of(recipe, part) for part in specs_of(recipe)}


def precision_warning(recipe: Recipe, config: PreTrainedConfig) -> str | None:
    """One sentence when fp16 is asked for with a vision tower that is known to overflow in it, else None."""
    tower = specs_of(recipe).get("vision_tower")
    if tower is None:
        return None
    kind = config.vision_config.model_type
    autocast = getattr(torch, computes_in(recipe))
    if kind not in OVERFLOWING or torch.float16 not in (dtype_of(recipe, "vision_tower"), autocast):
        return None
    return (
        f"fp16 with the vision tower of {tower.pretrained}: this ViT is known to overflow in fp16 "
        f"(LAVIS#267), and the loss becomes NaN or infinite then; use sft.bf16=true, or fp32 (sft.fp16=false "
        f"sft.bf16=false) where the device has no bf16."
    )
