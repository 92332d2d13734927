"""Models whose own class lacks something that training needs, each for the reason that its class says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput

from ..base.errors import UserError
from ..base.names import Inputs
from ..model.freeze import is_quantised_weight
from ..model.positions import row_numbers
from ..model.sharding import is_sharded
from .model import FamilyModel


class Ernie(FamilyModel):
    """ERNIE 4.5 VL, whose experts of images its own class leaves out where a batch has text alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if hasattr(module, "vision_moe"):  # a hook that stays: checkpoints run a layer again on the way back
                module.register_forward_hook(_add_idle_experts)

    def complete(self, inputs: Inputs) -> Inputs:
        """Without its own balance of the experts, which it cannot take of a cached step; training adds ours."""
        return {**inputs, "output_router_logits": False}


class Molmo2(FamilyModel):
    """Molmo2, whose own class adds what its projector makes to the embeddings, and takes both in one type alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.get_submodule("model.multi_modal_projector").register_forward_hook(self._as_embeddings)

    def _as_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: BaseModelOutput) -> BaseModelOutput:
        made = output.last_hidden_state
        assert made is not None
        return BaseModelOutput(last_hidden_state=made.to(self.get_input_embeddings().weight.dtype))


class Llama4(FamilyModel):
    """Llama 4, whose own class holds a whole causal language model: what that one's head reads is caught before it."""

    def base_output(self, **inputs: Any) -> Any:
        caught: list[Any] = []
        hook = self.get_submodule("language_model.model").register_forward_hook(
            lambda module, args, output: caught.append(output)
        )
        try:
            super().base_output(**inputs, logits_to_keep=1)  # one position is all that the head is asked for
        finally:
            hook.remove()
        return caught[0]

    def idle_image_path(self) -> torch.Tensor:
        features = self.get_image_features(**self._blank_inputs()).last_hidden_state
        return self.get_submodule("multi_modal_projector")(features).float().sum() * 0.0


class Gemma3n(FamilyModel):
    """Gemma 3n, whose own class clamps some weights whenever it trains, which those of few bits refuse."""

    def train(self, mode: bool = True) -> Gemma3n:
        """As any model; what would clamp quantised weights does not hear of it, and does nothing else in training."""
        super().train(mode)
        for module in self.modules():
            if hasattr(module, "correction_coefs") and is_quantised_weight(module.correction_coefs.weight):
                module.training = False
        return self


def _add_idle_experts(
    block: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero, as a function of the experts of images, added to what a block makes of text alone."""
    hidden, kinds = args
    experts = block.get_submodule("vision_moe")
    if (kinds is not None and kinds.any()) or not (block.training or is_sharded(experts.parameters())):
        return output
    made, routed = experts(hidden[:1, :1])
    return output[0] + (made.sum() + routed.sum()).to(hidden.dtype) * 0.0, output[1]


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
