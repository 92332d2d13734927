"""What a person sees while many rows are looked at."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from vlm_sft.base import progress as module
from vlm_sft.base.progress import RowProgress, waiting


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


def test_after_a_minute_a_log_file_gets_a_line_a_minute(clock):
    console = Console(file=io.StringIO(), width=120)
    with RowProgress(console, "long") as progress:
        for second in range(600):
            clock[0] += 1
            progress.tell("read", second, None)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 9 + 8, "nine in the first minute, then one each"


def test_a_log_file_shows_that_something_long_still_goes_on(monkeypatch):
    """Where nobody knows how far it is, and where one batch takes long."""
    monkeypatch.setattr(module, "LATER", 0.05)
    console = Console(file=io.StringIO(), width=120)
    with waiting(console, "Loading the pieces"):
        time.sleep(0.3)
    assert "Loading the pieces: 0:00:00 so far\n" in console.file.getvalue()
    before = console.file.getvalue()
    time.sleep(0.2)
    assert console.file.getvalue() == before, "it is over"
    with RowProgress(console, "answers") as progress:
        progress.tell("asked", 3, 9)
        time.sleep(0.3)
    assert "answers: asked 3 of 9 rows (0:00:00 so far)" in console.file.getvalue()


def test_waiting_is_a_spinner_at_a_terminal():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with waiting(console, "Loading the pieces"):
        time.sleep(0.2)
    assert "Loading the pieces" in console.file.getvalue() and "so far" not in console.file.getvalue()


def test_rows_pass_through_and_are_counted(clock):
    console = Console(file=io.StringIO(), width=120)
    with RowProgress(console, "src") as progress:
        for row in progress.through(range(3), "converted"):
            clock[0] += 6 + row
    assert console.file.getvalue().splitlines()[-1].startswith("src: converted 3 rows")
