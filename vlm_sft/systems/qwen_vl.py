"""The vision tower and the resampler of the first Qwen-VL (Bai et al. 2023, arXiv 2308.12966), under its own names.

Legend of shapes: N images, P patches an image, Q query tokens, V vision width, R resampler width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .mplug_owl import InterleavedAttention
from .position_tables import resize_positions

# Every norm of both.
EPS = 1e-6
# The tower's position table is that of 16 × 16 patches, whatever the size of the image.
POSITIONS = 256


class QwenVLVisionConfig(PreTrainedConfig):
    """Sizes of Qwen-VL's vision tower; the defaults are those of the published model."""

    model_type = "vlm_sft_qwen_vl_vision"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14


class QwenVLResamplerConfig(PreTrainedConfig):
    """Sizes of Qwen-VL's resampler; the defaults are those of the published model."""

    model_type = "vlm_sft_qwen_vl_resampler"

    hidden_size: int = 4096
    num_attention_heads: int = 32
    encoder_hidden_size: int = 1664


def sincos_positions(width: int, tokens: int) -> torch.Tensor:
    """(tokens, width): sines and cosines of the column in the first half of the channels, of the row in the second."""
    side, quarter = math.isqrt(tokens), width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class _Block(nn.Module):
    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn = InterleavedAttention(width, config.num_attention_heads, ("in_proj", "out_proj"))
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, P, V)."""
        hidden = hidden + self.attn(self.ln_1(hidden))
        return hidden + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(hidden))))


class QwenVLVisionModel(PreTrainedModel):
    """A ViT without class token and without a norm after its layers."""

    config_class = QwenVLVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, EPS)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))}
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: Any) -> BaseModelOutput:
        """(N, 3, height, width) → (N, P, V), and per layer when asked for."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        states = [self.ln_pre(patches + resize_positions(self.positional_embedding, patches.shape[1]))]
        for block in self.transformer["resblocks"]:
            states.append(block(states[-1]))
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None
        )


class CrossAttentionResampler(nn.Module):
    """Qwen-VL's `attn_pool` and `ln_post`: learned queries read the image once; positions go to queries and keys alone.

    Args:
        config: Its sizes; `encoder_hidden_size` is V, `hidden_size` is R.
        num_query_tokens: Q, a square.
    """

    def __init__(self, config: QwenVLResamplerConfig, num_query_tokens: int) -> None:
        super().__init__()
        width, source = config.hidden_size, config.encoder_hidden_size
        self.query = nn.Parameter(torch.randn(num_query_tokens, width) * 0.02)
        self.kv_proj = nn.Linear(source, width, bias=False) if source != width else nn.Identity()
        self.attn = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, EPS) for _ in range(3))
        # Never trained: a buffer.
        self.register_buffer("pos_embed", sincos_positions(width, num_query_tokens))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, Q, R), before `ln_post`."""
        seen = self.ln_kv(self.kv_proj(features.to(self.query.dtype)))
        places = self.pos_embed.to(self.query.dtype)
        queries = (self.ln_q(self.query) + places).expand(len(features), -1, -1)
        keys = seen + resize_positions(places, seen.shape[1])
        return self.attn(queries, keys, seen, need_weights=False)[0]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, Q, R), in the dtype of `features`."""
        return self.ln_post(self.pool(features)).to(features.dtype)
