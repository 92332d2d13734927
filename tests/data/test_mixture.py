"""How many rows of each source, and in which order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.data.mixture import balanced_counts, largest_remainder, mixture_counts, mixture_order


def test_weights_are_explicit_and_a_factor_elsewhere():
    assert mixture_counts([115, 14], [115, 14], "weights") == [115, 14]
    assert mixture_counts([10, 90], [1, 1], "weights") == [50, 50]
    assert mixture_counts([10, 90], [9, 1], "proportional") == [50, 50]
    assert mixture_counts([25, 100], [4, 1], "sqrt") == [83, 42]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100.0)), min_size=1, max_size=6),
    st.sampled_from(["proportional", "sqrt", "weights"]),
    st.integers(0, 2**40),
)
def test_any_mixture(parts, sampling, seed):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    counts = mixture_counts(sizes, weights, sampling)
    assert sum(counts) == sum(sizes)
    power = {"proportional": 1.0, "sqrt": 0.5, "weights": 0.0}[sampling]
    shares = np.array([weight * size**power for size, weight in parts])
    assert np.abs(np.array(counts) - sum(sizes) * shares / shares.sum()).max() <= 1 + 1e-6

    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    order = mixture_order(rows, counts, seed)
    assert (order == mixture_order(rows, counts, seed)).all()
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        own = order[(order >= start) & (order < start + size)]
        assert len(own) == count
        times = np.bincount(own - start, minlength=size)
        assert times.max() - times.min() <= 1
        for done in range(0, count - size + 1, size):  # whole passes: every row once before any comes again
            assert len(set(own[done : done + size])) == size
        start += size


def test_the_largest_remainder_adds_up():
    assert largest_remainder(10, [1, 1, 1]) == [4, 3, 3]
    assert largest_remainder(3, [0.0, 5.0]) == [0, 3]


def test_a_source_without_rows_in_a_language_has_no_share_of_it():
    assert mixture_counts([0, 7], [5, 1], "weights") == [0, 7]
    order = mixture_order([np.array([], dtype=int), np.array([4, 9])], [0, 3], 0)
    assert sorted(order.tolist()) in ([4, 4, 9], [4, 9, 9])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    st.sampled_from(["proportional", "sqrt", "weights"]),
    st.floats(0.05, 20.0),
)
def test_languages_have_their_shares(parts, sampling, chinese):
    sizes = {"zh": [zh for zh, _ in parts], "en": [en for _, en in parts]}
    total = sum(map(sum, sizes.values()))
    if min(map(sum, sizes.values())) == 0:
        return
    counts = balanced_counts(sizes, [1.0] * len(parts), sampling, {"zh": chinese, "en": 1.0})
    assert sum(map(sum, counts.values())) == total
    assert abs(sum(counts["zh"]) - total * chinese / (chinese + 1.0)) <= 1
    assert all(count == 0 for name in sizes for size, count in zip(sizes[name], counts[name], strict=True) if not size)
