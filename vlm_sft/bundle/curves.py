"""The curves of a run as one picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.names import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEARNING_RATE = "learning_rate"
# A loss that falls by this factor shows nothing of its end on a linear axis.
WIDE = 8.0
# Of Linux, Windows and macOS, in this order.
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
                 "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC")  # fmt: skip
MANY_POINTS = 80  # from here on a running mean is drawn over the single values

Series = tuple[str, str]  # key in the log, name in the legend


def draw_curves(history: list[dict[str, float]], path: str | Path, title: str = "") -> Path:
    """Draws a `log_history` into a PNG file: loss, accuracy, image use, rates, throughput and data wait by step."""
    # The object, not pyplot: pyplot would switch a notebook's backend.
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    panels: tuple[tuple[str, Sequence[Series]], ...] = (
        ("loss", [("loss", "training"), ("eval_loss", "validation")]),
        ("token accuracy", [("token_accuracy", "training"), ("eval_token_accuracy", "validation")]),
        (
            "image use: validation loss with",
            [("eval_loss_own_image", "own image"), ("eval_loss_other_image", "another's image")],
        ),
        ("learning rate", learning_rates(history)),
        ("tokens per second", [("tokens_per_second", "")]),
        ("share of time waiting for data", [("data_wait_share", "")]),
    )
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (name, series) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, name, series, history)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    # matplotlib brings no Chinese characters, but the machine may have a font with them.
    fonts = [name for name in CHINESE_FONTS if name in fontManager.get_font_names()]
    figure.suptitle(title, fontsize=12, fontfamily=["DejaVu Sans", *fonts])
    path = Path(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # without a Chinese font there are boxes
        figure.savefig(path, dpi=110)
    return path


def learning_rates(history: list[dict[str, float]]) -> list[Series]:
    """The learning rates in a log: one a part where the parts are told apart, else the one there is."""
    parts = {key: key.removeprefix(f"{LEARNING_RATE}_") for row in history for key in row if key != LEARNING_RATE}
    return [(key, part) for key, part in parts.items() if key.startswith(LEARNING_RATE)] or [(LEARNING_RATE, "")]


def _draw_panel(axis: Axes, name: str, series: Sequence[Series], history: list[Json]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    drawn: list[float] = []
    for key, label in series:
        points = [(row["step"], row[key]) for row in history if key in row and row["step"] > 0]
        if points:
            steps, values = zip(*points, strict=True)
            _draw_line(axis, steps, values, label, smooth=name != "learning rate")
            drawn += values
    axis.set_title(name, loc="left", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))
    if not drawn:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axis.transAxes)
        return
    if name == "loss" and min(drawn) > 0 and max(drawn) > WIDE * min(drawn):
        axis.set_yscale("log")  # with plain numbers at 1, 2 and 5
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        top = 1.02 if name == "token accuracy" else 1.08 * max((v for v in drawn if math.isfinite(v)), default=0.0)
        axis.set_ylim(bottom=0, top=top if top > 0 else None)  # a marker at the top is not cut in half
    if name == "learning rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
    if name == "tokens per second":
        axis.yaxis.set_major_formatter("{x:,.0f}")
    if name.startswith("share"):
        axis.set_ylim(top=max(1.2 * max(drawn), 0.1))
        axis.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
    if any(label for _, label in series):
        axis.legend(frameon=False, fontsize=9)


def _draw_line(axis: Axes, steps: Sequence[float], values: Sequence[float], label: str, smooth: bool) -> None:
    import numpy as np

    many = smooth and len(steps) >= MANY_POINTS
    style = {"alpha": 0.3} if many else {"label": label, "marker": "o" if len(steps) < 12 else ""}
    (line,) = axis.plot(steps, values, markersize=4, **style)
    if many:
        sums = np.cumsum([0.0, *values])
        half, at = len(values) // MANY_POINTS, np.arange(len(values))
        starts, ends = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
        axis.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), label=label, color=line.get_color())
