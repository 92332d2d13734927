"""Tables of positions, for another number of patches than they were made for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Where towers keep theirs: BLIP-2, InstructBLIP and mPLUG-Owl; CLIP and SigLIP.
TABLES = ("embeddings.position_embedding", "embeddings.position_embedding.weight", "positional_embedding")


def resize_positions(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Bicubic resize of a square table of positions: (P', D) → (tokens, D), in its own dtype."""
    if len(table) == tokens:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(tokens)
    grid = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def fit_positions(table: torch.Tensor, shape: torch.Size, patches: int) -> torch.Tensor:
    """Resizes the patches of a tower's table and keeps the class token before them (LAVIS, `interpolate_pos_embed`).

    Args:
        table: (…, P', D) what the checkpoint has.
        shape: (…, P, D) what the tower needs.
        patches: How many of the P rows are patches, a square number.

    Returns:
        A table of `shape`; the same tensor where it has that shape, or where it is no square of patches.
    """
    extra = shape[-2] - patches
    old = table.shape[-2] - extra
    if table.shape == shape or old < 1 or math.isqrt(old) ** 2 != old:
        return table
    rows = table.reshape(-1, table.shape[-1])
    return torch.cat([rows[:extra], resize_positions(rows[extra:], patches)]).reshape(shape)
