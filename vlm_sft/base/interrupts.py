"""How a run is stopped, and that it ends with all that it started.

Ctrl-C and SIGTERM while a model trains: the first asks for a save and a stop, a second Ctrl-C stops at once.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # which registers its exit function
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

from .errors import TOLD_TO_END

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_DIE = 5.0  # for all workers together; one that the kernel cannot end (a disk that hangs) is left behind
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """A context in which signals are remembered instead of ending the program.

    Only the main thread of a program can do that; elsewhere the context does nothing.

    Attributes:
        signal: The first signal that came, to this process or, once the processes have agreed, to any; None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is not None and self.signal == signal.SIGTERM:
            error.add_note(TOLD_TO_END)  # so nobody need wait for it any more

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, as shells count."""
        assert self.signal is not None
        return 128 + self.signal

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data-loader worker: it lives as long as its trainer, which is told too
        if self.signal is None:
            self.signal = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, f"\n{_NAMES[self.signal]}: saving after this step, then stopping{again}.\n".encode())
        elif number == signal.SIGINT or self.signal == signal.SIGINT:
            # torch's launcher, told by a second Ctrl-C, tells its processes by a SIGTERM.
            raise KeyboardInterrupt
        # A second SIGTERM is the same one: Slurm sends it to every process, and the launcher passes it on.


def shield_worker() -> None:
    """Lets a data-loader worker outlive Ctrl-C and SIGTERM, which a terminal, Slurm or a launcher sends to it as well.

    Its batches are still needed for the step after which the trainer stops; then the trainer ends it, and
    `end_workers` where it does not come to that. A second SIGTERM ends it too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@contextmanager
def workers_end_with_errors() -> Iterator[None]:
    """Ends the workers that were started inside at once where an error leads out of it, and all when Python exits.

    Python itself sends each one SIGTERM and then waits without a limit, for ever where a worker is shielded or hangs.
    """
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # exit functions run in reverse: this one before that of multiprocessing
    before = multiprocessing.active_children()
    try:
        yield
    except BaseException:
        end_workers(spared=before)
        raise


def end_workers(spared: Collection[BaseProcess] = ()) -> None:
    """Kills the workers of this process, less those `spared`, and waits a few seconds for their end."""
    if threading.current_thread() is not threading.main_thread():
        return  # torch's handler for a worker's death would raise in the main thread; Python's exit comes there
    workers = [child for child in multiprocessing.active_children() if child.daemon and child not in spared]
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # these deaths are no error
    try:
        for worker in workers:
            worker.kill()
        limit = time.monotonic() + SECONDS_TO_DIE
        for worker in workers:
            worker.join(max(0.0, limit - time.monotonic()))
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
