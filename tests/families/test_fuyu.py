"""Fuyu's patches: the pixels of an image, row by row."""

from __future__ import annotations

import torch
from PIL import Image

from support.tiny_families import processor_of


def test_fuyus_patches_are_cut_row_by_row():
    processor, image = processor_of("fuyu"), Image.effect_noise((40, 30), 90).convert("RGB")
    ours = processor.image_inputs([image])["pixel_values"]
    (pixels,) = processor.image_processor([image], return_tensors="pt")["images"]
    patches = torch.nn.functional.unfold(pixels.view(1, 3, 56, 56)[..., :42, :42], 14, stride=14)[0].T
    # unfold has the channel first, Fuyu has it last.
    assert torch.equal(ours, patches.view(9, 3, 14, 14).permute(0, 2, 3, 1).reshape(9, -1))
