"""Fuyu: patches of an image, cut here, stand in the text row by row."""

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
