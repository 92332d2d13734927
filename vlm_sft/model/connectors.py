"""Resamplers and projectors: what stands between the vision tower and the language model.

Modules take plain integers; nothing here reads a recipe. A new kind is one class and one line in `PROJECTORS`
(or `RESAMPLERS`).

Legend of shapes: N images, P tokens an image, Q query tokens, V vision width, R resampler width, D language
model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    PreTrainedConfig,
)
from transformers.activations import ACT2FN
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ..base.errors import UserError
from ..base.names import Values
from ..systems.mplug_owl import AbstractorResampler
from ..systems.qwen_vl import CrossAttentionResampler


class LinearProjector(nn.Module):
    """One linear layer (BLIP-2's `language_projection`, MiniGPT-4's `llama_proj`).

    Args:
        in_features: Width that arrives, V or R.
        out_features: Width of the language model, D.
    """

    bias = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=self.bias)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer whose scale decides the scale of the output."""
        return self.linear

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, in_features) → (N, P, out_features)."""
        return self.linear(features)


class LinearNoBiasProjector(LinearProjector):
    """One matrix (Qwen-VL's `proj`)."""

    bias = False


class LinearEndProjector(LinearProjector):
    """One linear layer, and a learned token that ends the image (mPLUG-Owl's `visual_fc` and `vit_eos`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.end = nn.Parameter(torch.randn(1, 1, out_features) * 0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, in_features) → (N, P + 1, out_features)."""
        return torch.cat([self.linear(features), self.end.expand(len(features), -1, -1)], dim=1)


class MLPProjector(nn.Module):
    """LLaVA-1.5's `mlp{depth}x_gelu`: linear layers with an activation between them.

    Args:
        in_features: Width that arrives, V or R.
        out_features: Width of the language model, D; every layer after the first keeps it.
        depth: Number of linear layers (LLaVA-1.5: 2).
        activation: Name in transformers' `ACT2FN`.
    """

    def __init__(self, in_features: int, out_features: int, depth: int = 2, activation: str = "gelu") -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"stack.projector.depth is {depth}, but an mlp projector needs at least 1 layer.")
        if activation not in ACT2FN:
            raise UserError(
                f"stack.projector.activation: transformers has no activation {activation!r}; use one of "
                f"{', '.join(sorted(ACT2FN)[:12])}, …"
            )
        widths = [in_features] + [out_features] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = ACT2FN[activation]

    @property
    def last_linear(self) -> nn.Linear:
        """The layer whose scale decides the scale of the output."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, in_features) → (N, P, out_features)."""
        for i, layer in enumerate(self.layers):
            features = layer(features if i == 0 else self.activation(features))
        return features


class MLPNormProjector(MLPProjector):
    """Yi-VL's `mlp{depth}x_gelu_Norm`: a norm behind each linear layer, before the activation."""

    def __init__(self, in_features: int, out_features: int, depth: int = 2, activation: str = "gelu") -> None:
        super().__init__(in_features, out_features, depth, activation)
        self.norms = nn.ModuleList(nn.LayerNorm(out_features) for _ in self.layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, in_features) → (N, P, out_features)."""
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            features = norm(layer(features if i == 0 else self.activation(features)))
        return features


class PixelShuffleProjector(nn.Module):
    """Folds each `scale_factor`² square of patches into one token, then one linear layer (Idefics3, SmolVLM).

    Args:
        in_features: Width that arrives, V.
        out_features: Width of the language model, D.
        scale_factor: Side of the folded square; the number of tokens falls by its square.
    """

    def __init__(self, in_features: int, out_features: int, scale_factor: int = 2) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.linear = nn.Linear(in_features * scale_factor**2, out_features, bias=False)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer whose scale decides the scale of the output."""
        return self.linear

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) with P a square → (N, P / scale_factor², out_features).

        Raises:
            UserError: P is no square, or its side cannot be divided by `scale_factor`.
        """
        n, tokens, width = features.shape
        side, factor = math.isqrt(tokens), self.scale_factor
        if side * side != tokens or side % factor:
            raise UserError(
                f"The pixel_shuffle projector needs a square grid of patches whose side can be divided by "
                f"scale_factor {factor}, but the vision tower gives {tokens} tokens an image; "
                f"set vision_tower.feature_select: patch (drops the class token) or another scale_factor."
            )
        grid = features.view(n, side // factor, factor, side // factor, factor, width)
        grid = grid.permute(0, 1, 3, 2, 4, 5).reshape(n, (side // factor) ** 2, factor * factor * width)
        return self.linear(grid)


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


class QFormerResampler(nn.Module):
    """BLIP-2's Q-Former: learned queries read the image by cross-attention (Li et al. 2023, arXiv 2301.12597).

    Args:
        config: transformers' configuration of the Q-Former; `encoder_hidden_size` is V, `hidden_size` is R.
        num_query_tokens: Q, the number of tokens an image becomes.
    """

    def __init__(self, config: Blip2QFormerConfig, num_query_tokens: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, Q, R), in the dtype of `features`."""
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        output = self.qformer(query_embeds=queries, encoder_hidden_states=features.to(queries.dtype))
        return output.last_hidden_state.to(features.dtype)


