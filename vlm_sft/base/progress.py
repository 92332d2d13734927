"""How far something long is: a bar at the terminal; in a log file a line every few seconds, and soon every minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from .whole_files import read_text
from .words import duration

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES, LATER = 5.0, 60.0
"""Between lines of a log file in the first minute, and from then on."""


SECONDS_AT_A_TERMINAL = 0.5
"""Between two looks at how far a library says that it is."""
TOLD = "VLM_SFT_TOLD"
"""Variable of a process of ours: the file in which it says how far it is, to the process that waits for it."""


@contextmanager
def waiting(console: Console, doing: str) -> Iterator[None]:
    """Within, something goes on of which we do not know how far it is: a spinner, in a log file a line a minute.

    What a library, a `Steps` or a process of `told_in` says of it (how much of a file is fetched, how many weights are
    loaded, at which rate, and how long it takes still) is shown beside. Within another one that is shown already, it
    shows nothing of its own.

    Args:
        console: Where to say it.
        doing: What, such as ``Loading the pieces``.
    """
    began = time.monotonic()
    with _hearing() as heard, ExitStack() as shown:
        if heard is None:
            pass
        elif console.is_terminal:
            status = shown.enter_context(console.status(Text(doing)))
            shown.enter_context(
                _repeated(SECONDS_AT_A_TERMINAL, lambda: status.update(Text(f"{doing}{heard() and ': '}{heard()}")))
            )
        else:

            def beat() -> None:
                line = f"{doing}: {heard() or duration(time.monotonic() - began) + ' so far'}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

            shown.enter_context(_repeated(LATER, beat))
        yield


@contextmanager
def _repeated(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Within, something is done again and again."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(seconds):
            do()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


_HEARD: list[Any] = []  # bars of libraries that are not closed, and what is like them
_HEARING = threading.Lock()


def _leave(heard: object) -> None:
    """Takes one out by itself: bars of tqdm are equal where they show the same, and fail beside what is no bar."""
    _HEARD[:] = [each for each in _HEARD if each is not heard]


class Steps:
    """A context that says how far something is, with its rate and the time left, to the `waiting` around it.

    Args:
        doing: What is done, such as ``merged``.
        of: How many there are; None where nobody knows.
        what: What is counted, such as ``layers``.

    Attributes:
        n: How many are done.
    """

    def __init__(self, doing: str, of: int | None = None, what: str = "") -> None:
        self.desc, self.total, self.unit, self.n, self.initial = doing, of, what, 0, 0
        self.start_t = time.time()

    def __enter__(self) -> Steps:
        """Is heard from now on."""
        _HEARD.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Is heard no more."""
        _leave(self)

    def tell(self, doing: str, done: int, of: int | None, what: str = "rows") -> None:
        """Says how far it is, as `RowProgress.tell`; the rate is that since this was first said."""
        if doing != self.desc:
            self.start_t = time.time()
        self.desc, self.n, self.total, self.unit = doing, done, of, what


def steps(items: Iterable[Item], doing: str, what: str, of: int | None = None) -> Iterator[Item]:
    """The same items, of which the `waiting` around says how many have passed; see `Steps`."""
    with Steps(doing, len(items) if of is None and isinstance(items, Sized) else of, what) as passed:
        for item in items:
            yield item
            passed.n += 1


class _Told:
    """What another process says of itself in a file."""

    unit = ""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def words(self) -> str:
        try:
            return read_text(self._path)
        except OSError:
            return ""


@contextmanager
def told_in(path: Path) -> Iterator[dict[str, str]]:
    """Within, the `waiting` around shows what a process says that is started with this environment; see `telling`."""
    _HEARD.append(other := _Told(path))
    try:
        yield {TOLD: str(path)}
    finally:
        _leave(other)


@contextmanager
def telling() -> Iterator[None]:
    """Within, a process that was started by who waits for it says how far it is; see `told_in`."""
    with _hearing() as heard, ExitStack() as said:
        if heard is not None and (path := os.environ.pop(TOLD, None)):
            said.enter_context(_repeated(SECONDS_AT_A_TERMINAL, lambda: _tell(Path(path), heard())))
        yield


def _tell(path: Path, words: str) -> None:
    with suppress(OSError):  # who waited is gone, and its folder with it
        path.write_text(words, encoding="utf-8")


