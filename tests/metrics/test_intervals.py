"""The bootstrap: it knows the spread of a mean, and of any score that is a function of sums."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_sft.metrics.intervals import SAMPLES, Total, mean_of


def test_the_interval_of_a_share_is_the_binomial_one():
    total = mean_of([1.0] * 300 + [0.0] * 700)
    low, high = total.interval()
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert total.score() == 0.3
    assert low == pytest.approx(0.3 - spread, abs=0.005) and high == pytest.approx(0.3 + spread, abs=0.005)
    assert total.interval() == (low, high)  # twice the same


def test_drawing_rows_at_once_is_drawing_them_one_by_one():
    generator = np.random.default_rng(1)
    parts = generator.random((60, 2))
    total = Total(parts, lambda s: s[..., 0] / s[..., 1])
    slow = []
    for _ in range(SAMPLES):
        drawn = parts[generator.integers(0, 60, 60)].sum(axis=0)
        slow.append(drawn[0] / drawn[1])
    assert total.interval() == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.02)


def test_one_question_alone_has_no_spread():
    assert mean_of([1.0]).interval() == (1.0, 1.0)
