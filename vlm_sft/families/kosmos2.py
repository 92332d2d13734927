"""KOSMOS-2: latent queries of an image in a frame of two tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from .processor import FamilyProcessor


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

    def _placeholder(self) -> str:
        return self.native.boi_token

    def _image_token(self, token: int, position: int) -> tuple[int, bool]:
        # As upstream: the features stand at the first ids after <unk>.
        inside = 1 <= position <= self.native.num_image_tokens
        return (self.tokenizer.unk_token_id + position, True) if inside else (token, False)
