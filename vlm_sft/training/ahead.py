"""Batches made while the model computes, by a thread, where no data-loader worker makes them.

Decoding, resizing and tokenizing leave Python's lock, so most of a batch is made beside the model. The thread draws no
random number that the model draws too: it is used for collators of this package alone, which draw none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from accelerate.data_loader import DataLoaderShard

from ..base.names import Inputs
from ..batch.collator import MultimodalCollator

SECONDS_TO_END = 5.0  # for the batch that is being made when nobody wants it any more


class Ahead(Iterator[Inputs]):
    """An iterator over batches of which a thread makes the next ones; an error comes in its batch's turn.

    Args:
        batches: The batches; from now on the thread's alone.
        room: How many are made before they are asked for.
        device: Where they go; it becomes the thread's own too.
    """

    def __init__(self, batches: Iterator[Inputs], room: int, device: torch.device) -> None:
        self.batches, self._device = batches, device
        self._made: SimpleQueue[Inputs | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(room)
        self._left = False
        self._thread = threading.Thread(target=self._make, name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Inputs:
        found = self._made.get()
        if isinstance(found, BaseException):
            self._made.put(found)  # whoever asks once more is told the same
            raise found
        self._room.release()
        return found

    def _make(self) -> None:
        try:
            if self._device.type != "cpu" and self._device.index is not None:  # DDP calls a CPU cpu:0
                torch.accelerator.set_device_index(self._device.index)
            while self._room.acquire() and not self._left:
                self._made.put(next(self.batches))
        except BaseException as error:  # the end too
            self._made.put(error)

    def close(self) -> None:
        """Ends the thread after the batch that it is making; what it made is dropped."""
        self._left = True
        self._room.release()
        self._thread.join(SECONDS_TO_END)


def can_be_made_ahead(loader: object, collator: object) -> bool:
    """Whether a thread may make the batches of a loader: no worker does, no other process is asked, nothing is drawn.

    Args:
        loader: What accelerate made of a data loader; one that sends batches from process to process is none.
        collator: Makes its batches.
    """
    return isinstance(loader, DataLoaderShard) and not loader.num_workers and draws_nothing(collator)


def draws_nothing(collator: object) -> bool:
    """Whether a collator is of this package, and its image processor of transformers or this package.

    One of a user's own may draw at random, and what a model draws then must not depend on when it does.
    """
    if not isinstance(collator, MultimodalCollator):
        return False
    known = (__name__.partition(".")[0], "transformers")
    things = [collator, *filter(None, [collator.processor.image_processor])]
    return all(type(each).__module__.partition(".")[0] in known and not _changed(each) for each in things)


def _changed(thing: object) -> bool:
    """Whether a method of an object is not its class's."""
    return any(callable(value) and callable(getattr(type(thing), name, None)) for name, value in vars(thing).items())
