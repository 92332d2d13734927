"""What a person sees while many rows are looked at."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vlm_sft.base import progress as module
from vlm_sft.base.progress import RowProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves on."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then_with_rate_and_time_left(clock):
    console = Console(file=io.StringIO(), width=120)
    with RowProgress(console, "train") as progress:
        progress.tell("[a]: read", 10, 4000, about=True)
        clock[0] += 10
        progress.tell("[a]: read", 1000, 4000, about=True)
        clock[0] += 1
        progress.tell("[a]: read", 1500, 4000, about=True)
        clock[0] += 10
        progress.tell("measured", 7, None)
        clock[0] += 10
        progress.tell("measured", 107, 107)
    assert console.file.getvalue().splitlines() == [
        "train: [a]: read 1,000 of about 4,000 rows, 100 a second, 0:00:30 left",
        "train: measured 7 rows",
        "train: measured 107 of 107 rows, 11 a second, 0:00:00 left",
    ]


def test_a_guess_that_was_too_low_leaves_no_time_below_zero(clock):
    console = Console(file=io.StringIO(), width=120)
    with RowProgress(console, "train") as progress:
        progress.tell("read", 0, 10)
        clock[0] += 9
        progress.tell("read", 90, 10, about=True)
    assert "read 90 of about 90 rows, 10 a second, 0:00:00 left" in console.file.getvalue()


def test_a_terminal_shows_a_bar_and_takes_it_away():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with RowProgress(console, "train") as progress:
        progress.tell("measured", 50, 100)
        progress._bar.refresh()
        assert "━" in console.file.getvalue() and "measured 50 of 100 rows" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[2K"), "the line is empty again"


def test_slow_questions_have_a_rate_and_what_failed_is_noted(clock):
    console = Console(file=io.StringIO(), width=120)
    with RowProgress(console, "问题") as progress:
        asked = progress.counter("asked", 8, "questions")
        asked(1)
        clock[0] += 10
        asked(3)
        clock[0] += 10
        progress.tell("asked", 6, 8, "questions", note="2 with errors")
    assert console.file.getvalue().splitlines() == [
        "问题: asked 4 of 8 questions, 0.4 a second, 0:00:10 left",
        "问题: asked 6 of 8 questions, 0.3 a second, 0:00:07 left, 2 with errors",
    ]
