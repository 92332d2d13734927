"""How many rows of each source a mixture has, and in which order: numbers alone, the same in every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARES = {"proportional": lambda size: size, "sqrt": lambda size: size**0.5, "weights": lambda size: 1.0}
"""How a source's share follows from its number of rows, before its weight. The keys are the kinds of sampling."""


def mixture_counts(sizes: Sequence[int], weights: Sequence[float], sampling: str) -> list[int]:
    """How many rows of a mixture come from each source, by largest remainder; they add up to ``sum(sizes)``."""
    shares = [weight * SHARES[sampling](size) for size, weight in zip(sizes, weights, strict=True)]
    total = sum(sizes)
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda d: (counts[d] - exact[d], d))
    for d in by_remainder[: total - sum(counts)]:
        counts[d] += 1
    return counts


def mixture_order(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Row numbers of a mixture in the concatenation of its sources: `counts` of each, interleaved at random.

    Every row of a source is drawn once before any of them is drawn again.
    """
    rng = np.random.default_rng([seed % 2**32, len(sizes)])
    labels = np.repeat(np.arange(len(sizes)), counts)
    rng.shuffle(labels)
    order = np.empty(len(labels), dtype=np.int64)
    offset = 0
    for d, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        passes = [rng.permutation(size) for _ in range(-(-count // size))]
        if passes:
            order[labels == d] = offset + np.concatenate(passes)[:count]
        offset += size
    return order
