"""Watches a long run: the rows of a step whose loss is not finite or jumps, and of a data-loader worker that dies.

The collator is wrapped where the data loader is made, so a user's own stays as it is: each batch carries the ids of its
rows beside its tensors, and they are taken out before the model sees it.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.errors import UserError
from ..base.interrupts import shield_worker
from ..base.names import STRANGE_STEPS
from ..bundle.run_folder import newest
from .checkpointing import ResumableTrainer

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
ROW_IDS = "row_ids"
RECENT, ENOUGH = 50, 20  # steps that a jump is measured against, and how many there must be
LEAST_SPREAD = 0.01  # in nats a token: below it, losses of a model that knows its rows go up and down tenfold


class WatchedCollator:
    """A collator that says which rows it works on.

    Args:
        collator: Makes the batches.
        notes: Folder in which each worker notes the rows that it has in hand; None in a single process.
    """

    def __init__(self, collator: Collator, notes: str | None = None) -> None:
        self.collator = collator
        self.notes = notes
        self._shielded = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch and, under `row_ids`, the ids of its rows.

        Raises:
            UserError: As the collator does.
            RuntimeError: The collator failed otherwise; the message names the row.
        """
        worker = get_worker_info()
        if worker is not None:
            self._note(worker.id, rows)
        try:
            batch = self.collator(rows)
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self._culprit(rows)}: {type(error).__name__}: {error}") from error
        return {**batch, ROW_IDS: [str(row["id"]) for row in rows]}

    def _note(self, worker: int, rows: Sequence[dict[str, Any]]) -> None:
        if not self._shielded:
            shield_worker()
            self._shielded = True
        if self.notes:
            (Path(self.notes) / str(os.getpid())).write_text(describe(rows), encoding="utf-8")

    def _culprit(self, rows: Sequence[dict[str, Any]]) -> str:
        """The row that fails by itself, or all where only the batch does."""
        for row in rows:
            try:
                self.collator([row])
            except Exception:  # whatever it is: the caller raises it with this row's name
                return describe([row])
        return describe(rows)


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """`row a/1 (cat.jpg), row a/2`."""
    words = []
    for row in rows:
        images = [image for image in row.get("images") or () if isinstance(image, dict)]
        paths = [str(image["path"]) for image in images if image.get("path")]
        words.append(f"row {row['id']}" + (f" ({', '.join(paths)})" if paths else ""))
    return ", ".join(words)


class Losses:
    """The losses of the last steps, and whether a new one jumps out of them.

    A step jumps when its loss is above the median of the last 50 by more than `jump` times their spread. The spread is
    1.4826 times the median distance from the median (a standard deviation, were they normal), and at least 0.01 and
    a twentieth of the median, so that losses that hardly move, or are next to nothing, do not raise alarms.
    """

    def __init__(self, jump: float | None) -> None:
        self.jump = jump
        self.recent: deque[float] = deque(maxlen=RECENT)

    def limit(self) -> float:
        """Above what a loss jumps; infinite before there are 20 steps, or without a rule."""
        if self.jump is None or len(self.recent) < ENOUGH:
            return math.inf
        middle = statistics.median(self.recent)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self.recent)
        return middle + self.jump * max(spread, abs(middle) / 20, LEAST_SPREAD)


