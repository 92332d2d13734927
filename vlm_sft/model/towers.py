"""What a vision tower gives, as one row a place: encoders without a class token, grids, and one that drops patches.

Also what anyres makes of it, where an image is cut into tiles; I images are N tiles then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ..base.names import INSTRUCTION, Values
from .configuration import VLMConfig, count_patches
from .freeze import part_modules


def keep_all_patches(tower: nn.Module) -> nn.Module:
    """ViT-MAE drops and shuffles patches at random, in evaluation too; as a tower it gives all of them in order."""
    embeddings: Any = getattr(tower, "embeddings", None)
    if hasattr(embeddings, "random_masking"):
        embeddings.random_masking = _all_patches
    return tower


def _all_patches(
    sequence: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.arange(sequence.shape[1], device=sequence.device).expand(sequence.shape[:2])
    return sequence, torch.zeros(sequence.shape[:2], device=sequence.device), order


def see(tower: nn.Module, config: VLMConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a stack takes from its tower: (N, 3, H, W) → (N, P, V)."""
    pixel_values = pixel_values.to(tower.dtype)
    whole = config.vision_feature_select != "patch"
    patches = 0 if whole else count_patches(config.tower, *pixel_values.shape[-2:])
    return read_features(tower, pixel_values, config.vision_feature_layer, config.tower_width, patches)


def resample(resampler: nn.Module, features: torch.Tensor, **instruction: torch.Tensor | None) -> torch.Tensor:
    """(N, P, V) of a tower → (N, Q, R).

    Raises:
        ValueError: The resampler reads the instruction and there is none, or not one for each image.
    """
    if getattr(resampler, "reads_instruction", False):
        ids = instruction.get("qformer_input_ids")
        if ids is None or len(ids) != len(features):
            raise ValueError(
                f"The resampler reads the instruction of each image: give qformer_input_ids with {len(features)} "
                f"rows (got {'none' if ids is None else len(ids)}); the processor makes them."
            )
    else:
        instruction = {}
    # In the type of its own weights, fp32 by default, also under autocast: in fp16 a Q-Former is known to diverge
    # (LAVIS#267), and it must give in training what it gives later.
    with torch.autocast(features.device.type, enabled=False):
        return resampler(features, **instruction)


def read_features(tower: nn.Module, pixel_values: torch.Tensor, layer: int, width: int, patches: int) -> torch.Tensor:
    """Images → features (N, P, V).

    Args:
        tower: The vision tower.
        pixel_values: (N, 3, H, W).
        layer: -1 for what the tower gives at last, any other number for `hidden_states[number]`.
        width: V; says which axis of a grid holds the features.
        patches: How many are kept, from the end (a class token stands in front); 0 for all.
    """
    output = tower(pixel_values, output_hidden_states=layer != -1)
    features = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    if features.dim() == 4:
        features = features.flatten(2).transpose(1, 2) if features.shape[1] == width else features.flatten(1, 2)
    return features[:, -patches:] if patches else features


def width_of(features: torch.Size, height: int, width: int) -> int:
    """V of what a tower gives for an image of this size: (N, P, V), or a grid (N, V, H', W') or (N, H', W', V).

    Raises:
        ValueError: It is neither.
    """
    if len(features) == 3:
        return features[2]
    if len(features) != 4:
        raise ValueError(f"it gives features of the shape {tuple(features)}, not one row a place")
    _, a, b, c = features
    # The two axes that are shaped like the image hold the patches.
    first, last = b * width == c * height, a * width == b * height
    return c if last and not first else a


def tiles_in(size: Sequence[int], side: int, grids: Sequence[Sequence[int]]) -> int:
    """Tiles that anyres cuts an image of (height, width) pixels into, with the picture of all; see `TileLayout`."""
    return image_size_to_num_patches(list(size), list(grids), side)


def tokens_in(size: Sequence[int], tokens: int, side: int, grids: Sequence[Sequence[int]]) -> int:
    """Tokens of an image of (height, width) pixels that anyres cuts into tiles of `tokens` each."""
    rows, columns = get_anyres_image_grid_shape(list(size), list(grids), side)
    edge = math.isqrt(tokens)
    seen = unpad_image(torch.empty(1, rows * edge, columns * edge, device="meta"), list(size))
    return tokens + seen.shape[1] * (seen.shape[2] + 1)


class TileLayout(nn.Module):
    """LLaVA-1.6's anyres: the tiles of an image beside each other as they were cut, a learned feature behind each line.

    It is a part of the projector, behind it. Cutting and counting are transformers' own, of `LlavaNextModel`.

    Args:
        width: Width of the language model, D.
        side: Pixels of a tile's side.
        grids: (height, width) in pixels of each size that an image may be cut into.
    """

    def __init__(self, width: int, side: int, grids: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.side, self.grids = side, [list(grid) for grid in grids]
        self.newline = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, features: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        """(N, T, D) of all tiles → (tokens of all images, D).

        Args:
            features: Of each image first the picture of all, then its tiles line by line.
            image_sizes: (I, 2) height and width of each image in pixels; None for one tile that was cut of nothing.

        Raises:
            ValueError: They ask for another number of tiles.
        """
        if image_sizes is None:
            return torch.cat([features.flatten(0, 1), self.newline[None].to(features.dtype)])
        sizes = image_sizes.tolist()
        tiles = [tiles_in(size, self.side, self.grids) for size in sizes]
        if sum(tiles) != len(features):
            raise ValueError(
                f"The batch has {len(features)} tiles, but images of these sizes (image_sizes) are cut into "
                f"{sum(tiles)}: give both as the processor makes them."
            )
        images = zip(features.split(tiles), sizes, strict=True)
        return torch.cat([self._lay_out(image, size) for image, size in images])

    def _lay_out(self, image: torch.Tensor, size: list[int]) -> torch.Tensor:
        rows, columns = get_anyres_image_grid_shape(size, self.grids, self.side)
        edge = math.isqrt(image.shape[1])
        grid = image[1:].view(rows, columns, edge, edge, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        grid = unpad_image(grid, size)
        ends = self.newline[:, None, None].expand(-1, grid.shape[1], 1).to(grid.dtype)
        return torch.cat([image[0], torch.cat([grid, ends], dim=2).flatten(1).transpose(0, 1)])


def fails_on_pictures(model: nn.Module, inputs: Values, error: Exception) -> bool:
    """Whether an error is that of a batch's pictures: raised before the language model, and not for a blank picture.

    Args:
        model: The model, on this process as a whole.
        inputs: The batch.
        error: What the model raised.
    """
    parts = {part: module for part, (_, module) in part_modules(model).items() if part != "language_model"}
    path = {id(module) for part in parts.values() for module in part.modules()}
    trace = error.__traceback__
    while trace is not None and id(trace.tb_frame.f_locals.get("self")) not in path:
        trace = trace.tb_next
    if trace is None:
        return False
    idle = getattr(model, "idle_image_path", None)
    try:
        with torch.no_grad():
            if idle is not None:
                idle()
            else:
                instruction = {name: inputs[name][:1] for name in INSTRUCTION if name in inputs}
                name = "pixel_values" if "pixel_values" in inputs else "image_features"
                model.get_image_features(**{name: torch.zeros_like(inputs[name][:1])}, **instruction)
    except Exception:
        return False
    return True
