"""A layer of BERT that reads another stream too, in both directions, as VLE and mPLUG have it.

transformers' own has cross-attention in decoders alone. Shapes: B rows, S and S' tokens of the two streams, D width.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput


class CrossLayer(GradientCheckpointingLayer):
    """Reads its own stream and then the other one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        own: torch.Tensor,
        own_mask: torch.Tensor,
        other: torch.Tensor | None = None,
        other_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S, D), the other (B, S', D) or none, and what is added to the scores of each; returns (B, S, D)."""
        own = self.attention(own, own_mask)[0]
        if other is not None:
            own = self.crossattention(own, encoder_hidden_states=other, encoder_attention_mask=other_mask)[0]
        return self.output(self.intermediate(own), own)


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, S) of ones and zeros → (B, 1, 1, S), what is added to scores."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
