"""KOSMOS-2: latent queries of an image in a frame of two tokens, and no inner module below its head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.utils import ModelOutput

from ..base.names import Inputs
from .model import FamilyModel
from .processor import FamilyProcessor


class Kosmos2(FamilyModel):
    """KOSMOS-2, which has no inner module below its head, and takes no batch of text alone."""

    followers = ("embed_positions.weights",)

    def complete(self, inputs: Inputs) -> Inputs:
        """Features of the images in place of the images, of none where there is none."""
        if inputs.get("image_embeds") is not None:
            return inputs
        pixels = inputs.get("pixel_values")
        # None of a blank image's: the image path is run all the same, as on processes that have images.
        features = self._features(**self._blank_inputs())[:0] if pixels is None else self._features(pixels)
        return {**{name: value for name, value in inputs.items() if name != "pixel_values"}, "image_embeds": features}

    def image_path(self) -> tuple[nn.Module, str]:
        """See `FamilyModel.image_path`; the features are made before the model's own classes see a picture."""
        return self, "_features"

    def base_output(self, **inputs: Any) -> Any:
        """See `FamilyModel.base_output`."""
        return self.text_model.model(**self.complete(inputs))

    @torch.no_grad()
    def generate(self, *args: Any, **inputs: Any) -> torch.Tensor | ModelOutput:
        """As the model's own, also for text alone."""
        return super().generate(*args, **self.complete(inputs))

    def enable_input_require_grads(self) -> None:
        """As the model's own; images are written into the embeddings in place, which a leaf of the graph refuses."""
        super().enable_input_require_grads()
        copy = self.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.clone())
        self._require_grads_hooks.append(copy)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # As in Kosmos2ForConditionalGeneration.forward.
        hidden = self.vision_model(pixel_values.to(self.vision_model.dtype))[0]
        hidden = nn.functional.normalize(self.vision_model.model.post_layernorm(hidden), dim=-1)
        return self.image_to_text_projection(hidden)[0].to(self.get_input_embeddings().weight.dtype)


class Kosmos2Processor(FamilyProcessor):
    """KOSMOS-2, whose own processor takes one image at the head of a text: features in a frame of two tokens."""

    def expansion(self, size: tuple[int, int]) -> str:
        """The frame, and as many placeholders in it as there are latent queries."""
        return self.image_token * (1 + self.native.num_image_tokens) + self.native.eoi_token

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) `pixel_values` of RGB images."""
        return dict(self.image_processor(list(images), return_tensors="pt")) if images else {}

    @property
    def ids_per_image(self) -> int:
        """The frame has one; the features stand at other ids."""
        return 1

    @property
    def box_grid(self) -> int:
        """Cells of a side: so many tokens it has for them."""
        return math.isqrt(self.native.num_patch_index_tokens)

    def _placeholder(self) -> str:
        return self.native.boi_token

    def _image_token(self, token: int, position: int) -> tuple[int, bool]:
        # As upstream: the features stand at the first ids after <unk>.
        inside = 1 <= position <= self.native.num_image_tokens
        return (self.tokenizer.unk_token_id + position, True) if inside else (token, False)
