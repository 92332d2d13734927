"""The bits of pictures are those of known hashes, and looking them up finds what comparing all with all would."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dctn

from support.pictures import photo
from vlm_sft.data import look_index
from vlm_sft.data.look_index import FAR_BITS, NEAR_BITS, Index, hashes, views, window
from vlm_sft.data.looks import SIDE, look_of


def grey(*seeds: int) -> np.ndarray:
    return np.stack([look_of(photo(seed))[: SIDE * SIDE].reshape(SIDE, SIDE) for seed in seeds]).astype(np.float32)


def test_bits_are_those_of_phash_and_dhash():
    pictures = grey(1, 2)
    for picture, (waves, steps) in zip(pictures, hashes(pictures), strict=True):
        low = dctn(picture.astype(np.float64), type=2)[:8, :8]
        assert waves == np.packbits(low > np.median(low)).view(np.uint64)[0]
        wide = np.repeat(picture.reshape(8, 4, SIDE).mean(1), 9, axis=1)
        expected = np.diff(wide.reshape(8, 9, SIDE).mean(2), axis=1)
        bits = np.unpackbits(np.array([steps]).view(np.uint8)).reshape(8, 8)
        clear = np.abs(expected) > 0.01  # other neighbours are equal but for rounding
        assert ((bits == (expected > 0)) | ~clear).all() and clear.mean() > 0.8


def test_a_mirrored_view_is_the_view_of_the_mirrored_picture():
    pictures = grey(1, 2, 3)
    plain, mirrored = views()[:2]
    assert not plain.mirrored and mirrored.mirrored
    assert (hashes(pictures, mirrored) == hashes(np.ascontiguousarray(pictures[:, :, ::-1]), plain)).all()


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.05, 0.9), (0.0, 0.92)])
def test_a_window_weighs_every_pixel_with_one(part):
    weights = window(16, *part)
    assert np.allclose(weights.sum(1), 1)
    ramp = weights @ (np.arange(16) + 0.5)
    inside = (part[0] + (np.arange(16) + 0.5) / 16 * part[1]) * 16
    assert np.allclose(ramp, np.clip(inside, 0.5, 15.5), atol=1e-5)


def near_by_force(index: np.ndarray, bits: np.ndarray) -> set[tuple[int, int]]:
    apart = np.bitwise_count(bits[:, None] ^ index[None])
    near = (apart.min(2) <= NEAR_BITS) & (apart.max(2) <= FAR_BITS)
    return set(zip(*(numbers.tolist() for numbers in np.nonzero(near)), strict=True))


def flipped(rng: np.random.Generator, bits: np.ndarray, count: int) -> np.ndarray:
    changed = bits.copy()
    for row in changed:
        for kind in range(2):
            for bit in rng.choice(64, count, replace=False):
                row[kind] ^= np.uint64(1) << np.uint64(bit)
    return changed


@pytest.mark.parametrize("at_once", [2**19, 7])
def test_looking_up_finds_what_comparing_all_with_all_does(at_once, monkeypatch):
    monkeypatch.setattr(look_index, "PAIRS", at_once)
    rng = np.random.default_rng(0)
    index = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    index[:20] = index[0]  # some are the same
    bits = np.concatenate([flipped(rng, index[:100], count) for count in (0, 3, 7, 8, 12)])
    asked = Index(index)
    found = {pair for query, other in asked.near(bits) for pair in zip(query.tolist(), other.tolist(), strict=True)}
    assert found == near_by_force(index, bits) and len(found) > 300
    assert asked.load(bits) >= len(found)
