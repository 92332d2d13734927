"""What a person sees while many rows are looked at."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from vlm_sft.base import progress as module
from vlm_sft.base.progress import RowProgress, steps, told_in, waiting


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


@pytest.fixture
def often(monkeypatch):
    """Lines come twenty times a second."""
    monkeypatch.setattr(module, "LATER", 0.05)
    monkeypatch.setattr(module, "SECONDS_AT_A_TERMINAL", 0.05)


def hub_bar(**options):
    """A bar as the Hub's library makes one for a file that it fetches."""
    from huggingface_hub.utils import tqdm as _  # noqa: F401  # the module of that name is hidden behind the class

    make = sys.modules["huggingface_hub.utils.tqdm"]._get_progress_bar_context
    return make(log_level=logging.WARNING, name="huggingface_hub.http_get", **options)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_fetched_is_shown_with_its_rate_and_the_time_left(terminal, often, capsys):
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    with waiting(console, "Loading [the] pieces"), hub_bar(desc="model.safetensors", total=4_000_000_000) as bar:
        bar.start_t -= 10
        bar.update(1_000_000_000)
        time.sleep(0.4)
    said = console.file.getvalue()
    assert "Loading [the] pieces: model.safetensors 1,000 of 4,000 MB, " in said
    assert re.search(r"\d+ MB a second, 0:00:(29|30|31) left", said)
    assert capsys.readouterr() == ("", ""), "the library draws nothing itself"


def test_weights_that_transformers_loads_are_counted(often):
    from transformers.utils import logging as transformers_logging

    console = Console(file=io.StringIO(), width=160)
    with waiting(console, "Loading"):
        bar = transformers_logging.tqdm(desc="Loading weights", total=81)
        bar.start_t -= 4
        bar.update(20)
        time.sleep(0.2)
        bar.close()
    assert re.search(r"Loading: Loading weights 20 of 81, 4.\d a second, 0:00:1\d left", console.file.getvalue())
    again = transformers_logging.tqdm(desc="Loading weights", total=81)
    assert type(again).__name__ != "Heard", "afterwards the library is as it was"


def test_one_within_another_says_nothing_of_its_own_and_rows_tell_of_what_is_fetched(often):
    console = Console(file=io.StringIO(), width=160)
    with RowProgress(console, "filter") as progress:
        progress.tell("scored", 3, 10)
        with waiting(console, "Fetching a model"), hub_bar(desc="model.bin", total=2_000_000) as bar:
            bar.update(1_000_000)
            time.sleep(0.3)
    lines = set(console.file.getvalue().splitlines())
    assert lines == {"filter: scored 3 of 10 rows (model.bin 1 of 2 MB)"}


def test_steps_of_ours_have_a_rate_and_the_time_left_while_one_waits(often):
    console = Console(file=io.StringIO(), width=160)
    with waiting(console, "Writing exported"):
        for number in steps(range(4), "rounded", "weights"):
            time.sleep(0.1 if number < 3 else 1.2)
        time.sleep(0.2)
    lines = console.file.getvalue().splitlines()
    assert "Writing exported: rounded 1 of 4 weights" in lines
    assert any(re.fullmatch(r".* rounded 3 of 4 weights, \d.\d a second, 0:00:0\d left", line) for line in lines)
    assert lines[-1].endswith("so far"), "what has passed is not said again"


def test_what_a_process_says_of_itself_is_shown_by_who_waits_for_it(often, tmp_path):
    program = (
        "import sys, time\n"
        "from vlm_sft.base import progress\n"
        "progress.SECONDS_AT_A_TERMINAL = 0.05\n"
        "with progress.telling(), progress.Steps('read', 8, 'weights') as told:\n"
        "    told.n = 5\n"
        "    time.sleep(1)\n"
    )
    console = Console(file=io.StringIO(), width=160)
    with waiting(console, "Comparing"), told_in(tmp_path / "told") as told:
        subprocess.run([sys.executable, "-c", program], env={**os.environ, **told}, check=True)
    assert "Comparing: read 5 of 8 weights" in console.file.getvalue().splitlines()


def test_bars_inside_other_steps_leave_by_themselves(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    with waiting(console, "Loading"), told_in(tmp_path / "said"), module.Steps("merged", 8, "weights"):
        with hub_bar(desc="a", total=1), hub_bar(desc="a", total=1):
            heard = list(module._HEARD)
        assert len(heard) == 4 and heard[:2] == module._HEARD
