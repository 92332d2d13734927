"""Mllama: rows in a batch give what its own classes give each alone, and text sees the images that it should see."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, MllamaForConditionalGeneration

from support.tiny_families import encoded, processor_of, rows, tiny
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.batch.image_swap import with_other_images
from vlm_sft.families.build_family import model_class
from vlm_sft.families.mllama import IMAGES

IMAGE = {"type": "image"}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def conversation(number: int, *turns: list[dict]) -> dict:
    """A row of questions, each answered; its images have other shapes than those of other rows."""
    messages, sizes = [], [(40 + 30 * number, 30), (60, 100), (28, 90)]
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": [said(f"number {number}")]}]
    count = sum(part == IMAGE for turn in turns for part in turn)
    pictures = [{"path": None, "bytes": encoded(size)} for size in sizes[:count]]
    return {"id": str(number), "messages": messages, "images": pictures, "source": "x"}


@pytest.fixture(scope="module")
def pair():
    """(ours, transformers' own, processor)"""
    config = AutoConfig.from_pretrained(tiny("mllama"))
    models = [
        kind.from_pretrained(tiny("mllama")).eval() for kind in (model_class(config), MllamaForConditionalGeneration)
    ]
    return *models, processor_of("mllama")


ROWS = [
    conversation(0, [IMAGE, said("What is this?")]),
    conversation(1, [said("你好")]),
    conversation(2, [IMAGE, IMAGE, said("Which?")], [said("Why?")], [IMAGE, said("And this?")]),
    conversation(3, [said("Look:"), IMAGE], [IMAGE, said("这是什么？")]),
]


def own_inputs(processor, row: dict) -> dict:
    """What its own processor makes of the conversation."""
    images = [Image.open(io.BytesIO(each["bytes"])).convert("RGB") for each in row["images"]]
    text = processor.render(row["messages"]).text
    given = {"images": [images]} if images else {}
    return dict(processor.native(text=[text], add_special_tokens=False, return_tensors="pt", **given))


def test_a_row_among_others_gives_what_its_own_class_gives_it_alone(pair):
    ours, theirs, processor = pair
    batch = MultimodalCollator(processor)(ROWS)
    with torch.no_grad():
        together = ours(**batch).logits
        for number, row in enumerate(ROWS):
            own = own_inputs(processor, row)
            length = own["input_ids"].shape[1]
            assert torch.equal(own["input_ids"][0], batch["input_ids"][number, :length])
            torch.testing.assert_close(together[number, :length], theirs(**own).logits[0], atol=2e-6, rtol=0)


def test_which_token_sees_which_tiles_is_its_own_processors_word(pair):
    ours, _, processor = pair
    for row in (ROWS[0], ROWS[2], ROWS[3]):
        made = ours.complete(MultimodalCollator(processor)([row]))
        assert torch.equal(made["cross_attention_mask"], own_inputs(processor, row)["cross_attention_mask"])


def test_answers_are_its_own_also_padded_beside_others(pair):
    ours, theirs, processor = pair
    asked = [{**row, "messages": row["messages"][:-1]} for row in ROWS]
    sizes = [[Image.open(io.BytesIO(each["bytes"])).size for each in row["images"]] for row in asked]
    chats = [processor.encode_chat(row["messages"], add_generation_prompt=True, sizes=size)
             for row, size in zip(asked, sizes, strict=True)]  # fmt: skip
    images = [Image.open(io.BytesIO(each["bytes"])).convert("RGB") for row in asked for each in row["images"]]
    batch = {**processor.batch(chats, side="left"), **processor.image_inputs(images)}
    batch.pop("labels", None)
    options = {"max_new_tokens": 6, "do_sample": False}
    found = ours.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for number, row in enumerate(asked):
        own = own_inputs(processor, row)
        ids = torch.tensor([chats[number].input_ids])
        if "cross_attention_mask" in own:
            more = ids.shape[1] - own["input_ids"].shape[1]  # the prompt of the answer
            mask = own["cross_attention_mask"]
            own["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, more, -1, -1)], 1)
        own |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        wanted = theirs.generate(**own, **options)[0, ids.shape[1] :].tolist()
        assert found[number].tolist()[: len(wanted)] == wanted


def test_an_exchanged_image_takes_its_grid_along(pair):
    ours, _, processor = pair
    batch = MultimodalCollator(processor)(rows((40, 30), None, (30, 200)))
    other, exchanged = with_other_images(batch, processor.image_token_id, processor.ids_per_image, None)
    assert exchanged.tolist() == [True, False, True] and processor.num_image_tokens == 1
    assert all(torch.equal(other[name], batch[name].flip(0)) for name in IMAGES)
    assert batch["aspect_ratio_ids"].unique().numel() == 2, "the two are cut otherwise"
    with torch.no_grad():
        assert ours(**batch).loss != ours(**other).loss
