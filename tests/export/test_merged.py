"""A bundle with LoRA merged is a bundle again: the same answers without an adapter, and the next stage starts there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from support.bundles import BLIP2, LLAVA
from vlm_sft import answer, load
from vlm_sft.bundle.handover import hand_over
from vlm_sft.bundle.parity import probe_logits
from vlm_sft.export.export import export
from vlm_sft.stack.build_stack import build_stack


@pytest.mark.slow
@pytest.mark.parametrize("stack", [LLAVA, {**BLIP2, "lora": {"r": 2, "target_modules": r".*\.(q_proj|qkv)"}}])
def test_a_merged_bundle_is_a_bundle_and_the_next_stage_starts_from_it(stack, bundle, bundle_recipe, tmp_path):
    folder, out = bundle(**stack), tmp_path / "merged"
    found = export(folder, out, "bundle-merged")
    assert found["merge_difference"] <= found["max_difference"] <= found["merge_difference"] + 1e-5 <= 1e-4
    model, processor = load(out)
    before, _ = load(folder)
    ids = torch.tensor([[1, *[processor.image_token_id] * processor.num_image_tokens, 40, 41]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        difference = (
            model(input_ids=ids, pixel_values=pixels).logits - before(input_ids=ids, pixel_values=pixels).logits
        )
    assert difference.abs().max() <= 1e-4
    assert not hasattr(model, "peft_config")
    following = bundle_recipe(**{**stack, "lm": str(out / "language_model"), "name": "next", "init_from": str(out)})
    assert "projector" in hand_over(build_stack(following), out)


@pytest.mark.slow
def test_a_merged_instructblip_still_reads_the_question(instruct_bundle, photos, tmp_path):
    folder, out = instruct_bundle("instructblip"), tmp_path / "merged"
    assert export(folder, out, "bundle-merged")["merge_difference"] <= 1e-4
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
         "images": [photos[photo]]}
        for text in ("What is this?", "Describe the cat.") for photo in (0, 1)
    ]  # fmt: skip
    model, processor = load(out)
    assert not hasattr(model, "peft_config") and processor.qformer_tokenizer is not None
    wanted = answer(*load(folder), rows, max_new_tokens=6)
    assert answer(model, processor, rows, max_new_tokens=6) == wanted and len(set(wanted)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smolvlm", "fuyu"])
def test_a_merged_existing_model_is_a_bundle_and_the_next_stage_starts_from_it(name, save, monkeypatch, tmp_path):
    kept = {}

    def check(bundle, model, batch):
        kept.update(batch=batch, logits=probe_logits(model, batch))
        return {"equal": True, "max_difference": 0.0}

    monkeypatch.setattr("vlm_sft.export.merged.check_parity", check)
    folder, out = save(name), tmp_path / "merged"
    found = export(folder, out, "bundle-merged", dtype="bfloat16")
    assert found["merge_difference"] <= 1e-4
    model, _ = load(out)
    assert torch.equal(probe_logits(model, kept["batch"]), kept["logits"]) and not hasattr(model, "peft_config")
    before, _ = load(folder)
    away = (kept["logits"] - probe_logits(before, kept["batch"])).abs().max()
    assert 0 < away <= 0.1, "the base in bf16"
    assert found["max_difference"] == pytest.approx(float(away), rel=1e-3), "from the bundle, not from what was written"
    held = load_file(folder / "trained.safetensors")
    assert all(torch.equal(tensor, held[key]) for key, tensor in load_file(out / "trained.safetensors").items())

    following = save(name, out / "model", "next", init_from=str(out), train={})
    assert json.loads((following / "bundle.json").read_text())["held"] == ["projector"]
    assert load_file(following / "trained.safetensors").keys() == held.keys()
    again, _ = load(following)
    assert torch.equal(dict(again.named_parameters())["base_model.model." + min(held)], held[min(held)])
