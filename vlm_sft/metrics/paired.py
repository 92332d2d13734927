"""Two sets of answers to the same questions: is one better, or is it chance?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .intervals import SEED, mean_of

DRAWS = 10_000


class Paired(NamedTuple):
    """What a comparison found.

    Attributes:
        questions: How many both were asked.
        mean: Of the scores of the first.
        other: Of those of the second.
        difference: First minus second.
        low: Of the 95 % interval of the difference, by a bootstrap over the questions.
        high: Of the same.
        better: Questions at which the first has the higher score.
        worse: At which it has the lower one.
        p: How probable so large a difference is, or a larger one, where there is none.
        test: How `p` was found: `McNemar` where every score is 0 or 1, else `bootstrap`.
    """

    questions: int
    mean: float
    other: float
    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    test: str


def compare(pairs: Sequence[tuple[float, float]]) -> Paired:
    """Compares the scores of the same questions.

    Args:
        pairs: Of each question the score of the first and of the second.
    """
    scores = np.asarray(pairs, float)
    own = scores[:, 0] - scores[:, 1]
    better, worse = int((own > 0).sum()), int((own < 0).sum())
    binary = bool(np.isin(scores, (0.0, 1.0)).all())
    p = mcnemar(better, worse) if binary else bootstrap(own.tolist())
    low, high = mean_of(own.tolist()).interval()
    first, second = scores.mean(axis=0).tolist()
    test = "McNemar" if binary else "bootstrap"
    return Paired(len(scores), first, second, first - second, low, high, better, worse, p, test)


def mcnemar(better: int, worse: int) -> float:
    """McNemar's exact test, two-sided: were each of the questions that differ a fair coin, how odd is this?

    It is the binomial test of the questions that one of two has right and the other not (Q. McNemar, 1947); whole
    numbers alone, so nothing is rounded before the end.
    """
    tosses, fewer = better + worse, min(better, worse)
    ways = total = 1
    for k in range(1, fewer + 1):
        ways = ways * (tosses - k + 1) // k
        total += ways
    return min(1.0, float(Fraction(2 * total, 2**tosses)))


def bootstrap(differences: Sequence[float]) -> float:
    """The two-sided p-value of a mean by a bootstrap of the differences moved to a mean of zero; seeded.

    (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, 16.4.)
    """
    values, counts = np.unique(np.asarray(differences, float), return_counts=True)
    mean = float(values @ counts / counts.sum())
    drawn = np.random.default_rng(SEED).multinomial(counts.sum(), counts / counts.sum(), size=DRAWS)
    means = drawn @ (values - mean) / counts.sum()
    # The sample itself is one of the draws: no p-value is 0.
    return float((1 + (np.abs(means) >= abs(mean) - 1e-12).sum()) / (1 + DRAWS))
