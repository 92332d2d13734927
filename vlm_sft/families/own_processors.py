"""Processors of models whose own reads images in a way of its own, each for the reason that its class says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..base.names import Inputs
from .processor import FamilyProcessor


class FuyuProcessor(FamilyProcessor):
    """Fuyu, whose own processor cuts images into patches with torch where its image processor of PIL uses numpy."""

    def _read(self, images: Sequence[Image.Image]) -> tuple[Inputs, list[str]]:
        # As in transformers, models/fuyu/processing_fuyu.py, _process_images.
        given = self.image_processor(list(images), **self._image_options())
        size = self.image_processor.patch_size
        patches, texts = [], []
        for number, image in enumerate(given["images"]):
            height, width = (
                min(full, -(-int(given[f"image_unpadded_{side}s"][number]) // step) * step)
                for full, side, step in zip(
                    image.shape[-2:], ("height", "width"), (size.height, size.width), strict=True
                )
            )
            cut = self.image_processor.patchify_image(np.asarray(image)[..., :height, :width], size)
            patches.append(torch.from_numpy(np.ascontiguousarray(cut)))
            numbers = {"num_patches": len(cut), "row_width": width // size.width}
            texts.append(self.native.replace_image_token(given, number, **numbers))
        return {"pixel_values": torch.cat(patches)}, texts


class Idefics2Processor(FamilyProcessor):
    """Idefics2: so many features for an image and, where it is cut, for each of its four quarters before it."""

    one_shape = False

    def expansion(self, size: tuple[int, int]) -> str:
        """The places, with the token between two of its pictures that stands around images; for any size alike."""
        one = self.image_token * self.native.image_seq_len
        return self.native.fake_image_token.join([one] * (5 if self.image_processor.do_image_splitting else 1))

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """(N, P, 3, H, W) `pixel_values` of the pictures of RGB images, and (N, P, H, W) `pixel_attention_mask`."""
        return dict(self.image_processor([[image] for image in images], return_tensors="pt")) if images else {}


class Lfm2VlProcessor(FamilyProcessor):
    """LFM2-VL, whose own processor is told apart from the options of images whether to write tokens around them."""

    def _read(self, images: Sequence[Image.Image]) -> tuple[Inputs, list[str]]:
        around = {"use_image_special_tokens": self.native.use_image_special_tokens}
        return self.native._process_images(list(images), **around, **self._image_options())


class PerceptionLMProcessor(FamilyProcessor):
    """Perception LM: its class takes the tiles of all images in one sequence, its processor only of as many each."""

    one_shape = False

    def _read(self, images: Sequence[Image.Image]) -> tuple[Inputs, list[str]]:
        read = [super(PerceptionLMProcessor, self)._read([image]) for image in images]
        tiles = torch.cat([torch.as_tensor(inputs["pixel_values"]) for inputs, _ in read], 1)
        return {"pixel_values": tiles}, [text for _, texts in read for text in texts]


class Llama4Processor(FamilyProcessor):
    """Llama 4, whose own processor gives pixels rounded to bfloat16, in that type, which not every model has."""

    def _read(self, images: Sequence[Image.Image]) -> tuple[Inputs, list[str]]:
        inputs, texts = super()._read(images)
        return {**inputs, "pixel_values": inputs["pixel_values"].float()}, texts