class WatchedTrainer(ResumableTrainer):
    """A trainer that writes down the rows of steps that went wrong.

    Args:
        nonfinite: What happens when a loss or gradient is not finite: `stop`, or `skip` the step.
        jump: How far a loss may jump, in spreads; None for no limit. See `Losses`.
    """

    data_collator: Collator

    def __init__(
        self, *args: Any, nonfinite: Literal["stop", "skip"] = "stop", jump: float | None = 10.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.nonfinite, self.losses = nonfinite, Losses(jump)
        self._notes: str | None = None
        self._coming: deque[list[str]] = deque()  # ids of the micro-batches that are fetched
        self._step: list[tuple[list[str], float]] = []  # ids and loss of each micro-batch of this step
        self._gradient = 0.0
        if nonfinite == "skip" and self.is_deepspeed_enabled:
            raise UserError("watch.nonfinite=skip does not work under DeepSpeed, which steps by itself; use stop.")
        self.add_callback(_Judge(self))

    # -- rows -------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a data-loader worker that dies ends it with its rows named.

        Raises:
            UserError: A worker died, or a loss is not finite and `nonfinite` is `stop`.
        """
        with tempfile.TemporaryDirectory(prefix="vlm_sft-") as self._notes:
            try:
                try:
                    return super().train(*args, **kwargs)
                except ConnectionError:
                    # What a dead worker sent cannot be read; torch says so when the signal of its death comes.
                    time.sleep(5)
                    raise
            except RuntimeError as error:
                if sentence := dead_worker(str(error), Path(self._notes)):
                    raise UserError(sentence) from error
                raise
            finally:
                self._notes = None

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        own = self.data_collator
        if self.is_in_train:
            self.data_collator = WatchedCollator(own, self._notes)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = own

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetches the next batches and keeps the ids of their rows."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._coming = deque(batch.pop(ROW_IDS, []) for batch in batches)
        return batches, items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        inputs.pop(ROW_IDS, None)  # of an evaluation
        return inputs

    # -- losses -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; its loss is kept together with the ids of its rows."""
        loss = super().training_step(*args, **kwargs)
        self._step.append((self._coming.popleft() if self._coming else [], float(loss)))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: the scaler skips such steps itself
        self._gradient = 0.0 if norm is None or scaled else float(norm)
        return norm

    def judge(self) -> None:
        """Looks at the step that is about to change the weights.

        Raises:
            UserError: Its loss is not finite on some process, and the recipe says stop.
        """
        parts, self._step = self._step, []
        loss = sum(each for _, each in parts)
        wrong = not math.isfinite(loss) or not math.isfinite(self._gradient)
        if self.sum_over_processes([float(wrong)])[0]:
            what = f"loss is {loss:g}" if not math.isfinite(loss) else f"gradient is {self._gradient:g}"
            if wrong:
                self._record("nonfinite", parts, loss)
            elif self.nonfinite == "stop":
                raise UserError("Another process stops because its loss is not finite; see its message.")
            self._stop_or_skip(what, parts, wrong)
            return
        limit = self.losses.limit()
        if loss > limit:
            self._record("jump", parts, loss)
            self._say(f"the loss jumps to {loss:.3g} (above {limit:.3g})", parts)
        self.losses.recent.append(loss)

    def _stop_or_skip(self, what: str, parts: list[tuple[list[str], float]], wrong: bool) -> None:
        file = Path(self.args.output_dir) / STRANGE_STEPS
        if self.nonfinite == "stop":
            raise UserError(
                f"Step {self.state.global_step + 1:,}: the {what}; its rows are {_names(parts)} (all are in {file}); "
                f"look at them with `vlm-sft debug-batch {self.args.output_dir}`, then remove them, lower the learning "
                f"rate, or set watch.nonfinite=skip, and go on with --resume."
            )
        self.optimizer.zero_grad()  # without gradients the optimizer leaves weights and moments as they are
        if wrong:
            self._say(f"the {what}: the step is skipped", parts)

    def _say(self, what: str, parts: list[tuple[list[str], float]]) -> None:
        print(f"step {self.state.global_step + 1:,}: {what}; rows {_names(parts, most=3)}", file=sys.stderr)

    def _record(self, why: str, parts: list[tuple[list[str], float]], loss: float) -> None:
        """Appends a line to `watch.jsonl`."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = newest(folder)
        record = {
            "step": self.state.global_step + 1, "why": why, "loss": loss, "gradient": self._gradient,
            "process": self.args.process_index, "rows": [ids for ids, _ in parts],
            "losses": [each for _, each in parts],
            "checkpoint": checkpoint.name if checkpoint else None,
        }  # fmt: skip
        with open(folder / STRANGE_STEPS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def counters(self) -> dict[str, Any]:
        """Also the losses that a jump is measured against."""
        return {**super().counters(), "recent": list(self.losses.recent)}

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Puts back what `counters` gave."""
        super().set_counters(saved)
        self.losses.recent.extend(saved["recent"])


class _Judge(TrainerCallback):
    def __init__(self, trainer: WatchedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.judge()


def _names(parts: list[tuple[list[str], float]], most: int = 8) -> str:
    """Ids, of the micro-batches that are not finite alone where there are some."""
    wrong = [ids for ids, loss in parts if not math.isfinite(loss)] or [ids for ids, _ in parts]
    names = [name for ids in wrong for name in ids]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def dead_worker(message: str, notes: Path) -> str | None:
    """torch's error about a data-loader worker that is gone → one sentence with the rows that it had; else None."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed|exited unexpectedly)", message)
    if found is None:
        return None
    files = [notes / pid.strip() for pid in found[1].split(",")]
    rows = ", ".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    where = f"in a batch of {rows}" if rows else "before its first batch"
    return (
        f"A data-loader worker died {where}; if memory ran out, "
        f"use fewer workers (sft.dataloader_num_workers), smaller images or a smaller batch, and go on with --resume."
    )
