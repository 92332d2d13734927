"""Mllama (Llama 3.2 Vision): layers of its language model look at images beside the text, which has no places for them.

An image is one token of the text; what follows it, up to the next image, sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.utils import ModelOutput

from ..base.names import Inputs, Options
from ..batch.box_text import Seen
from ..model.sharding import others_wait_for
from .model import FamilyModel
from .processor import FamilyProcessor

IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Mllama(FamilyModel, GenerationMixin):
    """Mllama, whose own class wants images row by row, and lets a text see what fills up its row."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model.language_model.register_forward_pre_hook(leave_fillings_out, with_kwargs=True)

    def complete(self, inputs: Inputs) -> Inputs:
        """Features in place of the images, (B, K, D) for the row with most of them, and which token sees which image.

        Features that fill up a row are zero, and so are their keys and values. A batch of text alone runs the layers
        that look at images on such features, where other processes wait for them.
        """
        if inputs.get("cross_attention_states") is not None or inputs.get("past_key_values") is not None:
            return inputs
        found = {name: value for name, value in inputs.items() if name not in IMAGES}
        ids = inputs.get("input_ids")
        if inputs.get("pixel_values") is not None:
            features = self._features(*(inputs[name] for name in IMAGES))  # (N, T, P, D)
            tiles = inputs["aspect_ratio_mask"].flatten(0, 1)
            return {**found, **self._by_row(ids, features, tiles)}
        if ids is None or not others_wait_for(self.parameters(), self.training):
            return inputs
        path = [*self.model.vision_model.parameters(), *self.model.multi_modal_projector.parameters()]
        idle = self.idle_image_path() if others_wait_for(path, self.training) else 0.0
        table = self.get_input_embeddings().weight
        nothing = torch.zeros(len(ids), self.model.vision_model.num_patches, table.shape[1]).to(table)
        mask = torch.zeros(*ids.shape, 1, 1, dtype=torch.long, device=ids.device)
        return {**found, "cross_attention_states": nothing + idle, "cross_attention_mask": mask}

    def _by_row(self, ids: torch.Tensor, features: torch.Tensor, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of all images, and (N, T) which of their tiles are filled, put to the (B, S) rows that show them."""
        shown = ids == self.config.image_token_id
        assert int(shown.sum()) == len(features), f"{int(shown.sum())} image tokens, {len(features)} images"
        rows, places = shown.nonzero(as_tuple=True)
        order = shown.cumsum(1)
        number, most = order[rows, places] - 1, int(order[:, -1].max())
        states = features.new_zeros(len(ids), most, *features.shape[1:])
        states = states.index_put((rows, number), features)
        filled = tiles.new_zeros(len(ids), most, tiles.shape[1]).index_put((rows, number), tiles)
        # Images that follow each other are seen together, as its own processor has it.
        before = torch.nn.functional.pad(shown, (1, 0))[:, :-1]
        group = (shown & ~before).cumsum(1)
        groups = group.new_full((len(ids), most), -1).index_put((rows, number), group[rows, places])
        behind = order[..., None] > torch.arange(most, device=ids.device)
        sees = behind & (group[..., None] == groups[:, None])
        mask = sees[..., None].long() * filled[:, None]
        return {"cross_attention_states": states.flatten(1, 3), "cross_attention_mask": mask}

    def _features(
        self, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor
    ) -> torch.Tensor:
        """(N, T, P, D) of (N, 1, T, 3, H, W) images; as in MllamaModel.forward."""
        hidden = self.model.vision_model(
            pixel_values=pixel_values, aspect_ratio_ids=aspect_ratio_ids, aspect_ratio_mask=aspect_ratio_mask
        ).last_hidden_state
        return self.model.multi_modal_projector(hidden).squeeze(1).to(self.get_input_embeddings().weight.dtype)

    def image_path(self) -> tuple[nn.Module, str]:
        """See `FamilyModel.image_path`; the features are made before the model's own classes see a picture."""
        return self, "_features"

    def idle_image_path(self) -> torch.Tensor:
        """See `FamilyModel.idle_image_path`."""
        blank = self._blank_inputs()
        return self._features(*(blank[name] for name in IMAGES)).float().sum() * 0.0

    def base_output(self, **inputs: Any) -> Any:
        """See `FamilyModel.base_output`."""
        return self.base_model(**self.complete(inputs))

    @torch.no_grad()
    def generate(self, *args: Any, **inputs: Any) -> torch.Tensor | ModelOutput:
        """As the model's own."""
        return super().generate(*args, **self.complete(inputs))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Inputs:  # transformers looks for the name
        """As the model's own; features are looked at once and lie in the cache then."""
        found = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            found["cross_attention_states"] = None
        return found


def leave_fillings_out(module: nn.Module, args: tuple[Any, ...], kwargs: Options) -> tuple[Any, Options]:
    """Before the language model: a token ahead of its row's images sees all of these, as alone, but no filling.

    Its own class sets the mask of a token that sees nothing to one that sees everything: all images of the row (their
    unfilled tiles too), and what fills it up where another row of the batch has more.
    """
    mask, sees = kwargs.get("cross_attention_mask"), kwargs.get("full_text_row_masked_out_mask")
    states = kwargs.get("cross_attention_states")
    if mask is None or sees is None or states is None:
        return args, kwargs
    dtype = states.dtype
    lowest = torch.finfo(dtype).min
    filling = (states == 0).all(-1)[:, None, None]  # (B, 1, 1, K)
    ahead = (sees == 0) & ~filling.all(-1, keepdim=True)
    mask = mask.clamp(min=lowest).to(dtype).masked_fill(ahead & filling, lowest)
    return args, {**kwargs, "cross_attention_mask": mask, "full_text_row_masked_out_mask": sees.to(dtype)}


class MllamaProcessor(FamilyProcessor):
    """Mllama: a token for an image, whatever its size; its tiles are looked at beside the text."""

    def expansion(self, size: tuple[int, int]) -> str:
        """The image's token."""
        return self.image_token

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """(N, 1, T, 3, H, W) `pixel_values` of RGB images, what their grid is, and which of their tiles are filled."""
        found = self.image_processor([[image] for image in images], return_tensors="pt") if images else {}
        return {name: found[name] for name in found if name in IMAGES}

    def seen(self, size: tuple[int, int]) -> Seen:
        """See `VLMProcessor.seen`: it cuts a picture into tiles."""
        return Seen.whole(size)

    def check_seen(self) -> None:
        """See `VLMProcessor.check_seen`: what is cut into tiles is the whole picture."""

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `VLMProcessor.grown_size`: the grid of its tiles."""
        side, most = self.image_processor.size["height"], self.image_processor.max_image_tiles
        return side * most, side
