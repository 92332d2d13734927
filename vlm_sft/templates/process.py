"""Strangers' templates are rendered in a process of their own, which is ended when it takes too much memory or time.

Counting what a template does ends no template that does it in a way nobody thought of. The process imports jinja and
the sandbox alone, gets no environment, writes no file, and serves the process that started it: one line of JSON a
question, one line an answer. It ends when its pipe is closed, as the end of the other does, however it comes about.
Templates that ship, known by their hash, are rendered at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

from ..base.assets import list_templates, template_path
from ..base.errors import UserError
from ..base.limits import limits
from ..base.whole_files import read_text
from .sandbox import RefusedError, compile_template, run_template, variables_of, words_of

LONGEST_WAIT = 120.0  # seconds; a busy machine gives a process little of a core
LARGEST_ANSWER = 2**28
MOST_SOURCES = 64

WORK: dict[str, Callable[[str, str, Mapping[str, Any]], Any]] = {
    "render": lambda source, label, given: run_template(compile_template(source, label), label, **given),
    "check": lambda source, label, given: compile_template(source, label) and None,
    "variables": lambda source, label, given: sorted(variables_of(source)),
    "words": lambda source, label, given: sorted(words_of(source)),
}
"""What a process is asked for → what it does."""


def ask(work: str, source: str, label: str, **variables: Any) -> Any:
    """Does something with a template: here where it ships with this package, else in a process of its own.

    Args:
        work: A key of `WORK`.
        source: Jinja source.
        label: What to call the template in an error.
        **variables: What it sees when it is rendered; plain values, as JSON has them.

    Raises:
        RefusedError: The template called `raise_exception`.
        UserError: It is wrong, left its sandbox, or took too much memory or time.
    """
    if _hash(source) in _ours():
        return WORK[work](source, label, variables)
    with _LOCK:
        return _child().ask(work, source, label, variables)


@lru_cache(maxsize=64)  # asked for every row
def _hash(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def _ours() -> frozenset[str]:
    return frozenset(_hash(read_text(template_path(name))) for name in list_templates())


class _Child:
    """The process that renders, seen from the one that asks."""

    def __init__(self) -> None:
        self.memory = limits().template_bytes
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({self.memory}, {os.getpid()})"
        )
        zone = {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # nothing half-written is left in a process that is forked meanwhile
                env=zone,
                start_new_session=True,  # Ctrl-C is for the one that asks
            )
        except OSError as error:
            raise UserError(
                f"No process for chat templates can be started ({error.strerror}); free some memory."
            ) from None
        self.sent: set[str] = set()
        self.rest = b""

    def ask(self, work: str, source: str, label: str, variables: Mapping[str, Any]) -> Any:
        """See `ask`. Whatever interrupts it ends the process too, whose answer nobody would read."""
        key = _hash(source)
        seconds = limits().template_seconds
        given = {"seconds": seconds, "source": None if key in self.sent else source, "variables": variables}
        self.sent.add(key)
        try:
            answer = self._answer(json.dumps({"work": work, "key": key, "label": label, **given}).encode() + b"\n")
        except BaseException:
            self.end()
            raise
        if answer is None:
            self.end()
            raise UserError(
                f"{label} takes more than {seconds} seconds or {self.memory >> 20:,} MiB for one conversation "
                f"(`limits.template_seconds`, `limits.template_bytes`); do not use templates like it."
            )
        if "error" in answer:
            raise (RefusedError if answer["refused"] else UserError)(answer["error"])
        return answer["found"]

    def _answer(self, question: bytes) -> dict[str, Any] | None:
        """The answer; None where the process ended, or takes too long or says too much."""
        assert self.process.stdin is not None and self.process.stdout is not None
        left = memoryview(question)
        try:
            while left:
                left = left[self.process.stdin.write(left) :]
        except BrokenPipeError:
            return None
        ready = select.poll()
        ready.register(self.process.stdout, select.POLLIN)
        pieces, size, end = [self.rest], len(self.rest), time.monotonic() + LONGEST_WAIT
        while b"\n" not in pieces[-1]:
            seconds = max(0.0, end - time.monotonic())
            piece = os.read(self.process.stdout.fileno(), 2**20) if ready.poll(1000 * seconds) else b""
            size += len(piece)
            if not piece or size > LARGEST_ANSWER:
                return None
            pieces.append(piece)
        line, _, self.rest = b"".join(pieces).partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Ends the process at once; the next question starts another."""
        global _CHILD
        if _CHILD is self:
            _CHILD = None
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Lets go of the pipes, at whose end the process ends."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):  # what could not be written to one that has ended
                    stream.close()


_CHILD: _Child | None = None
_LOCK = threading.RLock()


def _child() -> _Child:
    global _CHILD
    if (old := _CHILD) is not None:
        other = old.memory != limits().template_bytes or len(old.sent) >= MOST_SOURCES
        if other or old.process.poll() is not None:
            old.end()
    if _CHILD is None:
        _CHILD = _Child()
    return _CHILD


def _forget() -> None:
    """In a process that was forked: the other's child answers the other, and a lock may have been held."""
    global _CHILD, _LOCK
    child, _CHILD, _LOCK = _CHILD, None, threading.RLock()
    if child is not None:
        child.process.returncode = 0  # it is no child of ours, to be waited for
        child.close()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def bounded() -> Iterator[None]:
    """The same bounds for what another library renders inside, in a process that was started for that.

    The system ends this process where it takes too long; what takes too much memory is a MemoryError.
    """
    bounds, used = limits(), resource.getrusage(resource.RUSAGE_SELF)
    taken = int(read_text("/proc/self/statm").split()[0]) * resource.getpagesize()
    most = {
        resource.RLIMIT_AS: taken + bounds.template_bytes,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + 1 + bounds.template_seconds,
    }
    before = {kind: resource.getrlimit(kind) for kind in most}
    try:
        for kind, number in most.items():
            _limit(kind, number)
        yield
    finally:
        for kind, pair in before.items():
            resource.setrlimit(kind, pair)


# -- in the process of its own -----------------------------------------------------------------------------------------


def serve(memory: int, asker: int) -> None:
    """Answers questions, with so many bytes of addresses, until the process that asks closes the pipe or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(asker,), daemon=True).start()
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    sources: dict[str, str] = {}
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    for line in questions:
        question = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + question["seconds"])
        if question["source"] is not None:
            sources[question["key"]] = question["source"]
        answer = _answered(question, sources[question["key"]])
        if answer is None:  # the memory is full: what is left of this process is not to be trusted
            return
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _watch(asker: int) -> None:
    """Ends this process with the one that asks, also in the middle of an answer that nobody waits for any longer."""
    while os.getppid() == asker:
        time.sleep(1)
    os._exit(1)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answered(question: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    try:
        return {"found": WORK[question["work"]](source, question["label"], question["variables"])}
    except MemoryError:
        return None
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            return None
        return {"error": str(error), "refused": isinstance(error, RefusedError)}
    except Exception as error:  # of jinja's own analysis
        return {"error": f"{question['label']} cannot be read ({type(error).__name__}); mend it.", "refused": False}
