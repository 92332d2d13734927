"""How sure a score is: a bootstrap over the questions, for any score that is a function of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
LEVEL = 0.95
SEED = 0


class Total(NamedTuple):
    """A score of all questions together.

    Attributes:
        parts: (U, K) numbers of each unit that is drawn: a question, or the questions that belong together.
        value: (…, K) their sums → (…) the score.
    """

    parts: NDArray[np.float64]
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def score(self) -> float:
        """The score."""
        return float(self.value(self.parts.sum(axis=0)))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score, by drawing as many units with replacement a thousand times."""
        rows, counts = np.unique(self.parts, axis=0, return_counts=True)
        # How often each row is drawn, at once: units that are alike need not be told apart.
        drawn = np.random.default_rng(SEED).multinomial(len(self.parts), counts / len(self.parts), size=SAMPLES)
        scores = self.value(drawn @ rows)
        low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def mean_of(scores: NDArray[np.float64] | list[float]) -> Total:
    """The mean of scores, one a unit."""
    values = np.asarray(scores, float)
    return Total(np.stack([values, np.ones_like(values)], axis=1), ratio)


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…, 2) sums → the first over the second, which counts."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)
