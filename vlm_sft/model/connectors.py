"""Resamplers and projectors: what stands between the vision tower and the language model.

Modules take plain integers; nothing here reads a recipe. A new kind is one class and one line in `PROJECTORS`
(or `RESAMPLERS`).

Legend of shapes: N images, P tokens an image, Q query tokens, V vision width, R resampler width, D language
model width.
"""

from __future__ import annotations

import math
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

from ..base.errors import UserError
from ..base.names import Values
from ..systems.mplug_owl import AbstractorResampler
from ..systems.qwen_vl import CrossAttentionResampler
from .towers import TileLayout


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
        """(N, P, V) with P a square → (N, P / scale_factor², out_features); see `fold`."""
        return self.linear(fold(features, self.scale_factor))


class PixelShuffleMLPProjector(MLPProjector):
    """InternVL's `mlp1`: the same squares of patches, then a norm and two linear layers with GELU between them.

    Args:
        in_features: Width that arrives, V.
        out_features: Width of the language model, D.
        scale_factor: Side of the folded square; the number of tokens falls by its square.
    """

    def __init__(self, in_features: int, out_features: int, scale_factor: int = 2) -> None:
        super().__init__(in_features * scale_factor**2, out_features)
        self.scale_factor = scale_factor
        self.norm = nn.LayerNorm(in_features * scale_factor**2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) with P a square → (N, P / scale_factor², out_features); see `fold`."""
        return super().forward(self.norm(fold(features, self.scale_factor)))


def fold(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Makes one of each `factor`² square of patches: (N, P, V) with P a square → (N, P / factor², factor² · V).

    Raises:
        UserError: P is no square, or its side cannot be divided by `factor`.
    """
    n, tokens, width = features.shape
    side = math.isqrt(tokens)
    if side * side != tokens or side % factor:
        raise UserError(
            f"The pixel_shuffle projector needs a square grid of patches whose side can be divided by "
            f"scale_factor {factor}, but the vision tower gives {tokens} tokens an image; "
            f"set vision_tower.feature_select: patch (drops the class token) or another scale_factor."
        )
    grid = features.view(n, side // factor, factor, side // factor, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(n, (side // factor) ** 2, factor * factor * width)


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
    "pixel_shuffle_mlp": PixelShuffleMLPProjector,
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
