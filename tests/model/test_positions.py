"""Towers read images of another size through a table of positions that is resized as LAVIS does it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel, OPTConfig, OPTModel, SiglipVisionConfig, SiglipVisionModel

from support.tiny_pieces import save_checkpoint
from vlm_sft import VLMProcessor
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import load
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.export.native_model import native_form
from vlm_sft.model.positions import cast, kept_apart
from vlm_sft.pieces.load_parts import load_vision_tower
from vlm_sft.pieces.part_configs import find_vision_tower
from vlm_sft.stack.build_stack import build_empty_stack, build_stack


def direct(rows: torch.Tensor, side: int, extra: int) -> torch.Tensor:
    """(P', D) → (P, D): the class token as it is, then `F.interpolate` on the grid of patches."""
    old = round((len(rows) - extra) ** 0.5)
    grid = rows[extra:].reshape(old, old, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([rows[:extra], grid[0].permute(1, 2, 0).reshape(side * side, -1)])


TOWERS = {
    "blip2": ("vision_model.embeddings.position_embedding", 1),
    "clip": ("vision_model.embeddings.position_embedding.weight", 1),
    "siglip": ("vision_model.embeddings.position_embedding.weight", 0),
}


@pytest.mark.parametrize("size", [42, 14, 28])
@pytest.mark.parametrize("name", TOWERS)
def test_the_table_is_what_interpolate_gives(name, size, more_pieces, stack_recipe):
    """Of patches of 7 pixels; the pieces are made for 28."""
    state = load_file(f"{more_pieces[name]}/model.safetensors")
    key, extra = TOWERS[name]
    key = key if key in state else key.removeprefix("vision_model.")
    rows = state[key].reshape(-1, 24)
    stack = build_stack(stack_recipe(name, vision={"image_size": size}))
    tower = stack.model.model.vision_tower
    table = dict(tower.named_parameters())[key.removeprefix("vision_model.")]
    assert tower.config.image_size == size
    if size == 28:
        assert torch.equal(table.reshape(-1, 24), rows), "unchanged at equal size, bit by bit"
    else:
        torch.testing.assert_close(table.reshape(-1, 24), direct(rows, size // 7, extra), atol=1e-6, rtol=0)
    others = {n: p for n, p in tower.named_parameters() if p is not table}
    plain = dict(
        load_vision_tower(find_vision_tower(stack_recipe(name).stack.vision_tower), torch.float32).named_parameters()
    )
    assert all(torch.equal(parameter, plain[n]) for n, parameter in others.items())


def test_a_bundle_keeps_the_size(stack_recipe, photos, tmp_path):
    """The image processor follows, tokens are counted anew, the bundle reads both back; the native class too has it."""
    recipe = stack_recipe(
        "clip", projector="mlp", vision={"image_size": 42, "feature_layer": -2, "feature_select": "patch"},
        train={"projector": 1e-3, "vision_tower": 1e-5},
    )  # fmt: skip
    stack = build_stack(recipe)
    assert stack.processor.num_image_tokens == 36 and native_form(stack.model) == "llava"
    pixels = stack.processor.encode_images([Image.open(photos[0])])
    assert pixels.shape == (1, 3, 42, 42)
    save_bundle(tmp_path / "bundle", stack.model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
    model, processor = load(tmp_path / "bundle")
    assert torch.equal(processor.encode_images([Image.open(photos[0])]), pixels)
    with torch.no_grad():
        assert torch.equal(model.get_image_features(pixels), stack.model.eval().get_image_features(pixels))
    assert isinstance(processor, VLMProcessor)
    assert build_empty_stack(recipe).model.config.vision_config.image_size == 42


def test_a_margin_keeps_its_share(stack_recipe, pieces, tmp_path):
    """DINOv2 resizes to 256, then cuts 224 out; its table it fits itself."""
    from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 7}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "dino"
    )
    stack = build_stack(stack_recipe(str(tmp_path / "dino"), vision={"image_size": 42}))
    images = stack.processor.image_processor
    assert (images.size["shortest_edge"], images.crop_size["height"]) == (48, 42)
    assert stack.model.model.vision_tower.config.image_size == 56 and stack.processor.num_image_tokens == 37


def test_what_does_not_fit_is_named(stack_recipe, tmp_path):
    with pytest.raises(UserError, match=r"image_size is 40, but the tower cuts images into patches of 7 .* like 35"):
        build_stack(stack_recipe("clip", vision={"image_size": 40}))
    config = SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                image_size=28, patch_size=7)  # fmt: skip
    state = SiglipVisionModel(config).state_dict()
    state["embeddings.position_embedding.weight"] = torch.randn(15, 24)
    save_checkpoint(tmp_path / "odd", config, state)
    odd = stack_recipe(str(tmp_path / "odd"), vision={"image_size": 42}).stack.vision_tower
    with pytest.raises(UserError, match=r"has the shape \(15, 24\), but \(36, 24\) is needed"):
        load_vision_tower(find_vision_tower(odd), torch.float32)
    with pytest.raises(UserError, match="image_size"):
        stack_recipe("clip", vision={"image_size": "big"})


@pytest.mark.parametrize("to_half", [torch.nn.Module.half, lambda model: model.to(torch.bfloat16)])
def test_rotations_stay_exact_whatever_the_weights_are_cast_to(to_half, stack_recipe):
    """As under `load(dtype=…)` and DeepSpeed's bf16, which cast buffers too."""
    model = build_stack(stack_recipe("clip")).model.eval()
    ids = torch.arange(200).remainder(250)[None]
    exact = model.model.language_model.rotary_emb(torch.zeros(1), torch.tensor([[100, 1000]]))
    to_half(model)
    assert {p.dtype for p in model.parameters()} <= {torch.float16, torch.bfloat16}
    rates = model.model.language_model.rotary_emb
    assert rates.inv_freq.dtype == rates.original_inv_freq.dtype == torch.float32
    for now, before in zip(rates(torch.zeros(1), torch.tensor([[100, 1000]])), exact, strict=True):
        assert torch.equal(now, before)
    assert model(input_ids=ids).logits.isfinite().all()
    language_model = cast(build_stack(stack_recipe("clip")).model.model.language_model, torch.bfloat16)
    assert next(language_model.parameters()).dtype == torch.bfloat16
    assert torch.equal(language_model.rotary_emb.inv_freq, rates.inv_freq)
    assert model.to("meta").model.language_model.rotary_emb.inv_freq.is_meta


def language_model(kind: str, attention: str, heads: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"attn_implementation": attention}
    if kind == "opt":
        return OPTModel._from_config(OPTConfig(**shape, ffn_dim=48, dropout=0.0, word_embed_proj_dim=32), **options)
    return LlamaModel._from_config(LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=heads), **options)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_attend_row_by_row_to_what_a_mask_gives_them(kind, checkpointing):
    """Heads that share keys, a pack without padding, one with fewer rows, and layers that are computed again."""
    lengths = torch.tensor([[3, 1, 4], [5, 2, 0]])
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    real = torch.arange(8) < lengths.sum(1, keepdim=True)
    found = {}
    for attention in ("sdpa", "eager"):
        lm = language_model(kind, attention).train()
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        given = embeds.clone().requires_grad_()
        mask, positions = kept_apart(lm, given, lengths)
        out = lm(inputs_embeds=given, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        out[real].square().sum().backward()
        gradients = [p.grad for p in lm.parameters() if p.grad is not None]
        found[attention] = [out.detach()[real], given.grad[real], *gradients]
        assert mask.shape == ((2, 1, 1, 3) if attention == "sdpa" else (2, 1, 8, 8))  # no mask of all pairs
    for ours, masked in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-5)
    assert len(found["sdpa"]) > 4


def test_attention_of_what_is_not_packed_is_that_of_transformers():
    lm, embeds = language_model("llama", "sdpa"), torch.randn(2, 6, 32)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    before = lm(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    kept_apart(lm, embeds, torch.tensor([[6], [6]]))
    assert torch.equal(lm(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, before)


def test_layers_that_look_back_less_far_make_their_own_masks():
    lm = language_model("llama", "sdpa")
    lm.config.sliding_window = 4
    assert kept_apart(lm, torch.randn(1, 4, 32), torch.tensor([[2, 2]]))[0] is None
