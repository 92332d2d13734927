"""What preflight found as one HTML page: no script, nothing loaded from anywhere, every text escaped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..base.words import counted
from ..model.freeze import PartRow
from ..pages.layout import render
from .checks import ERROR, WARNING, Evidence, Finding
from .memory import Estimate
from .pairs import ShownPair
from .samples import Share, Shown

BARS = 40
WIDTH, HEIGHT = 640, 160  # sides of the histogram, in units of its drawing
LONGEST_SHOWN = 1500  # groups of tokens of a sample that are shown


@dataclass
class Report:
    """All that the page shows.

    Attributes:
        name: Of the recipe.
        recipe: Its YAML, resolved.
        findings: Errors first.
        evidence: What the findings are drawn from.
        lengths: Tokens of rows, uncut.
        max_length: Where they are cut, or None.
        samples: Some rows.
        pairs: Some training images beside the held-out ones that they look like.
        sources: The mixture by source.
        languages: The mixture by language.
        plan: The freeze plan by part.
        memory: The estimate for a device, or None.
        time: Sentences on how long the run takes.
        left_out: Sentences on what was not looked at.
    """

    name: str
    recipe: str
    findings: list[Finding] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    lengths: list[int] = field(default_factory=list)
    max_length: int | None = None
    samples: list[Shown] = field(default_factory=list)
    pairs: list[ShownPair] = field(default_factory=list)
    sources: list[Share] = field(default_factory=list)
    languages: list[Share] = field(default_factory=list)
    plan: list[PartRow] = field(default_factory=list)
    memory: Estimate | None = None
    time: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst level there is, or `ok`."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in (ERROR, WARNING) if level in levels), "ok")


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram, in the units of the picture."""

    x: float
    y: float
    width: float
    height: float
    cut: bool
    title: str


@dataclass(frozen=True)
class Histogram:
    """Bars, where the cut is (or None), and the numbers at both ends of the axis."""

    bars: list[Bar]
    cut: float | None
    longest: int
    beyond: int


def histogram(lengths: list[int], max_length: int | None) -> Histogram | None:
    """The lengths of rows as bars; None without any."""
    if not lengths:
        return None
    top = max([*lengths, max_length or 0]) + 1
    counts, edges = np.histogram(lengths, bins=min(BARS, top), range=(0, top))
    scale = HEIGHT / counts.max()
    bars = [
        Bar(
            x=round(left / top * WIDTH, 2),
            y=round(HEIGHT - count * scale, 2),
            width=round((right - left) / top * WIDTH - 1, 2),
            height=round(count * scale, 2),
            cut=max_length is not None and left >= max_length,
            title=f"{_span(int(np.ceil(left)), int(np.ceil(right)) - 1)}: {counted(count, 'row')}",
        )
        for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    cut = None if max_length is None else round(max_length / top * WIDTH, 2)
    return Histogram(bars, cut, top - 1, sum(length > (max_length or top) for length in lengths))


def _span(first: int, last: int) -> str:
    return counted(first, "token") if first == last else f"{first:,} – {last:,} tokens"


def render_page(report: Report) -> str:
    """The page as text."""
    return render(
        Path(__file__).with_name("page.html.jinja"),
        report=report,
        evidence=report.evidence,
        proof=report.evidence.proof,
        histogram=histogram(report.lengths, report.max_length),
        width=WIDTH,
        height=HEIGHT,
        longest_shown=LONGEST_SHOWN,
    )