class InstructQFormerResampler(nn.Module):
    """InstructBLIP's Q-Former: its queries also read the instruction (Dai et al. 2023, arXiv 2305.06500).

    Args:
        config: transformers' configuration of the Q-Former; `encoder_hidden_size` is V, `hidden_size` is R.
        num_query_tokens: Q, the number of tokens an image becomes.
    """

    reads_instruction = True

    def __init__(self, config: InstructBlipQFormerConfig, num_query_tokens: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(config)

    def forward(
        self,
        features: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries and instruction read each other; the queries read the image.

        Args:
            features: (N, P, V).
            qformer_input_ids: (N, L) the instruction of each image, in the Q-Former's own vocabulary.
            qformer_attention_mask: (N, L), 1 for tokens and 0 for padding; default all ones.

        Returns:
            (N, Q, R) the queries' outputs alone, in the dtype of `features`.
        """
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        mask = torch.cat([qformer_attention_mask.new_ones(queries.shape[:2]), qformer_attention_mask], dim=1)
        output = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=features.to(queries.dtype),
        )
        return output.last_hidden_state[:, : queries.shape[1]].to(features.dtype)


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "linear_end": LinearEndProjector,
    "linear_no_bias": LinearNoBiasProjector,
    "mlp": MLPProjector,
    "mlp_norm": MLPNormProjector,
    "pixel_shuffle": PixelShuffleProjector,
}
RESAMPLERS: dict[str, type[nn.Module]] = {
    "qformer": QFormerResampler,
    "instruct_qformer": InstructQFormerResampler,
    "abstractor": AbstractorResampler,
    "cross_attention": CrossAttentionResampler,
}


def build_projector(
    kind: str, in_features: int, out_features: int, tiles: Values | None = None, **options: object
) -> nn.Module:
    """Makes a projector of a kind of `PROJECTORS`, with random weights, between two widths.

    Args:
        kind: A key of `PROJECTORS`.
        in_features: Width that arrives, V or R.
        out_features: Width of the language model, D.
        tiles: `VLMConfig.tiles`; of `anyres`, the projector has a `TileLayout` in its attribute `layout`.
        **options: Those of its kind.

    Raises:
        UserError: The kind is unknown.
    """
    if kind not in PROJECTORS:
        raise UserError(f"stack.projector.type {kind!r} is unknown; use one of {', '.join(PROJECTORS)}.")
    projector = PROJECTORS[kind](in_features, out_features, **options)
    if tiles is not None and tiles["type"] == "anyres":
        projector.layout = TileLayout(out_features, tiles["side"], tiles["grids"])
    return projector


def build_resampler(kind: str, config: PreTrainedConfig, num_query_tokens: int) -> nn.Module:
    """Makes a resampler of a kind of `RESAMPLERS` from its configuration, with random weights."""
    if kind not in RESAMPLERS:
        raise UserError(f"stack.resampler.type {kind!r} is unknown; use one of {', '.join(RESAMPLERS)}.")
    return RESAMPLERS[kind](config, num_query_tokens)
