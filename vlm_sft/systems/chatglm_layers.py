"""Sizes and layers of ChatGLM-6B, first generation; `chatglm` has the models that are made of them.

Legend of shapes: B rows, S tokens, H heads, E width of a head, D width of the model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Upstream's block has a parameter for the number of layers and is made without it: its default holds at any depth.
RESIDUAL_SCALE = (2 * 28) ** 0.5
ROTARY_BASE = 10_000


class ChatGLMConfig(PreTrainedConfig):
    """Sizes of a ChatGLM-6B, under the names of its `config.json`; the defaults are those of VisualGLM-6B.

    Raises:
        ValueError: It is of a later generation, which has the same model type and another architecture.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    position_encoding_2d: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.position_encoding_2d or {"padded_vocab_size", "ffn_hidden_size"} & set(kwargs):
            raise ValueError(
                "only the first ChatGLM (ChatGLM-6B, VisualGLM-6B) is known here, and these are the sizes of a later "
                "one; later ones that were published for transformers have the model type `glm` or `glm4`"
            )
        super().__post_init__(**kwargs)


def rotations(positions: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine by which each head is turned, one half of it by each row of positions.

    Args:
        positions: (2, B, S) place and block of each token.
        width: E.
        dtype: Type of the result.

    Returns:
        Two tensors of the shape (B, 1, S, E).
    """
    half = width // 2
    rates = 1.0 / ROTARY_BASE ** (torch.arange(0, half, 2, device=positions.device).float() / half)
    rates = rates.half().float()  # as upstream keeps them: their rounding is part of what was trained
    angles = positions[..., None].float() * rates
    angles = torch.cat([*angles.repeat(1, 1, 1, 2)], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, S, E) → the same shape: the halves of each half of a head are the two sides of the planes it turns in."""
    one, two = states.unflatten(-1, (2, 2, -1)).unbind(-2)
    return states * cos + torch.stack([-two, one], dim=-2).flatten(-3) * sin


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `eager` attention: three times (B, H, S, E) → (B, S, H, E) and the (B, H, S, S') weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    """Self-attention whose joint projection holds query, key and value of one head after another."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, D) → (B, S, D), and the weights where the attention gives them."""
        mixed = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.dense(output.flatten(2)), weights


class ChatGLMMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) → (B, S, D)."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """Attention and MLP; the residual is the normed input, scaled, not the input."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, S, D) → (B, S, D)."""
        normed = self.input_layernorm(hidden_states)
        normed = self.post_attention_layernorm(normed * RESIDUAL_SCALE + self.attention(normed, **kwargs)[0])
        return normed * RESIDUAL_SCALE + self.mlp(normed)
