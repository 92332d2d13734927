"""How far a walk over many rows or questions is: a bar at the terminal, a line every few seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .words import duration

SECONDS_BETWEEN_LINES = 5.0


class RowProgress:
    """A context in which `tell` says how far something is, with its rate and the time left.

    Args:
        console: Where to say it.
        name: What is said first, such as ``train``.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._doing, self._began, self._said = "", time.monotonic(), time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> RowProgress:
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def tell(
        self, doing: str, done: int, of: int | None, what: str = "rows", *, about: bool = False, note: str = ""
    ) -> None:
        """Says how far it is.

        Args:
            doing: What is being done, such as ``measured``; the rate is that since this was first said.
            done: How many are done.
            of: Of how many; None where nobody knows.
            what: What is counted.
            about: `of` is a guess.
            note: Something to add, such as ``2 with errors``.
        """
        now = time.monotonic()
        if doing != self._doing:
            self._doing, self._began = doing, now
        if of is not None and about:
            of = max(of, done)
        goal = "" if of is None else f" of {'about ' if about else ''}{of:,}"
        line = f"{self.name}: {doing} {done:,}{goal} {what}{_pace(done, of, now - self._began)}{note and ', '}{note}"
        if self.console.is_terminal:
            self._bar.update(self._task, description=line, completed=done, total=of)
        elif now - self._said > SECONDS_BETWEEN_LINES:
            self.console.print(line, highlight=False, markup=False)
            self._said = now

    def counter(self, doing: str, of: int, what: str) -> Callable[[int], None]:
        """`tell` for who knows only how many more are done: a function that is told of those."""
        done = 0

        def add(more: int) -> None:
            nonlocal done
            done += more
            self.tell(doing, done, of, what)

        return add


def _pace(done: int, of: int | None, seconds: float) -> str:
    """Rate and time left; nothing where too little was seen of it."""
    if seconds < 1 or not done:
        return ""
    rate = done / seconds
    left = "" if of is None else f", {duration((of - done) / rate)} left"
    return f", {rate:,.{0 if rate >= 10 else 1}f} a second{left}"
