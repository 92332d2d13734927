"""Strangers' templates are rendered in a process of their own, which is ended when it takes too much memory or time.

Counting what a template does ends no template that does it in a way nobody thought of. The process imports jinja and
the sandbox alone, gets no environment, writes no file, and serves the process that started it: one line of JSON with
questions, one line with their answers. It ends when its pipe is closed, as the end of the other does, however it comes
about. Templates that ship, known by their hash, are rendered at once.

To be answered takes a message longer than to render a conversation, so many conversations are asked in one
(`asked_ahead`). The bounds are those of each: where a message is not answered, its questions are asked one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ..base.assets import list_templates, template_path
from ..base.errors import UserError
from ..base.limits import READERS, limits
from ..base.names import Json
from ..base.whole_files import read_text
from .sandbox import RefusedError
from .serve import WORK, as_json

LONGEST_WAIT = 120.0  # seconds; a busy machine gives a process little of a core
LOOK = 0.2  # seconds after which a process that has not answered is looked at
MOST_SOURCES = 64
SERVING = "vlm_sft.templates.serve"
TOGETHER, TOGETHER_CHARACTERS = 128, 2**20  # questions that go into one message, and their characters


class _Question(NamedTuple):
    """What is asked of a template; `given` is what it sees, as JSON."""

    work: str
    source: str
    label: str
    given: str = "{}"


class _Later(BaseException):  # no `except Exception` on its way must take it
    """Carries what would have been asked to `asked_ahead`; None where nobody needs to be asked."""

    def __init__(self, question: _Question | None) -> None:
        self.question = question


_COLLECTS: ContextVar[bool] = ContextVar("collects", default=False)
_ANSWERS: dict[_Question, Json] = {}


def ask(work: str, source: str, label: str, /, **variables: Any) -> Any:
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
    ours = _hash(source) in _ours()
    if work == "render" and _COLLECTS.get():
        raise _Later(None if ours else _Question(work, source, label, as_json(variables)))
    if ours:
        return WORK[work](source, label, variables)
    if not variables:
        return _known(_Question(work, source, label))
    return _found(_Question(work, source, label, as_json(variables)))


@contextmanager
def asked_ahead(attempts: Iterable[Callable[[], object]]) -> Iterator[None]:
    """Within, templates have rendered already what these attempts come to ask: all of it in few messages.

    Args:
        attempts: Each renders one conversation, and is left as soon as it asks for that. What else it raises is not
            looked at: it is raised again where the conversation is rendered.
    """
    questions: dict[_Question, None] = {}
    collects = _COLLECTS.set(True)
    try:
        for attempt in attempts:
            try:
                with suppress(Exception):
                    attempt()
            except _Later as later:
                if later.question is None:
                    break
                questions[later.question] = None
    finally:
        _COLLECTS.reset(collects)
    try:
        with _LOCK:
            for together in _messages(list(questions)):
                if (answers := _child().ask(together)) is None:
                    break  # one takes too much: each is asked by itself, and that one is named
                _ANSWERS.update(zip(together, answers, strict=True))
        yield
    finally:
        _ANSWERS.clear()


@contextmanager
def asked_now() -> Iterator[None]:
    """Within, a conversation is rendered at once, also on the way to another that is asked ahead."""
    collects = _COLLECTS.set(False)
    try:
        yield
    finally:
        _COLLECTS.reset(collects)


def _messages(questions: Sequence[_Question]) -> Iterator[list[_Question]]:
    """Questions about the same template that follow each other, as many together as a message has."""
    together: list[_Question] = []
    for question in questions:
        size = sum(len(each.given) for each in together) + len(question.given)
        full = len(together) == TOGETHER or size > TOGETHER_CHARACTERS
        if together and (full or question[:3] != together[0][:3]):
            yield together
            together = []
        together.append(question)
    if together:
        yield together


def _found(question: _Question) -> Any:
    with _LOCK:
        answer = _ANSWERS.get(question)
        if answer is None:
            child = _child()
            answers = child.ask([question])
            if answers is None:
                seconds = limits().template_seconds
                raise UserError(
                    f"{question.label} takes more than {seconds} seconds or {child.memory >> 20:,} MiB for one "
                    f"conversation (`limits.template_seconds`, `limits.template_bytes`); do not use templates like it."
                )
            answer = answers[0]
    if "error" in answer:
        raise (RefusedError if answer["refused"] else UserError)(answer["error"])
    return answer["found"]


_known = lru_cache(maxsize=256)(_found)  # what is asked of a template itself is asked again for every row


@lru_cache(maxsize=64)  # this is asked for every row
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
            f"import sys; sys.path[:] = {sys.path!r}; from {SERVING} import serve; serve({self.memory}, {os.getpid()})"
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

    def ask(self, questions: Sequence[_Question]) -> list[Json] | None:
        """The answers to questions about one template; None where they take more than they may, and it has ended.

        Whatever interrupts it ends the process too, whose answer nobody would read.
        """
        work, source, label, _ = questions[0]
        head = {"work": work, "key": (key := _hash(source)), "label": label, "seconds": limits().template_seconds}
        head["source"] = None if key in self.sent else source
        self.sent.add(key)
        given = ",".join(question.given for question in questions)
        line = f'{as_json(head)[:-1]}, "given": [{given}]}}\n'
        try:
            answers = self._answers(line.encode("utf-8", "surrogatepass"))
        except BaseException:
            self.end()
            raise
        if answers is None:
            self.end()
        return answers

    def _answers(self, line: bytes) -> list[Json] | None:
        """See `ask`; also None where the process says too much."""
        assert self.process.stdin is not None and self.process.stdout is not None
        left = memoryview(line)
        try:
            while left:
                left = left[self.process.stdin.write(left) :]
        except BrokenPipeError:
            return None
        ready = select.poll()
        ready.register(self.process.stdout, select.POLLIN)
        pieces, size, end = [b""], 0, time.monotonic() + LONGEST_WAIT
        while not pieces[-1].endswith(b"\n"):  # there is one line, for it was asked once
            if not ready.poll(1000 * LOOK):
                if time.monotonic() > end or self._is_too_large():
                    return None
                continue
            piece = os.read(self.process.stdout.fileno(), 2**20)
            size += len(piece)
            if not piece or size > READERS.template_answer:
                return None
            pieces.append(piece)
        found: list[Json] = json.loads(b"".join(pieces))
        return found

    def _is_too_large(self) -> bool:
        """Some systems (macOS) limit no process's addresses, so while it is waited for it is looked at."""
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss) > self.memory
        except psutil.Error:  # the process has ended
            return False

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
                with suppress(OSError):  # the rest cannot be written to a process that has ended
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
