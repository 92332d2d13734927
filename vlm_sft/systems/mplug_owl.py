"""mPLUG-Owl's vision tower and abstractor (Ye et al. 2023, arXiv 2304.14178), with the names of its checkpoints.

Legend of shapes: N images, P tokens an image (class token first), Q query tokens, V vision width, R resampler width,
H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# The norms of the abstractor's attention keep torch's default, while the model is built with 1e-6.
ATTENTION_EPS = 1e-5


class MPLUGOwlVisionConfig(PreTrainedConfig):
    """Sizes of mPLUG-Owl's vision tower; the defaults are those of the published model."""

    model_type = "vlm_sft_mplug_owl_vision"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


class MPLUGOwlAbstractorConfig(PreTrainedConfig):
    """Sizes of mPLUG-Owl's abstractor; the defaults are those of the published model."""

    model_type = "vlm_sft_mplug_owl_abstractor"

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    encoder_hidden_size: int = 1024
    layer_norm_eps: float = 1e-6


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(N, H, Q, D), (N, H, P, D), (N, H, P, D) → (N, Q, H × D)."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class InterleavedAttention(nn.Module):
    """Self-attention whose joint projection holds query, key and value of one head after another.

    Args:
        width: V.
        heads: H.
        names: What the checkpoint calls the joint and the last projection.
    """

    def __init__(self, width: int, heads: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.heads, self.names = heads, names
        self.add_module(names[0], nn.Linear(width, 3 * width))
        self.add_module(names[1], nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, P, V)."""
        joint, last = (self.get_submodule(name) for name in self.names)
        n, tokens, width = hidden.shape
        mixed = joint(hidden).view(n, tokens, self.heads, 3, width // self.heads)
        query, key, value = mixed.permute(3, 0, 2, 1, 4)
        return last(attend(query, key, value))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, P, V)."""
        inner = self.fc1(hidden)
        return self.fc2(inner * torch.sigmoid(1.702 * inner))  # QuickGELU


class _VisionLayer(nn.Module):
    def __init__(self, config: MPLUGOwlVisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.self_attn = InterleavedAttention(width, config.num_attention_heads, ("query_key_value", "dense"))
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.mlp = _MLP(width, config.intermediate_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, P, V)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: MPLUGOwlVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2 + 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, height, width) → (N, P, V), class token first."""
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.pre_layernorm(tokens + self.position_embedding)


class MPLUGOwlVisionModel(PreTrainedModel):
    """A ViT with a class token, norms before and after its layers, and QuickGELU."""

    config_class = MPLUGOwlVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False

    def __init__(self, config: MPLUGOwlVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = _VisionEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(_VisionLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: Any) -> BaseModelOutput:
        """(N, 3, height, width) → (N, P, V) after the final norm, and per layer before it when asked for."""
        states = [self.embeddings(pixel_values)]
        for layer in self.encoder["layers"]:
            states.append(layer(states[-1]))
        return BaseModelOutput(
            last_hidden_state=self.post_layernorm(states[-1]),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class _GatedMLP(nn.Module):
    """SwiGLU with a norm before the last layer."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, Q, R) → (N, Q, R)."""
        return self.w2(self.ffn_ln(F.silu(self.w1(hidden)) * self.w3(hidden)))


class _AbstractorLayer(nn.Module):
    """Queries read themselves and the image at once; the residual is the normed query, not the query."""

    def __init__(self, config: MPLUGOwlAbstractorConfig) -> None:
        super().__init__()
        width, source = config.hidden_size, config.encoder_hidden_size
        self.heads = config.num_attention_heads
        self.crossattention = nn.ModuleDict(
            {
                "attention": nn.ModuleDict(
                    {
                        "query": nn.Linear(width, width),
                        "key": nn.Linear(source, width),
                        "value": nn.Linear(source, width),
                    }
                ),
                "norm1": nn.LayerNorm(width, ATTENTION_EPS),
                "normk": nn.LayerNorm(source, ATTENTION_EPS),
                "output": nn.ModuleDict(
                    {
                        "out_proj": nn.Linear(width, width),
                        "norm2": nn.LayerNorm(width, ATTENTION_EPS),
                        "mlp": _GatedMLP(width, config.intermediate_size, config.layer_norm_eps),
                    }
                ),
            }
        )

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(N, Q, R) queries and (N, P, V) image features → (N, Q, R)."""
        cross: Any = self.crossattention
        queries = cross["norm1"](queries)
        seen = torch.cat([queries, cross["normk"](features)], dim=1)
        sources = {"query": queries, "key": seen, "value": seen}
        split = [cross["attention"][n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n, x in sources.items()]
        output = cross["output"]
        queries = queries + output["out_proj"](attend(*split))
        return queries + output["mlp"](output["norm2"](queries))


class AbstractorResampler(nn.Module):
    """mPLUG-Owl's abstractor up to its `visual_fc`, which is the projector (`linear_end`).

    Args:
        config: Its sizes; `encoder_hidden_size` is V, `hidden_size` is R, and the two are equal.
        num_query_tokens: Q.
    """

    def __init__(self, config: MPLUGOwlAbstractorConfig, num_query_tokens: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        layers = nn.ModuleList(_AbstractorLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, P, V) → (N, Q, R), in the dtype of `features`."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        for layer in self.encoder["layers"]:  # type: ignore[union-attr]
            queries = layer(queries, features.to(queries.dtype))
        return queries.to(features.dtype)
