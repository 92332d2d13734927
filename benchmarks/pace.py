"""Lets a trainer of transformers train an epoch whenever it is told to, and says what the epoch took.

It needs torch and transformers alone, so that it runs in the environment of any toolkit. A line that comes in on the
first of two pipes (their numbers in `PACE_PIPES`) starts an epoch, "stop" or an end of the pipe ends the process; the
second pipe takes a line of JSON for each epoch. Times are those of the processor.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback


class Meter:
    """What is added up in an epoch."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        came, goes = os.environ["PACE_PIPES"].split(",")
        self._orders, self._answers = os.fdopen(int(came)), os.fdopen(int(goes), "w")
        self._began = 0.0

    def wait(self) -> None:
        """Waits for the word, and begins."""
        if self._orders.readline().strip() != "go":
            os._exit(0)
        self.sums.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        self._began = time.process_time()

    def report(self) -> None:
        """Says what the epoch took."""
        seconds = time.process_time() - self._began
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1024
        json.dump({**self.sums, "seconds": seconds, "peak_mb": peak}, self._answers)
        self._answers.write("\n")
        self._answers.flush()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the seconds of what is done inside."""
        began = time.process_time()
        try:
            yield
        finally:
            self.sums[name] += time.process_time() - began

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its seconds added up."""

        @functools.wraps(work)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return work(*args, **kwargs)

        return inside

    def add_batch(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Counts a batch and its loss, which is a mean over its supervised tokens."""
        learned = int((inputs["labels"][:, 1:] != -100).sum())
        found = {"supervised": learned, "places": inputs["input_ids"].numel(), "loss": float(loss) * learned}
        pixels = inputs.get("pixel_values")
        self.sums.update({**found, "steps": 1, "pictures": 0 if pixels is None else len(pixels)})

    def watch(self, model: nn.Module) -> None:
        """Adds up the seconds of a model's forward pass, and of its vision tower's."""
        towers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "vision_tower"]
        for name, module in (("forward", model), *(("tower", tower) for tower in towers[:1])):
            starts: list[float] = []
            module.register_forward_pre_hook(lambda *args, starts=starts: starts.append(time.process_time()))
            module.register_forward_hook(
                lambda *args, name=name, starts=starts: self.sums.update({name: time.process_time() - starts.pop()})
            )

    def watch_images(self) -> None:
        """Adds up the seconds of decoding pictures and of what image processors do."""
        from PIL import ImageFile
        from transformers.image_processing_base import ImageProcessingMixin

        ImageFile.ImageFile.load = self.timed("decode", ImageFile.ImageFile.load)  # type: ignore[method-assign]
        for kind in _subclasses(ImageProcessingMixin):
            if "preprocess" in vars(kind):
                kind.preprocess = self.timed("preprocess", kind.preprocess)  # type: ignore[attr-defined]


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


class Pace(TrainerCallback):
    """Trains an epoch at a time."""

    def __init__(self) -> None:
        self.meter = meter = Meter()
        step = Trainer.training_step

        def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept = dict(inputs)  # what computes the loss takes the labels out
            loss = step(trainer, model, inputs, *args, **kwargs)
            meter.add_batch(kept, loss)
            return loss

        Trainer.training_step = training_step  # type: ignore[method-assign]
        Trainer.get_batch_samples = meter.timed("batches", Trainer.get_batch_samples)  # type: ignore[method-assign]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at what is trained."""
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer

        self.meter.watch(model)
        self.meter.watch_images()
        Accelerator.backward = self.meter.timed("backward", Accelerator.backward)  # type: ignore[method-assign]
        AcceleratedOptimizer.step = self.meter.timed(  # type: ignore[method-assign]
            "optimizer", AcceleratedOptimizer.step
        )

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Waits until it may go on."""
        self.meter.wait()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Says what it took."""
        self.meter.report()
