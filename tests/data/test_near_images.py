"""Copies of a picture are found whatever was done to them; other pictures of the same kind are not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from support.pictures import COPIES, photo
from vlm_sft.data import near_images
from vlm_sft.data.looks import look_of
from vlm_sft.data.near_images import is_flat, near_pairs, repeated

PHOTOS = [photo(seed) for seed in range(40)]


def looks(pictures) -> np.ndarray:
    return np.stack([look_of(picture) for picture in pictures])


def drawing(shape: str, colour: str, background: str = "white") -> Image.Image:
    picture = Image.new("RGB", (64, 64), background)
    getattr(ImageDraw.Draw(picture), shape)((12, 12, 52, 52), fill=colour)
    return picture


@pytest.mark.parametrize("what", COPIES)
def test_copies_are_found(what):
    held_out = [COPIES[what](picture) for picture in PHOTOS[10:30]]
    found = near_pairs(looks(PHOTOS), looks(held_out)).pairs
    right = [pair for pair in found if pair.first == pair.second + 10]
    assert len(found) == len(right) >= 19
    assert {pair.mirrored for pair in right} == {what in ("mirrored", "all of it")}
    turned = near_pairs(looks(held_out), looks(PHOTOS)).pairs
    assert sum(pair.second == pair.first + 10 for pair in turned) >= 19, "the copy may be the one trained on"


def test_other_pictures_are_not():
    assert near_pairs(looks(PHOTOS), looks([photo(seed) for seed in range(100, 160)])).pairs == []


def test_drawings_of_one_shape_in_other_colours_are_not_alike():
    held_out = looks([drawing("ellipse", colour) for colour in ("red", "black")])
    assert near_pairs(looks([drawing("ellipse", "blue"), drawing("rectangle", "red")]), held_out).pairs == []
    (pair,) = near_pairs(looks([drawing("ellipse", "#e00000")]), held_out).pairs
    assert pair.second == 0 and pair.likeness > 0.99


def test_a_small_thing_elsewhere_or_another_is_another_picture():
    def scene(text: str, x: int) -> Image.Image:
        picture = Image.new("RGB", (64, 64), "#202020")
        ImageDraw.Draw(picture).text((x, 20), text, fill="yellow", font_size=24)
        return picture

    found = near_pairs(looks([scene("3", 8)]), looks([scene("3", 40), scene("7", 8), scene("5", 8)]))
    assert found.pairs == []
    assert len(near_pairs(looks([scene("3", 8)]), looks([scene("3", 8).resize((96, 96))])).pairs) == 1


def test_blank_pictures_are_like_nothing():
    blank = looks([Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "#808081")])
    faint = looks([Image.effect_noise((64, 64), 3).convert("RGB")])
    assert is_flat(blank).all() and is_flat(faint).all() and not is_flat(looks(PHOTOS)).any()
    assert near_pairs(blank, blank).pairs == [] and repeated(np.concatenate([blank, blank])) == 0


def test_nothing_is_like_nothing():
    none = looks(PHOTOS)[:0]
    for first, second in ((none, none), (none, looks(PHOTOS)), (looks(PHOTOS), none)):
        assert near_pairs(first, second) == ([], 1.0)
    assert repeated(none) == 0 and is_flat(none).shape == (0,)


def test_the_likest_partner_is_named():
    held_out = [COPIES["watermark"](PHOTOS[0]), PHOTOS[0].resize((200, 150)), COPIES["all of it"](PHOTOS[0])]
    (pair,) = near_pairs(looks(PHOTOS[:1]), looks(held_out)).pairs
    assert pair.second == 1 and not pair.mirrored and 0.99 < pair.likeness <= 1.0001


def test_repeated_pictures_are_counted_once_each():
    again = [COPIES["JPEG of quality 40"](PHOTOS[0]), COPIES["half the size"](PHOTOS[0]), PHOTOS[1].copy()]
    assert repeated(looks([*PHOTOS, *again])) == 3


def test_where_all_look_alike_a_part_is_compared_and_said(monkeypatch):
    alike = looks([COPIES["half the size"](PHOTOS[0])] * 200)
    monkeypatch.setattr(near_images, "MOST_PAIRS", 300_000)
    found = near_pairs(alike, alike)
    assert 0.001 < found.compared < 0.5 and 0 < len(found.pairs) <= 200


def test_in_a_crowd_every_copy_still_has_a_partner():
    crowd = looks([COPIES["half the size"](PHOTOS[0])] * 400)
    found = near_pairs(
        looks([PHOTOS[0], PHOTOS[1], COPIES["mirrored"](PHOTOS[0])]), np.concatenate([crowd, looks(PHOTOS[1:3])])
    )
    assert [(pair.first, pair.mirrored) for pair in found.pairs] == [(0, False), (1, False), (2, True)]
    assert found.pairs[1].second == 400 and repeated(crowd) == 399


def test_blocks_change_nothing(monkeypatch):
    held_out = looks([COPIES["all of it"](picture) for picture in PHOTOS[:12]])
    whole = near_pairs(looks(PHOTOS), held_out)
    monkeypatch.setattr(near_images, "BLOCK", 5)
    monkeypatch.setattr(near_images, "PAIRS_LAID", 3)
    parts = near_pairs(looks(PHOTOS), held_out)
    assert [pair[:2] for pair in parts.pairs] == [pair[:2] for pair in whole.pairs] and len(whole.pairs) >= 11
