"""Curves stay inside their chart, whatever the numbers are."""

from __future__ import annotations

import math
import random

import pytest

from vlm_sft.watching.charts import BOTTOM, HEIGHT, LEFT, MOST, RIGHT, TOP, WIDTH, Line, draw


def places(panel):
    for drawn in panel.lines:
        for point in drawn.path[1:].split("L"):
            yield tuple(map(float, point.split()))


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [0.0], [0.0, 0.0], [-3.0, -1.0], [1e-9, 1e9], [1e300, 1e-300], [5.0, 5.0, 5.0], [0.1, 0.2, 0.15],
        [random.Random(1).gauss(0, 1) for _ in range(5000)], [math.nan, 1.0], [-1e-12, 4.0], [1e18, 1e18 + 4096],
    ],
    ids=range(12),
)  # fmt: skip
def test_every_point_and_every_mark_lies_in_the_chart(values):
    panel = draw("loss", "损失", [Line("training", list(enumerate(values, start=7)))])
    for x, y in places(panel):
        assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM
    assert all(TOP - 1 <= y <= HEIGHT - BOTTOM + 1 for y, _ in panel.up) and 1 <= len(panel.up) <= 12
    assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in panel.across) and panel.across
    assert len(panel.lines[0].path.split("L")) <= MOST


def test_marks_are_round_and_larger_is_higher():
    panel = draw("a", "", [Line("", [(0, 0.1), (50, 0.93), (100, 0.5)])], share=True)
    assert [text for _, text in panel.up] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert [text for _, text in panel.across] == ["0", "20", "40", "60", "80", "100"]
    heights = [y for _, y in places(panel)]
    assert heights[1] < heights[2] < heights[0] and panel.lines[0].last == "50%"


def test_a_loss_that_falls_a_hundredfold_is_drawn_by_its_logarithm():
    marks = [text for _, text in draw("loss", "", [Line("", [(1, 100.0), (2, 1.0)])]).up]
    assert ("10" in marks and "50" in marks) or "2" in marks
    ys = [y for _, y in places(draw("loss", "", [Line("", [(1, 100.0), (2, 10.0), (3, 1.0)])]))]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


def test_what_is_no_number_is_counted_and_a_chart_of_nothing_is_none():
    panel = draw("loss", "", [Line("a", [(1, 1.0), (2, math.inf), (3, math.nan)]), Line("b", [])])
    assert panel.gone == 2 and [drawn.line.label for drawn in panel.lines] == ["a"]
    assert draw("loss", "", [Line("a", [(1, math.nan)])]) is None and draw("loss", "", []) is None


def test_numbers_that_nobody_can_have_meant_are_counted_or_lie_on_the_line():
    wide = draw("x", "", [Line("a", [(1, 1e308), (2, -1e308), (3, 1.0)])])
    assert wide is not None and wide.gone == 2 and wide.lines[0].last == "1"
    tiny = draw("x", "", [Line("a", [(1, 5e-324), (2, 1e-323)])])
    assert tiny is not None and tiny.gone == 0
