"""How many rows of each source a mixture has, and in which order: numbers alone, the same in every process.

n_d is the number of rows of source d, S_d = repeat_d * n_d its size, and the mixture has N = sum of S_d rows. With
languages, every (source, language) is a part of its own: the language decides how many rows, the sources share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import UserError
from ..base.words import short
from .source import name_of

if TYPE_CHECKING:
    from ..recipe.sections import Source
    from .dataset import SourceRows

SHARES = {
    "proportional": lambda size: float(size),
    "sqrt": lambda size: size**0.5,
    "weights": lambda size: float(size > 0),
}
"""How a source's share follows from its size, before its weight. The keys are the kinds of sampling."""


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `total`; of equal remainders the first wins."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(shares)), key=lambda d: (counts[d] - exact[d], d))
    for d in by_remainder[: total - sum(counts)]:
        counts[d] += 1
    return counts


def mixture_counts(
    sizes: Sequence[int], weights: Sequence[float], sampling: str, total: int | None = None
) -> list[int]:
    """How many rows of a mixture come from each source: in proportion to weight_d * f(S_d), by largest remainder.

    Args:
        sizes: S_d, rows of a source times its `repeat`; at least one is not 0.
        weights: one for each.
        sampling: ``proportional`` f(S) = S; ``sqrt`` f(S) = sqrt(S), as InstructBLIP (arXiv:2305.06500); ``weights``
            f = 1.
        total: rows of the mixture; None for the sum of `sizes`.
    """
    shares = [weight * SHARES[sampling](size) for size, weight in zip(sizes, weights, strict=True)]
    return largest_remainder(sum(sizes) if total is None else total, shares)


def balanced_counts(
    sizes: Mapping[str, Sequence[int]], weights: Sequence[float], sampling: str, languages: Mapping[str, float]
) -> dict[str, list[int]]:
    """As `mixture_counts` within each language, of which each has its share of all rows.

    Args:
        sizes: language to S_d of the rows in it.
        languages: the same languages to their shares, of any sum.
    """
    total = sum(map(sum, sizes.values()))
    rows = largest_remainder(total, [languages[language] for language in sizes])
    return {
        language: mixture_counts(sizes[language], weights, sampling, count)
        for language, count in zip(sizes, rows, strict=True)
    }


def mixture_order(parts: Sequence[np.ndarray], counts: Sequence[int], seed: int) -> np.ndarray:
    """Row numbers of a mixture: `counts` of each part, interleaved at random.

    Every row of a part is drawn once before any of them is drawn again.

    Args:
        parts: the row numbers of each part, (n_d,) int64.
        counts: rows drawn of each; 0 for a part without rows.
        seed: the same seed gives the same order, whatever process asks and however many there are.
    """
    rng = np.random.default_rng([seed % 2**32, len(parts)])
    labels = np.repeat(np.arange(len(parts)), counts)
    rng.shuffle(labels)
    order = np.empty(len(labels), dtype=np.int64)
    for d, (part, count) in enumerate(zip(parts, counts, strict=True)):
        passes = [rng.permutation(part) for _ in range(-(-count // len(part)))] if count else []
        if passes:
            order[labels == d] = np.concatenate(passes)[:count]
    return order


def order_of(
    sources: Sequence[Source], loaded: Sequence[SourceRows], sampling: str, languages: dict[str, float], seed: int
) -> np.ndarray | None:
    """Row numbers of the mixture in the concatenation of its sources; None for all of them as they are."""
    weights, repeats = [source.weight for source in sources], [source.repeat for source in sources]
    ends = np.cumsum([len(part.rows) for part in loaded])
    ranges = np.split(np.arange(ends[-1]), ends[:-1])
    if languages:
        of_rows = np.array([language for part in loaded for language in part.languages])
        _check_languages(set(of_rows.tolist()), languages)
        cells = {language: [part[of_rows[part] == language] for part in ranges] for language in languages}
        sizes = {name: [len(p) * r for p, r in zip(parts, repeats, strict=True)] for name, parts in cells.items()}
        by_language = balanced_counts(sizes, weights, sampling, languages)
        parts = [part for cell in cells.values() for part in cell]
        counts = [count for cell in by_language.values() for count in cell]
        _check_counts(sources, [sum(counts[d :: len(sources)]) for d in range(len(sources))])
        return mixture_order(parts, counts, seed)
    if len(sources) == 1 or (sampling == "proportional" and len(set(weights)) == 1):
        plain = [np.tile(part, repeat) for part, repeat in zip(ranges, repeats, strict=True)]
        return np.concatenate(plain) if max(repeats) > 1 else None
    counts = mixture_counts([len(p) * r for p, r in zip(ranges, repeats, strict=True)], weights, sampling)
    _check_counts(sources, counts)
    return mixture_order(ranges, counts, seed)


def _check_counts(sources: Sequence[Source], counts: Sequence[int]) -> None:
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise UserError(f'The source "{name_of(source)}" would get no row: raise its `weight` or remove it.')


def _check_languages(there: set[str], languages: Mapping[str, float]) -> None:
    for language in languages:
        if language not in there:
            known = ", ".join(map(short, sorted(there)))
            raise UserError(f'`languages` gives a share to "{language}", but the rows are in {known}: remove it.')
    for language in sorted(there - set(languages)):
        mend = "add it, or map the column `language`"
        raise UserError(f'Some rows are in "{short(language)}", which `languages` gives no share: {mend}.')
