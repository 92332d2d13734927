"""What the models' own classes lack: ERNIE 4.5 VL's experts of images, which text alone does not reach by itself."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from support.tiny_families import processor_of, rows, tiny
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
