"""How far something long is: a bar at the terminal; in a log file a line every few seconds, and soon every minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .words import duration

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES, LATER = 5.0, 60.0
"""Between lines of a log file in the first minute, and from then on."""


@contextmanager
def waiting(console: Console, doing: str) -> Iterator[None]:
    """Within, something goes on of which nobody knows how far it is: a spinner, in a log file a line a minute.

    Args:
        console: Where to say it.
        doing: What, such as ``Loading the pieces``.
    """
    if console.is_terminal:
        with console.status(doing):
            yield
        return
    began, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(LATER):
            passed = duration(time.monotonic() - began)
            console.print(f"{doing}: {passed} so far", highlight=False, markup=False, soft_wrap=True)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class RowProgress:
    """A context in which `tell` says how far something is, with its rate and the time left.

    Args:
        console: Where to say it.
        name: What is said first, such as ``train``.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._doing, self._began, self._said = "", time.monotonic(), time.monotonic()
        self._opened, self._line, self._ended = time.monotonic(), "", threading.Event()
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> RowProgress:
        """Shows the bar; without a terminal, begins to say now and then that it still goes on."""
        self._bar.start()
        if not self.console.is_terminal:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the bar away."""
        self._ended.set()
        self._bar.stop()

    def _beat(self) -> None:
        """Says the last line again where none was said for a minute: one batch, or one file, may take long."""
        while not self._ended.wait(LATER):
            if time.monotonic() - self._said >= LATER:
                self._print(f"{self._line or self.name} ({duration(time.monotonic() - self._opened)} so far)")

    def _print(self, line: str) -> None:
        self._said = time.monotonic()
        self.console.print(line, highlight=False, markup=False)

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
        self._line = line
        if self.console.is_terminal:
            self._bar.update(self._task, description=line, completed=done, total=of)
        elif now - self._said > (SECONDS_BETWEEN_LINES if now - self._opened < LATER else LATER):
            self._print(line)

    def through(self, rows: Iterable[Item], doing: str, of: int | None = None, what: str = "rows") -> Iterator[Item]:
        """The same rows, of which it says how many have passed; see `tell`."""
        for number, row in enumerate(rows, start=1):
            yield row
            self.tell(doing, number, of, what)

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
