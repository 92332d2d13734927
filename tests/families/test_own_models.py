"""What the models' own classes lack: ERNIE 4.5 VL's experts of images, which text alone does not reach by itself."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from support.tiny_families import processor_of, rows, tiny
from vlm_sft.base.errors import UserError
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.families.build_family import model_class


@pytest.mark.parametrize("checkpoints", [False, True])
def test_experts_of_images_get_a_gradient_of_zero_from_text_and_change_nothing(checkpoints):
    model = model_class(AutoConfig.from_pretrained(tiny("ernie4_5_vl_moe"))).from_pretrained(tiny("ernie4_5_vl_moe"))
    processor = processor_of("ernie4_5_vl_moe")
    model.blank = processor.image_inputs([Image.new("RGB", (64, 64))])
    batch = MultimodalCollator(processor)(rows(None, None))
    assert not batch["moe_mm_token_type_ids"].any()
    experts = {n: p for n, p in model.named_parameters() if ".vision_moe." in n}
    for each in model.parameters():
        each.requires_grad_(False)
    wanted = model.train()(**batch, supervised_only=True).loss
    model.requires_grad_(True)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch, supervised_only=True, use_cache=False).loss
    loss.backward()
    assert torch.equal(loss, wanted)
    reached = {n.rpartition(".vision_moe.")[2]: p.grad for n, p in experts.items() if p.grad is not None}
    assert set(reached) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    assert not any(gradient.any() for gradient in reached.values())


def test_of_a_paligemma_no_token_of_a_row_moves_with_the_prompt_of_another():
    model = model_class(AutoConfig.from_pretrained(tiny("paligemma"))).from_pretrained(tiny("paligemma")).eval()
    data, losses = rows(None, None, None), []
    batch = MultimodalCollator(processor_of("paligemma"))([{PACK: data}])
    first, second, _ = batch["row_lengths"][0].tolist()
    scored = (batch["labels"][0] != -100).nonzero()[:, 0]
    for place in (None, first + 1):  # a token of the second prompt
        changed = batch["input_ids"].clone()
        if place is not None:
            changed[0, place] = (changed[0, place] + 1) % 50
        with torch.no_grad():
            losses.append(model(**{**batch, "input_ids": changed}, supervised_only=True, use_cache=False).token_losses)
    moved = (losses[0] - losses[1]).abs() > 1e-6
    own = (scored >= first) & (scored < first + second)
    assert moved[own].all() and not moved[~own].any()
    model.config.get_text_config().sliding_window = 8
    with pytest.raises(UserError, match=r"look back 8 tokens, and packs are longer; set sft.max_length=8 or less"):
        model(**batch, supervised_only=True, use_cache=False)
