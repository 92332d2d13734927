"""Where a program speaks to a person: standard error, of the first process alone, in whole lines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_LOGS = 120  # a table in a log file is not cut to the width of a terminal that is not there


def make_console(stderr: bool = True) -> Console:
    """A console that speaks on the first process of a launch alone.

    Args:
        stderr: Standard error, so that standard output stays free for results.
    """
    from rich.console import Console

    console = Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")
    return console if console.is_terminal else Console(stderr=stderr, quiet=console.quiet, width=WIDTH_OF_LOGS)


def say(console: Console, message: str) -> None:
    """Prints a message as it is: brackets are no markup, and a log file's lines are not broken."""
    console.print(message, markup=False, highlight=False, soft_wrap=not console.is_terminal)
