"""Processors of models whose own reads images in a way of its own."""

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


def test_the_pictures_of_idefics2_are_its_own_processors_and_a_cut_image_is_five():
    image, messages = Image.effect_noise((40, 30), 90).convert("RGB"), [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "哪个更大？"}]}
    ]  # fmt: skip
    whole, cut = processor_of("idefics2", do_image_splitting=False), processor_of("idefics2")
    for processor, pictures in ((whole, 1), (cut, 5)):
        text = processor.render(messages, add_generation_prompt=True).text
        plain = text.replace("<fake_token_around_image>", "").replace("<image> ", "<image>")
        given = processor.native(images=[image, image], text=[plain], return_tensors="pt", add_special_tokens=False)
        ours = processor.batch([processor.encode_chat(messages, add_generation_prompt=True, sizes=[image.size] * 2)])
        assert torch.equal(ours["input_ids"], given["input_ids"])
        assert sum(ours["input_ids"][0] == processor.image_token_id) == 2 * pictures * processor.native.image_seq_len
        pixels = processor.image_inputs([image, image])["pixel_values"]
        assert torch.equal(pixels.flatten(0, 1), given["pixel_values"][0]) and pixels.shape[1] == pictures