@contextmanager
def _hearing() -> Iterator[Callable[[], str] | None]:
    """Within, bars of the Hub and of transformers draw nothing and are asked how far they are; None in another one."""
    if not _HEARING.acquire(blocking=False):
        yield None
        return
    import huggingface_hub.utils._xet_progress_reporting  # nothing else imports it before a download
    from huggingface_hub import _snapshot_download

    kind = _bar()
    places = [
        (sys.modules["huggingface_hub.utils.tqdm"], "tqdm"),
        (huggingface_hub.utils._xet_progress_reporting, "tqdm"),
        (_snapshot_download, "hf_tqdm"),
    ]
    if (peft := sys.modules.get("peft.tuners.tuners_utils")) is not None:
        places.append((peft, "tqdm"))  # of layers that are merged; PEFT draws it where it is asked to
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, kind)
    weights = sys.modules.get("transformers.utils.logging")  # where it is not imported it loads none
    hook = weights and weights.set_tqdm_hook(lambda factory, args, options: kind(*args, **options))
    try:
        yield _said
    finally:
        if weights:
            weights.set_tqdm_hook(hook)
        for (module, name), old in zip(places, before, strict=True):
            setattr(module, name, old)
        _HEARD.clear()
        _HEARING.release()


@cache
def _bar() -> type:
    """A bar of the Hub's class that counts, also without a terminal, and draws nothing."""
    from huggingface_hub.utils import tqdm

    class Heard(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            nowhere = open(os.devnull, "w")  # noqa: SIM115  # closed with the bar
            super(tqdm, self).__init__(*args, **{**options, "disable": False, "file": nowhere})
            self.nowhere = nowhere
            _HEARD.append(self)

        def display(self, *args: Any, **options: Any) -> None:
            return

        def close(self) -> None:
            _leave(self)
            super().close()
            self.nowhere.close()

    return Heard


def _said() -> str:
    """What the newest bar says, or the oldest that counts bytes: a file, of which others count the pieces."""
    bars = list(_HEARD)
    bar = next((bar for bar in bars if bar.unit == "B"), bars[-1] if bars else None)
    if bar is None or isinstance(bar, _Told):
        return bar.words if bar else ""
    size, unit = (1e6, "MB") if bar.unit == "B" else (1, bar.unit if isinstance(bar, Steps) else "")
    done, of = bar.n / size, bar.total and bar.total / size
    amount = " ".join(filter(None, [f"{done:,.0f}", of and f"of {of:,.0f}", unit]))
    began = bar.initial / size
    pace = _pace(done - began, of and of - began, time.time() - bar.start_t, "MB " if bar.unit == "B" else "")
    return f"{bar.desc.rstrip(': ')} {amount}{pace}".lstrip()


class RowProgress:
    """A context in which `tell` says how far something is, with its rate and the time left.

    Args:
        console: Where to say it.
        name: What is said first, such as ``train``.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._doing, self._began, self._said = "", time.monotonic(), time.monotonic()
        self._opened, self._line, self._shown = time.monotonic(), "", ExitStack()
        self._heard: Callable[[], str] | None = None
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
        self._heard = self._shown.enter_context(_hearing())
        self._bar.start()
        seconds = SECONDS_AT_A_TERMINAL if self.console.is_terminal else LATER
        self._shown.enter_context(_repeated(seconds, self._beat))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the bar away."""
        self._shown.close()
        self._bar.stop()

    def _beat(self) -> None:
        """Says the last line again where none was said for a minute: one batch, or one file, may take long."""
        heard = self._heard() if self._heard else ""
        if self.console.is_terminal:
            self._bar.update(self._task, description=f"{self.name}: {heard}") if heard else None
        elif time.monotonic() - self._said >= LATER:
            so_far = heard or f"{duration(time.monotonic() - self._opened)} so far"
            self._print(f"{self._line or self.name} ({so_far})")

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


def _pace(done: float, of: float | None, seconds: float, unit: str = "") -> str:
    """Rate and time left; nothing where too little was seen of it."""
    if seconds < 1 or not done:
        return ""
    rate = done / seconds
    left = "" if of is None else f", {duration((of - done) / rate)} left"
    return f", {rate:,.{0 if rate >= 10 else 1}f} {unit}a second{left}"
