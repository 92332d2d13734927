"""How a stack answers: what transformers' `generate` is given, with images, beams and positions of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from ..base.names import INSTRUCTION, Inputs, Options
from .configuration import VLMConfig
from .positions import own_positions
from .towers import tiles_in, tokens_in


class Answering(GenerationMixin):
    """Generation of a stack, whose language model may have `own_positions`, or an encoder for the prompt."""

    def generation_inputs(self, batch: dict[str, torch.Tensor], beams: int) -> Inputs:
        """What `generate` takes of a batch. No ids: a penalty on repetition would look up the placeholder's in vain.

        An encoder–decoder reads its prompt once, whatever the beams, and writes on from `decoder_input_ids`.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        given = {name: batch.get(name) for name in (*INSTRUCTION, "image_features", "image_sizes")}
        embeds = self.model.embed(ids, batch.get("pixel_values"), **given)
        lm = self.model.language_model
        if self.config.is_encoder_decoder:
            read = lm.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
            return {"encoder_outputs": read, "attention_mask": mask, "decoder_input_ids": batch["decoder_input_ids"]}
        positions = own_positions(lm, ids, mask)
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: Options) -> torch.Tensor:
        found = None
        if inputs_tensor.dim() == 2:
            found = own_positions(self.model.language_model, inputs_tensor, model_kwargs.get("attention_mask"))
        usual = super()._prepare_position_ids_for_generation
        return usual(inputs_tensor, model_kwargs) if found is None else found

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, Inputs]:
        """Repeats rows for beams; the images of a row are repeated together, not one by one."""
        names = ("pixel_values", "image_sizes", *INSTRUCTION)
        images = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
        if images and input_ids is not None and expand_size > 1:
            tokens, sizes = (input_ids == self.config.image_token_id).sum(1), images.get("image_sizes")
            counts = tiles = tokens // max(self.config.num_image_tokens, 1)
            if sizes is not None:
                counts, tiles = _of_rows(tokens, sizes, self.config)
            for name, tensor in images.items():
                rows = tensor.split((counts if name == "image_sizes" else tiles).tolist())
                images[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return ids, {**kwargs, **images}


def _of_rows(tokens: torch.Tensor, sizes: torch.Tensor, config: VLMConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """How many images, and how many tiles, each row has, by its image tokens: (B,) and (B,).

    Args:
        tokens: (B,) image tokens of each row.
        sizes: (I, 2) height and width in pixels of the images of all rows.
        config: Of the stack, which lays tiles out.
    """
    assert config.tiles is not None
    side, grids = config.tiles["side"], config.tiles["grids"]
    lengths = torch.tensor([tokens_in(size, config.num_image_tokens, side, grids) for size in sizes.tolist()])
    rows = torch.searchsorted(tokens.cpu().cumsum(0), lengths.cumsum(0))
    tiles = torch.tensor([tiles_in(size, side, grids) for size in sizes.tolist()])
    counts = torch.zeros(2, len(tokens), dtype=torch.long)
    return counts[0].index_add(0, rows, torch.ones_like(tiles)), counts[1].index_add(0, rows, tiles)
