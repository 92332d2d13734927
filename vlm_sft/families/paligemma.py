"""PaliGemma, which reads its prompt in both directions."""

from __future__ import annotations

import torch
from transformers.masking_utils import create_causal_mask

from ..base.errors import UserError
from ..model.positions import row_numbers
from .model import FamilyModel


class PaliGemma(FamilyModel):
    """PaliGemma, whose own class would let the prompts of all packed rows see each other."""

    def kept_apart(
        self, inputs: dict[str, torch.Tensor], row_lengths: torch.Tensor, row_heads: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """See `FamilyModel.kept_apart`; with the whole mask, in which the prompt of each row is a block of its own.

        Raises:
            UserError: Some layers look back less far than the packs are long, and one mask is not enough (PaliGemma 2).
        """
        assert row_heads is None, "the table says why its rows share no image"
        found = super().kept_apart(inputs, row_lengths)
        config, types = self.config.get_text_config(), inputs["token_type_ids"]
        window, length = getattr(config, "sliding_window", None), types.shape[1]
        if window and length > window:
            raise UserError(
                f"sft.packing: layers of this model look back {window:,} tokens, and packs are longer; set "
                f"sft.max_length={window} or less, or sft.packing=false."
            )
        mask = create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(
                *types.shape, 1, dtype=self.get_input_embeddings().weight.dtype, device=types.device
            ),
            attention_mask=None,
            past_key_values=None,
            position_ids=found["position_ids"],
            block_sequence_ids=torch.where(types == 0, row_numbers(row_lengths, length), -1),
        )
        return {**found, "attention_mask": mask}
