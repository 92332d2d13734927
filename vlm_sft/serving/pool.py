"""Answers many questions at a time: one thread asks the model, in batches that others may join while they are written.

transformers' own continuous batching takes tokens alone, no pictures, so a batch here is one call of `generate`, padded
on the left, in which each answer has its own end, draw and bounds. Who comes meanwhile waits for at most `SLICE` steps:
then the batch stops, and goes on with the newcomers from what is written so far, which is read again as a prompt. That
costs a prompt and its pictures; where a prompt is not the same as what was written (a penalty on repetition, tokens
that see what follows them) the batch is written to its end first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..base.errors import UserError
from ..inference.generation import first_token, left_padded, new_tokens, pictures_of, position_limit
from ..inference.picture_fault import pictures_named
from ..inference.settings import generation_options
from .bundles import Served
from .meters import Meters
from .refusal import Refusal, busy, closing
from .writing import Choice, Step, Writing

SLICE = 32  # steps after which a batch lets those in that wait
WINDOW = 0.004  # seconds for which an idle model waits for a second question


class Pool:
    """The questions that wait and the thread that answers them.

    Args:
        batch_size: Answers written at a time.
        queue: Questions that may wait beside them.
        meters: Counts what is done.
    """

    def __init__(self, batch_size: int, queue: int, meters: Meters) -> None:
        self.batch_size, self.queue, self.meters = batch_size, queue, meters
        self._waiting: deque[tuple[Served, Writing]] = deque()
        self._written: list[Writing] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="answers")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether somebody answers."""
        return self._thread.is_alive() and not self._closed

    def counts(self) -> tuple[int, int]:
        """Answers that are written, and questions that wait."""
        with self._changed:
            return len(self._written), len(self._waiting)

    def ask(self, served: Served, writing: Writing) -> None:
        """Puts a question in the queue.

        Raises:
            Refusal: The queue is full, or the server ends.
        """
        with self._changed:
            if self._closed:
                raise closing()
            if len(self._waiting) >= self.queue + self.batch_size - len(self._written):
                raise busy(f"{len(self._waiting):,} questions wait already: ask again in some seconds.", 2)
            self._waiting.append((served, writing))
            self._changed.notify()

    def leave(self, writing: Writing) -> None:
        """Nobody waits for an answer any more: its place is free from the next step on."""
        with self._changed:
            writing.gone = True
            self._waiting = deque(pair for pair in self._waiting if pair[1] is not writing)

    def close(self) -> None:
        """Answers nothing any more; who waits is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Waits for the end of what is being written when the pool was closed."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            served, writings = batch
            try:
                self._write(served, writings)
            except BaseException as error:  # whatever was raised, the next question is answered
                for writing in writings:
                    writing.end("error", error if isinstance(error, Exception) else RuntimeError(str(error)))
            with self._changed:
                self._written = []
                others = [pair for pair in self._waiting if pair[0] is not served]  # each bundle in its turn
                alike = [pair for pair in self._waiting if pair[0] is served]
                self._waiting = deque([*others, *((served, each) for each in _going_on(writings)), *alike])
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        for _, writing in waiting:
            writing.end("error", closing())

    def _next(self) -> tuple[Served, list[Writing]] | None:
        """The bundle that has waited longest, and those who ask it; None at the end."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._closed and len(self._waiting) < self.batch_size and not self._waiting[0][1].ids:
                    end = time.monotonic() + WINDOW
                    while not self._closed and (left := end - time.monotonic()) > 0:
                        self._changed.wait(left)
                if self._closed:
                    return None
                if self._waiting:  # if nobody waits any more, they have left
                    break
            served = self._waiting[0][0]
            chosen = [pair for pair in self._waiting if pair[0] is served][: self.batch_size]
            self._written = [writing for _, writing in chosen]
            self._waiting = deque(pair for pair in self._waiting if pair[1] not in self._written)
            return served, self._written

    def _write(self, served: Served, writings: Sequence[Writing]) -> None:
        """Writes answers on until all have ended or others wait; one that fails does not take the others with it."""
        self.meters.batch(len(writings))
        try:
            self._step(served, writings)
            return
        except Exception as error:
            left = _going_on(writings)
            if len(left) == 1:
                left[0].end("error", _said(error))
                return
        # Not in the handler: what was raised holds the tensors of the batch, for which there may be no memory.
        for each in left:
            if fault := _fault_alone(served, each):
                each.end("error", fault)
        going_on = _going_on(left)
        middle = len(going_on) // 2 if len(going_on) == len(left) else 0
        for part in filter(None, (going_on[:middle], going_on[middle:])):
            self._write(served, part)

    def _step(self, served: Served, asked: Sequence[Writing]) -> None:
        served.activate()
        model, processor = served.model, served.processor
        for each in asked:
            try:
                each.pictures = each.pictures or pictures_of(processor, each.row, each.chat)
            except UserError as error:
                each.end("error", error)
        if not (writings := _going_on(asked)):
            return
        shown = [each.pictures for each in writings if each.pictures is not None]
        batch = left_padded(processor, [each.so_far() for each in writings], shown, model.device)
        limit = position_limit(model)
        steps = max(each.left for each in writings)
        if limit is not None:  # a short prompt beside a long one must not run out of positions behind its end
            steps = min([steps, *(limit - each.length for each in writings)])
        goes_on = served.goes_on and "token_type_ids" not in batch
        if not goes_on and len(writings) > 1 and steps < max(each.left for each in writings):
            for each in writings:  # alone each has room enough
                self._write(served, [each])
            return
        settings = generation_options(model, processor, {**served.settings, "max_new_tokens": steps})
        settings = {name: value for name, value in settings.items() if name not in ("stop_strings", "tokenizer")}
        choice = Choice(writings)
        pause = partial(self._others_wait, served, writings) if goes_on else self._is_closed
        step = Step(writings, choice, pause)
        more = {"logits_processor": LogitsProcessorList([choice]), "stopping_criteria": StoppingCriteriaList([step])}
        # One that fails among others is asked again alone, and then it is known whether a picture is at fault.
        alone = [each.row for each in writings] if len(writings) == 1 else []
        named = pictures_named(alone, partial(first_token, model, processor)) if alone else nullcontext()
        with torch.inference_mode(), named:
            new_tokens(model, batch, settings, **more)

    def _others_wait(self, served: Served, writings: Sequence[Writing], steps: int) -> bool:
        if self._closed:
            return True
        if steps < SLICE or not self._waiting:
            return False
        with self._changed:
            free = self.batch_size - len(_going_on(writings))
            return any(other is not served or free > 0 for other, _ in self._waiting)

    def _is_closed(self, steps: int) -> bool:
        return self._closed


def _going_on(writings: Sequence[Writing]) -> list[Writing]:
    return [each for each in writings if not (each.ended or each.gone)]


def _fault_alone(served: Served, writing: Writing) -> Exception | None:
    """What the processor says of one answer's pictures by themselves, where it refuses them."""
    assert writing.pictures is not None
    try:
        left_padded(served.processor, [writing.so_far()], [writing.pictures])
    except Exception as error:
        return error
    return None


def _said(error: Exception) -> Exception:
    """A fault in the words of who asks; what is none of theirs stays as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return Refusal("The GPU's memory does not hold this question: give fewer or smaller images.", 400)
    return error
