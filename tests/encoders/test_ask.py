"""Shares of a match and of patches, and the picture that shows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from support.golden import assert_close
from support.vle import save_vle
from vlm_sft.encoders.ask import draw, find, match
from vlm_sft.encoders.vle import load_vle

PICTURE = Image.effect_noise((56, 42), 70).convert("RGB")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = save_vle(tmp_path_factory.mktemp("vle") / "it", "itm_score", "pbc_classifier")
    return lambda task: load_vle(str(folder), task)


def test_a_match_is_the_share_of_the_second_class(load):
    encoder = load("itm")
    found = match(encoder, [PICTURE] * 2, ["two dogs", "一只猫"])
    assert found == pytest.approx(encoder([PICTURE] * 2, ["two dogs", "一只猫"]).softmax(-1)[:, 1].tolist())


def test_patches_lie_in_rows(load):
    encoder = load("pbc")
    found = find(encoder, PICTURE, "two dogs")
    assert found.shape == (4, 4)
    assert_close(found.flatten(), encoder([PICTURE], ["two dogs"]).softmax(-1)[0, :, 1])


@pytest.mark.parametrize(("crop", "seen"), [(False, (0, 0, 56, 42)), (True, (7, 0, 49, 42))])
def test_what_was_found_is_bright_where_it_is_in_the_picture(load, crop, seen):
    encoder = load("pbc")
    if crop:  # the shorter side to 28, and the middle of the longer one
        encoder.image_processor.size, encoder.image_processor.do_center_crop = {"shortest_edge": 28}, True
        encoder.image_processor.crop_size = {"height": 28, "width": 28}
    found = torch.zeros(4, 4)
    found[1, 2] = 1
    white = Image.new("RGB", PICTURE.size, "white")
    light = np.asarray(draw(encoder, white, found))[..., 0]
    left, top, right, bottom = seen
    width, height = (right - left) / 4, (bottom - top) / 4
    rows, columns = np.nonzero(light > 200)
    assert rows.min() >= top + int(height) and rows.max() <= top + 2 * height
    assert columns.min() >= left + int(2 * width) and columns.max() <= left + 3 * width
    assert len(rows) >= int(width) * int(height) and set(np.unique(light[light <= 200])) == {40}
    assert draw(encoder, PICTURE, torch.zeros(4, 4)).size == PICTURE.size  # nothing stands out
