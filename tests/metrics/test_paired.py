"""Two bundles on the same questions: McNemar's test to the letter, and a bootstrap where scores are shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlm_sft.metrics.paired import bootstrap, compare, mcnemar


@pytest.mark.parametrize(("better", "worse"), list(itertools.product(range(6), repeat=2)))
def test_mcnemar_is_every_way_of_tossing_the_coins(better, worse):
    """By enumeration: each question that differs falls either way alike."""
    tosses = better + worse
    ways = [sum(way) for way in itertools.product((0, 1), repeat=tosses)]
    odd = sum(abs(2 * heads - tosses) >= abs(better - worse) for heads in ways) / 2**tosses
    assert mcnemar(better, worse) == pytest.approx(odd, abs=1e-15)


def test_mcnemar_of_many_questions_is_exact():
    assert mcnemar(0, 0) == 1.0 and mcnemar(500, 500) == 1.0
    assert mcnemar(1, 9) == 22 / 1024
    assert mcnemar(4800, 5200) == pytest.approx(6.6e-5, rel=0.02)  # (400 - 1) / 100 of a normal distribution: 3.99
    assert 0 < mcnemar(0, 900) < 1e-200


def test_scores_of_right_and_wrong_are_tested_by_mcnemar():
    pairs = [(1.0, 0.0)] * 9 + [(0.0, 1.0)] + [(1.0, 1.0)] * 30 + [(0.0, 0.0)] * 10
    found = compare(pairs)
    assert (found.better, found.worse, found.questions, found.test) == (9, 1, 50, "McNemar")
    assert found.p == 22 / 1024
    assert (found.mean, found.other) == (39 / 50, 31 / 50) and found.difference == pytest.approx(8 / 50)
    assert found.low < found.difference < found.high and found.low > 0


def test_shares_are_tested_by_a_bootstrap():
    rng = np.random.default_rng(7)
    own, noise = rng.choice([0.0, 0.3, 0.6, 1.0], 400), rng.choice([0.0, 0.3], 400)
    worse = np.maximum(own - noise, 0)
    sure, unsure = (
        compare(list(zip(own, worse, strict=True))),
        compare(list(zip(own, rng.permutation(own), strict=True))),
    )
    assert sure.test == unsure.test == "bootstrap"
    assert sure.p < 0.001 < 0.05 < unsure.p
    assert compare(list(zip(own, worse, strict=True))) == sure, "the same each time"


def test_a_bootstrap_of_no_difference_says_so():
    assert bootstrap([0.0] * 20) == 1.0
    assert bootstrap([0.25, -0.25] * 10) == 1.0


def test_about_one_in_twenty_comparisons_of_equals_is_below_five_percent():
    rng = np.random.default_rng(0)
    ps = [bootstrap((rng.random(60) - 0.5).tolist()) for _ in range(100)]
    assert 0 < sum(p < 0.05 for p in ps) < 14
