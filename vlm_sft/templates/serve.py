"""What runs in the process that renders strangers' templates (`process`), and the bounds that it has.

It imports jinja and the sandbox alone, reads one line of JSON with questions, and writes one with their answers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..base.errors import UserError
from ..base.limits import limits
from ..base.names import Json, Values
from .sandbox import (
    RefusedError,
    check_prompt,
    compile_template,
    fill_prompt,
    run_template,
    variables_of,
    words_of,
)

WORK: dict[str, Callable[[str, str, Values], Any]] = {
    "render": lambda source, label, given: run_template(compile_template(source, label), label, **given),
    "prompt": fill_prompt,
    "check_prompt": lambda source, label, given: check_prompt(source, label),
    "check": lambda source, label, given: compile_template(source, label) and None,
    "variables": lambda source, label, given: sorted(variables_of(source)),
    "words": lambda source, label, given: sorted(words_of(source)),
}
"""What a process is asked for → what it does."""


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
        asked = json.loads(line)
        if asked["source"] is not None:
            sources[asked["key"]] = asked["source"]
        found = []
        for given in asked["given"]:
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + asked["seconds"])
            answer = _answered(asked["work"], sources[asked["key"]], asked["label"], given)
            if answer is None:  # the memory is full: what is left of this process is not to be trusted
                return
            found.append(answer)
        answers.write(as_json(found).encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


def _watch(asker: int) -> None:
    """Ends this process with the one that asks, also in the middle of an answer that nobody waits for any longer."""
    while os.getppid() == asker:
        time.sleep(1)
    os._exit(1)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    with suppress(ValueError, OSError):  # not every system has every limit; see `_is_too_large`
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answered(work: str, source: str, label: str, given: Values) -> Json | None:
    try:
        return {"found": WORK[work](source, label, given)}
    except MemoryError:
        return None
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            return None
        return {"error": str(error), "refused": isinstance(error, RefusedError)}
    except Exception as error:  # jinja's own analysis raises these
        return {"error": f"{label} cannot be read ({type(error).__name__}); mend it.", "refused": False}


def as_json(values: object) -> str:
    """JSON that keeps every character, also halves of pairs, as it is."""
    return json.dumps(values, ensure_ascii=False)


@contextmanager
def bounded() -> Iterator[None]:
    """The same bounds for what another library renders inside, in a process that was started for that.

    The system ends this process where it takes too long; what takes too much memory is a MemoryError.
    """
    import psutil

    bounds, used = limits(), resource.getrusage(resource.RUSAGE_SELF)
    most = {
        resource.RLIMIT_AS: psutil.Process().memory_info().vms + bounds.template_bytes,
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
