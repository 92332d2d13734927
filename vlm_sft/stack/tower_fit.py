"""Whether an encoder can be a vision tower, found by real forwards of it without its weights."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig

from ..base.errors import UserError
from ..base.words import one_line
from ..model.configuration import VLMConfig, count_patches
from ..model.parts import build_vision_tower
from ..model.towers import keep_all_patches, width_of

# Proven against upstream's own code (docs/systems.md), so a start need not spend seconds on running them.
PROVEN = ("clip_vision_model", "siglip_vision_model", "blip_vision_model", "blip_2_vision_model", "dinov2",
          "instructblip_vision_model", "vlm_sft_mplug_owl_vision", "vlm_sft_qwen_vl_vision")  # fmt: skip


def measure_tower(config: VLMConfig, height: int, width: int, key: str) -> int:
    """Width of the features that the tower of a stack gives for an image of this size in pixels.

    Raises:
        UserError: It cannot read one image, gives no features of places, or other ones each time.
    """
    tower = config.tower
    if tower.model_type in PROVEN:
        return tower.hidden_size
    try:
        found = width_of(_shape(config, height, width), height, width)
    except Exception as error:  # whatever the code of an encoder raises
        raise UserError(
            f"{key}: a {tower.model_type!r} encoder cannot be a vision tower as it is: {one_line(error).rstrip('.')}; "
            f"use one like CLIP, SigLIP, DINOv2 or Swin."
        ) from error
    if not _repeats(config, height, width):
        raise UserError(
            f"{key}: a {tower.model_type!r} encoder gives other features for the same image each time, so nothing can "
            f"be learned from them; use one like CLIP, SigLIP, DINOv2 or Swin."
        )
    return found


def count_features(config: VLMConfig, height: int, width: int) -> int:
    """P, the features that the stack takes from its tower for an image of this size in pixels."""
    patches = count_patches(config.tower, height, width) if config.vision_feature_select == "patch" else 0
    if patches and getattr(config.vision_config, "model_type", "") in PROVEN:
        return patches
    shape = _shape(config, height, width)
    places = shape[1] if len(shape) == 3 else shape[1:].numel() // config.tower_width
    return min(places, patches or places)


def _shape(config: VLMConfig, height: int, width: int) -> torch.Size:
    """Of the tower's features: without memory, or of a shallow copy where its code looks at numbers."""
    try:
        return _forward(config.tower, config.vision_feature_layer, height, width, "meta").shape
    except Exception as error:
        try:
            return _shallow_forwards(config, height, width, 1).shape
        except Exception:
            raise error from None


def _repeats(config: VLMConfig, height: int, width: int) -> bool:
    """Whether two forwards of a shallow copy, with random weights, are the same."""
    try:
        once, again = _shallow_forwards(config, height, width, 2).chunk(2)
    except Exception:  # no shallow copy can be made of it, but the whole one ran
        return True
    return torch.allclose(once, again, rtol=1e-3, atol=1e-5, equal_nan=True)


def _shallow_forwards(config: VLMConfig, height: int, width: int, times: int) -> torch.Tensor:
    shallow = copy.deepcopy(config.tower)
    if hasattr(shallow, "depths"):
        shallow.depths = [1] * len(shallow.depths)
    elif isinstance(getattr(shallow, "num_hidden_layers", None), int):
        shallow.num_hidden_layers = 1
    layer = -1 if config.vision_feature_layer == -1 else 0
    with torch.random.fork_rng(devices=[]):
        return _forward(shallow, layer, height, width, "cpu", times)


@torch.inference_mode()
def _forward(
    config: PreTrainedConfig, layer: int, height: int, width: int, device: str, times: int = 1
) -> torch.Tensor:
    with torch.device(device):
        tower = keep_all_patches(build_vision_tower(copy.deepcopy(config)).eval())
        image = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
        outputs = [tower(image, output_hidden_states=layer != -1) for _ in range(times)]
    found = [each.last_hidden_state if layer == -1 else each.hidden_states[layer] for each in outputs]
    return torch.cat(found)
