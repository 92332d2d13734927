"""Every encoder that can be a vision tower is one, trained and kept; the others are refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    ConvNextConfig,
    DINOv3ViTConfig,
    Idefics3VisionConfig,
    LlamaConfig,
    PvtV2Config,
    SamConfig,
    SegformerConfig,
    Siglip2VisionConfig,
    SwinConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
)
from transformers.initialization import meta_device_safe_creation_ops

from vlm_sft import load
from vlm_sft.base.errors import UserError
from vlm_sft.model.configuration import VLMConfig
from vlm_sft.stack import fit
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.fit import measure_tower
from vlm_sft.stack.kinds import compose
from vlm_sft.train import train

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
SAM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 8, "image_size": 32,
       "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 16}  # fmt: skip
# Tower → its configuration, tokens of an image, and those with `feature_select: patch`.
TOWERS = {
    "swin": (SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
             64, 64),
    "idefics3_vision": (Idefics3VisionConfig(**WIDTH, patch_size=8), 16, 16),
    "convnext": (ConvNextConfig(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), 16, 16),
    "vit_mae": (ViTMAEConfig(**WIDTH, patch_size=8), 17, 16),
    "dinov3_vit": (DINOv3ViTConfig(**WIDTH, patch_size=8, num_register_tokens=2), 19, 16),
    "segformer": (SegformerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1],
                                  patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
                                  mlp_ratios=[2, 2]), 16, 16),
    "pvt_v2": (PvtV2Config(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1],
                           patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]), 16, 16),
    "sam_vision_model": (SamConfig(vision_config=SAM).vision_config, 16, 16),
}  # fmt: skip


def config_of(tower, layer=-1) -> VLMConfig:
    return VLMConfig(vision_config=tower, text_config=LlamaConfig(**WIDTH, vocab_size=32), vision_feature_layer=layer)


def test_encoders_are_measured_without_memory_after_transformers_took_linspace_from_the_meta_device(monkeypatch):
    monkeypatch.setattr(fit, "_shallow_forwards", lambda *_: pytest.fail("memory was taken"))
    constructors = torch.utils._device._device_constructors
    constructors.cache_clear()
    try:
        with meta_device_safe_creation_ops(), torch.device("meta"):
            torch.empty(1)  # torch keeps what it finds here
        huge = ViTMAEConfig(**{**WIDTH, "intermediate_size": 10**8}, patch_size=8)
        assert fit.count_features(config_of(huge), 32, 32) == 17
    finally:
        constructors.cache_clear()


def test_a_layer_of_absurd_size_is_not_tried_in_memory():
    huge = ViTMAEConfig(**{**WIDTH, "intermediate_size": 10**8}, patch_size=8)
    with pytest.raises(MemoryError, match=r"a layer of [\d,]+ parameters is too large to be tried"):
        fit._shallow_forwards(config_of(huge), 32, 32, 1)
    assert measure_tower(config_of(huge), 32, 32, "tower") == 16  # whose weights are then compared with its files


@pytest.fixture
def save_tower(tmp_path):
    def save(name: str, config=None) -> str:
        folder = tmp_path / name
        torch.manual_seed(0)
        AutoModel.from_config(config or TOWERS[name][0]).save_pretrained(folder)
        images = ViTImageProcessorPil(size={"height": 32, "width": 32})
        images.save_pretrained(folder)
        return str(folder)

    return save


@pytest.mark.parametrize("name", TOWERS)
def test_encoders_of_every_shape_are_towers_and_tokens_are_counted_as_the_model_makes_them(
    name, stack_recipe, save_tower
):
    folder, pixels = save_tower(name), torch.randn(2, 3, 32, 32)
    for select, tokens in zip(("full", "patch"), TOWERS[name][1:], strict=True):
        built = build_stack(stack_recipe(folder, vision={"feature_select": select}))
        model = built.model.eval()
        assert built.processor.num_image_tokens == tokens
        features = model.get_image_features(pixels)
        assert features.shape == (2, tokens, 32) and torch.equal(features, model.get_image_features(pixels))


@pytest.mark.parametrize("name", ["vit_mae", "convnext"])
def test_such_a_tower_is_trained_and_its_bundle_gives_the_same(
    name, stack_recipe, save_tower, tmp_path, forked_processes
):
    sft = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "max_length": 256, "learning_rate": 1e-3,
           "report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2}  # fmt: skip
    folder = train(stack_recipe(save_tower(name), sft=sft, train={"projector": 1e-3, "vision_tower": 1e-3}))
    model, *_ = load(folder)  # and `train` compared its logits
    assert torch.isfinite(model.get_image_features(torch.randn(1, 3, 32, 32))).all()


def test_dinov3_images_need_no_torchvision(stack_recipe, save_tower):
    folder = save_tower("dinov3_vit")
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "resample": 2,
                "size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
    Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
    processor = compose(stack_recipe(folder)).processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    scaled = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # as its own, with torchvision
    resized = torch.nn.functional.interpolate(scaled, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(settings[f"image_{name}"]).reshape(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(processor.encode_images([image]), (resized - mean) / std, atol=1 / 255 / 0.2)

    settings["image_processor_type"] = "Sam2ImageProcessor"
    Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no image processor"):
        compose(stack_recipe(folder))


def test_a_tower_of_patches_in_place_of_pictures_is_refused_before_weights(stack_recipe, save_tower):
    folder = save_tower("siglip2_vision_model", Siglip2VisionConfig(**WIDTH, patch_size=8, num_patches=16))
    Path(folder, "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="'siglip2_vision_model' encoder cannot be a vision tower as it is") as error:
        compose(stack_recipe(folder))
    assert "\n" not in str(error.value)


def test_a_random_tower_is_found_by_running_it_twice(monkeypatch):
    config = VLMConfig(vision_config=TOWERS["vit_mae"][0])
    assert measure_tower(config, 32, 32, "key") == 16
    monkeypatch.setattr("vlm_sft.stack.fit.keep_all_patches", lambda tower: tower)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="'vit_mae' encoder gives other features for the same image each time"):
        measure_tower(config, 32, 32, "key")
    assert torch.equal(state, torch.get_rng_state())
