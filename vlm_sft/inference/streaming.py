"""One answer as it is written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..base.names import Options
from ..batch.processor import VLMProcessor
from ..rows.messages import Message
from .generation import (
    answer,
    beams_of,
    before_end,
    check_length,
    decode,
    first_token,
    fit,
    new_tokens,
    prompt_batch,
    with_boxes_written,
)
from .picture_fault import pictures_named
from .settings import ends_of, generation_options


def stream_answer(
    model: PreTrainedModel,
    processor: VLMProcessor,
    messages: Sequence[Message],
    images: Sequence[object],
    **options: Any,
) -> Iterator[str]:
    """Yields an answer piece by piece as the model writes it; the pieces joined are what `answer` returns.

    Closing the iterator stops the model after the token it is at. With several beams, which only the end decides
    between, the answer comes in one piece.

    Args and Raises: see `answer`.
    """
    if processor.chooses:
        yield from answer(model, processor, [{"messages": list(messages), "images": list(images)}], **options)
        return
    row = with_boxes_written(processor, {"messages": list(messages), "images": list(images)})
    settings = generation_options(model, processor, options)
    if beams_of(model, settings) > 1:
        yield from (text for text in answer(model, processor, [row], **options) if text)
        return
    batch = prompt_batch(processor, [row], model.device)
    check_length(model, batch["input_ids"].shape[1])
    fit(model, batch, settings)
    writer = _Writer(model, processor, batch, settings)
    with closing(writer), pictures_named([row], partial(first_token, model, processor), options):
        yield from hold_back(writer.pieces(), ends_of(processor)[1])


class _Writer(BaseStreamer, StoppingCriteria):
    """Generates in a thread of its own; the text comes out of a queue as soon as it can no longer change."""

    def __init__(
        self, model: PreTrainedModel, processor: VLMProcessor, batch: dict[str, torch.Tensor], settings: Options
    ) -> None:
        self._processor = processor
        self._ends, _ = ends_of(processor)
        self._ids: list[int] = []
        self._shown = 0
        self._started = False
        # A piece of text, an exception, or None at the end.
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(model, batch, settings), daemon=True)
        self._thread.start()

    def _run(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: Options) -> None:
        last: BaseException | None = None
        stop = StoppingCriteriaList([self, *(settings.pop("stopping_criteria", None) or [])])
        try:
            with torch.inference_mode():
                new_tokens(model, batch, settings, streamer=self, stopping_criteria=stop)
        except BaseException as error:
            last = error
        self._queue.put(last)

    def put(self, value: torch.Tensor) -> None:
        """Takes new ids (called by `generate`; the first time with the prompt, which is no answer)."""
        if not self._started:
            self._started = True
            return
        self._ids += value.flatten().tolist()
        # The character at the end may be a half one.
        self._show(self._text().rstrip("\ufffd"))

    def end(self) -> None:
        """Gives out the rest (called by `generate`)."""
        self._show(self._text())

    def _text(self) -> str:
        return decode(self._processor, before_end(self._ends, self._ids))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._queue.put(text[self._shown :])
            self._shown = len(text)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, a row (called by `generate` after each token)."""
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def pieces(self) -> Iterator[str]:
        """Text as it comes; raises here what was raised in the thread."""
        while (piece := self._queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def close(self) -> None:
        """Stops the model and waits for it."""
        self._stop.set()
        self._thread.join()


def hold_back(pieces: Iterable[str], mark: str) -> Iterator[str]:
    """Passes pieces on, but never the mark, what may be its beginning, or anything after it.

    Surrounding white space is dropped, so the pieces joined are `cut_at` of the whole text.
    """
    held = HeldBack([mark])
    for piece in pieces:
        if ready := held.take(piece):
            yield ready
        if held.ended:
            return
    if rest := held.rest():
        yield rest


class HeldBack:
    """What of a text may be shown while it is written: nothing from the first of some marks on.

    Args:
        marks: Texts that end it; empty ones end nothing.

    Attributes:
        ended: Whether a mark was there.
    """

    def __init__(self, marks: Iterable[str]) -> None:
        self._marks = [mark for mark in marks if mark]
        self._pending, self._started = "", False
        self.ended = False

    def take(self, piece: str) -> str:
        """What may be shown now that the text went on by a piece."""
        self._pending += piece
        if found := [place for mark in self._marks if (place := self._pending.find(mark)) >= 0]:
            self._pending, self.ended = self._pending[: min(found)], True
            return self.rest()
        begun = (mark[:n] for mark in self._marks for n in range(1, len(mark)))
        keep = max((len(start) for start in begun if self._pending.endswith(start)), default=0)
        ready = self._pending[: len(self._pending) - keep].rstrip()
        self._pending = self._pending[len(ready) :]
        ready = ready if self._started else ready.lstrip()
        self._started = self._started or bool(ready)
        return ready

    def rest(self) -> str:
        """What is left to show at the end of the text."""
        rest = self._pending.rstrip() if self._started else self._pending.strip()
        self._pending, self._started = "", True
        return rest
