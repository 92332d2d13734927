"""Encoders that give grids, shuffle their patches or have no class token, read as rows of features."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModel, ConvNextConfig, SwinConfig, ViTMAEConfig

from vlm_sft.model.freeze import part_modules
from vlm_sft.model.towers import fails_on_pictures, keep_all_patches, read_features, width_of

IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def test_a_tower_that_drops_patches_keeps_all_of_them_in_order():
    config = ViTMAEConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                          image_size=32, patch_size=8)  # fmt: skip
    tower = AutoModel.from_config(config).eval()
    before = read_features(tower, IMAGE, -1, 16, 0)
    assert before.shape[1] < 17 and not torch.equal(before, read_features(tower, IMAGE, -1, 16, 0))

    keep_all_patches(tower)
    features = read_features(copy.deepcopy(tower), IMAGE, -1, 16, 0)
    assert features.shape == (1, 17, 16) and torch.equal(features, read_features(tower, IMAGE, -1, 16, 0))
    # In order: what depends on the third patch alone before the first layer is at the third place.
    changed = IMAGE.clone()
    changed[..., 0:8, 16:24] += 1
    one, other = (read_features(tower, image, 0, 16, 16) for image in (IMAGE, changed))
    assert [i for i in range(16) if not torch.equal(one[0, i], other[0, i])] == [2]


def test_a_grid_becomes_rows_in_reading_order():
    grid = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).reshape(2, 3, 2, 4)

    class Output:
        last_hidden_state = grid

    rows = read_features(lambda *_, **__: Output, IMAGE, -1, 3, 0)
    assert rows.shape == (2, 8, 3) and torch.equal(rows[1, 5], grid[1, :, 1, 1])
    Output.last_hidden_state = grid.permute(0, 2, 3, 1)
    assert torch.equal(read_features(lambda *_, **__: Output, IMAGE, -1, 3, 0), rows)


@pytest.mark.parametrize(
    ("shape", "width"),
    [((1, 49, 768), 768), ((1, 768, 7, 7), 768), ((1, 7, 7, 768), 768), ((1, 7, 7, 7), 7), ((1, 24, 4, 8), 24)],
)
def test_the_width_of_features_is_told_from_their_shape(shape, width):
    assert width_of(torch.Size(shape), 224, 448 if shape[2:] == (4, 8) else 224) == width


def test_features_of_no_places_are_no_features():
    with pytest.raises(ValueError, match=r"features of the shape \(1, 768\)"):
        width_of(torch.Size((1, 768)), 224, 224)


@pytest.mark.parametrize("patches", [0, 16 * 16])
def test_a_hierarchical_tower_has_no_token_to_drop(patches):
    """The patches at its end are fewer than those that it cut, so all are kept."""
    swin = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    assert read_features(AutoModel.from_config(swin).eval(), IMAGE, -1, 16, patches).shape == (1, 64, 16)
    convnext = ConvNextConfig(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    assert read_features(AutoModel.from_config(convnext).eval(), IMAGE, -1, 16, patches).shape == (1, 16, 16)


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
@pytest.mark.parametrize("blank", [True, False])
def test_an_error_is_the_pictures_where_the_image_path_raises_it_and_takes_a_blank_one(stack_recipe, part, blank):
    from vlm_sft import build_stack

    stack = build_stack(stack_recipe())
    inputs = {"pixel_values": torch.ones(2, 3, 28, 28)}
    seen = []

    def check(module, given):
        seen.append(part)
        if not blank or len(seen) == 1:
            raise ValueError("too long")

    part_modules(stack.model)[part][1].register_forward_pre_hook(check)
    text = torch.ones(1, 3, dtype=torch.long)
    fails = partial(stack.model, input_ids=text) if part == "language_model" else stack.model.get_image_features
    with pytest.raises(ValueError, match="too long") as error:
        fails(**(inputs if part != "language_model" else {}))
    assert fails_on_pictures(stack.model, inputs, error.value) == (blank and part != "language_model")
