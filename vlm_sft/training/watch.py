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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from ..base.console import tell
from ..base.errors import UserError
from ..base.interrupts import SIGNALS, shield_worker
from ..base.names import STRANGE_STEPS, Inputs, Row
from ..base.whole_files import read_text
from ..base.words import reason_of
from ..batch.by_length import numbered
from ..batch.counts import counts_of
from ..bundle.run_folder import newest
from ..model.towers import fails_on_pictures

if TYPE_CHECKING:
    from .part_trainer import PartTrainer

Collator = Callable[[Sequence[Row]], Inputs]
Counts = Callable[[Inputs], Inputs]
ROW_IDS = "row_ids"
RECENT, ENOUGH = 50, 20  # steps that a jump is measured against, and how many there must be
LEAST_SPREAD = 0.01  # in nats a token: below it, losses of a model that knows its rows go up and down tenfold


class WatchedCollator:
    """A collator that says which rows it works on.

    Args:
        collator: Makes the batches.
        notes: Folder in which each worker notes the rows that it has in hand; None in a single process.
        counts: What the host can say of a batch: `counts_of`. What the collator brings itself stays.
    """

    def __init__(self, collator: Collator, notes: str | None = None, counts: Counts | None = None) -> None:
        self.collator, self.notes, self.counts = collator, notes, counts
        self._shielded = False

    def __call__(self, rows: Sequence[Row]) -> Inputs:
        """The collator's batch, what the host can count of it and, under `row_ids`, the ids of its rows.

        Raises:
            UserError: As the collator does.
            RuntimeError: The collator failed otherwise; the message names the row.
        """
        if get_worker_info() is not None:
            if not self._shielded:
                shield_worker()
                self._shielded = True
            if self.notes:
                (Path(self.notes) / str(os.getpid())).write_text(describe(rows), encoding="utf-8")
        try:
            batch = self.collator(rows)
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self._culprit(rows)}: {type(error).__name__}: {error}") from error
        known = self.counts(batch) if self.counts else {}
        return {**known, **batch, ROW_IDS: [str(row["id"]) for _, row in numbered(rows)]}

    def _culprit(self, rows: Sequence[Row]) -> str:
        """The row that fails by itself, or all where only the batch does."""
        for _, row in numbered(rows):
            try:
                self.collator([row])
            except Exception:  # the caller raises it, whatever it is, with this row's name
                return describe([row])
        return describe(rows)


def describe(rows: Sequence[Row]) -> str:
    """`row a/1 (cat.jpg), row a/2`."""
    words = []
    for _, row in numbered(rows):
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


class Watch(TrainerCallback):
    """Judges each step before it changes the weights, and writes down the rows of one that went wrong.

    Args:
        trainer: What is watched.
        nonfinite: What happens when a loss or gradient is not finite: `stop`, or `skip` the step.
        jump: How far a loss may jump, in spreads; None for no limit. See `Losses`.

    Attributes:
        coming: Ids of the rows of each micro-batch that was fetched and not yet trained on.
        gradient: Norm of the gradients of this step, before they were clipped.
        asked: A signal came before the end of a step, to whichever process; all know it alike.
        filters: Losses that are not finite are left out of the log, as `sft.logging_nan_inf_filter` says.
    """

    def __init__(self, trainer: PartTrainer, nonfinite: Literal["stop", "skip"], jump: float | None) -> None:
        if nonfinite == "skip" and trainer.is_deepspeed_enabled:
            raise UserError("watch.nonfinite=skip does not work under DeepSpeed, which steps by itself; use stop.")
        self.trainer = trainer
        self.nonfinite, self.losses = nonfinite, Losses(jump)
        self.coming: deque[list[str]] = deque()
        self.gradient: torch.Tensor | float | None = None
        self.asked = False
        self._step: list[tuple[list[str], torch.Tensor]] = []  # ids and loss of each micro-batch of this step
        self._logged_loss: torch.Tensor | None = None  # the trainer's sum for its log, as it was before this step
        self.filters = trainer.args.logging_nan_inf_filter
        trainer.args.logging_nan_inf_filter = False  # see `_log_without`

    def collator(self, own: Collator, notes: str | None, image_token_id: int | None) -> WatchedCollator:
        """A collator whose batches say which rows they hold, and what the host can count of them."""
        # Several GPUs of one process share a batch row by row, and positions are no rows.
        if self.trainer.args.n_gpu > 1:
            return WatchedCollator(own, notes)
        return WatchedCollator(own, notes, partial(counts_of, image_token_id=image_token_id))

    def add(self, loss: torch.Tensor) -> None:
        """Keeps the loss of a micro-batch together with the ids of its rows."""
        self._step.append((self.coming.popleft() if self.coming else [], loss.detach()))

    @contextmanager
    def naming(self, inputs: Inputs) -> Iterator[None]:
        """Names the rows of a batch that the model fails on.

        Raises:
            UserError: The image path fails on their pictures, and not on a blank one.
        """
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            ids = self.coming[0] if self.coming else []
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            # Alone: parts of the model may lie on other processes, which do not come here.
            alone = self.trainer.accelerator.num_processes == 1
            if ids and alone and fails_on_pictures(model, inputs, error):
                has = (inputs["input_ids"] == getattr(model.config, "image_token_id", -1)).any(1).tolist()
                seen = [row for row, tokens in zip(ids, has, strict=False) if tokens] if len(has) == len(ids) else []
                raise UserError(
                    f"Step {self.trainer.state.global_step + 1:,}: the model fails on a picture of the rows "
                    f"{_names([(seen or ids, 0.0)])} ({reason_of(error)[:200]}): give it another "
                    "shape, or remove the row, and go on with --resume."
                ) from error
            if ids:
                error.add_note(f"in a batch of the rows {', '.join(ids)}")
            raise

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Looks that packed rows are kept apart."""
        self.trainer.check_packing()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forgets the step before."""
        self._step, self._logged_loss = [], self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Looks at the step that is about to change the weights.

        Raises:
            UserError: Its loss is not finite on some process, and the recipe says stop.
        """
        losses, gradient, anywhere = self._read()
        self.trainer.meters.add_step()
        parts = [(ids, loss) for (ids, _), loss in zip(self._step, losses, strict=True)]
        loss = sum(losses)
        wrong = not math.isfinite(loss) or not math.isfinite(gradient)
        if anywhere:
            what = f"loss is {loss:g}" if not math.isfinite(loss) else f"gradient is {gradient:g}"
            if wrong:
                self._record("nonfinite", parts, gradient)
            elif self.nonfinite == "stop":
                raise UserError("Another process stops because its loss is not finite; see its message.")
            self._stop_or_skip(what, parts, wrong)
            return
        limit = self.losses.limit()
        if loss > limit:
            self._record("jump", parts, gradient)
            self._say(f"the loss jumps to {loss:.3g} (above {limit:.3g})", parts)
        self.losses.recent.append(loss)

    def _read(self) -> tuple[list[float], float, bool]:
        """The losses of this step, the norm of its gradients, and whether any process has one that is not finite.

        This is the one place in a step where the host waits for the device. It cannot be later: the promise is that
        weights never change by such a step, and only some optimizers can be told on the device to leave them alone. So
        all that is to be known comes with it, also whether a signal came to any process, in one sum over them.
        """
        device = self.trainer.args.device
        gradient = self.gradient if isinstance(self.gradient, torch.Tensor) else None
        if gradient is None:
            gradient = torch.full((), float(self.gradient or 0.0), device=device)
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        own = [loss for _, loss in self._step] + [gradient]
        values = torch.stack([value.to(device, torch.float32).reshape(()) for value in own])
        raised = torch.zeros(1 + len(SIGNALS), device=device)
        raised[0] = ~values.isfinite().all()
        interrupts = self.trainer.interrupts
        if interrupts is not None and interrupts.signal is not None:
            raised[1 + SIGNALS.index(interrupts.signal)].fill_(1.0)
        if self.trainer.accelerator.num_processes > 1:
            raised = self.trainer.accelerator.reduce(raised, "sum")
        wrong, *came = torch.cat([raised, values]).tolist()
        came, losses, gradient_norm = came[: len(SIGNALS)], came[len(SIGNALS) : -1], came[-1]
        if interrupts is not None and any(came):
            interrupts.signal = next(each for each, count in zip(SIGNALS, came, strict=True) if count)
            self.asked = True
        return losses, gradient_norm, bool(wrong)

    def _stop_or_skip(self, what: str, parts: list[tuple[list[str], float]], wrong: bool) -> None:
        trainer = self.trainer
        if self.nonfinite == "stop":
            folder = trainer.args.output_dir
            raise UserError(
                f"Step {trainer.state.global_step + 1:,}: the {what}; its rows are {_names(parts)} (all are in "
                f"{Path(folder) / STRANGE_STEPS}); look at them with `vlm-sft debug-batch {folder}`, then remove them, "
                f"lower the learning rate, or set watch.nonfinite=skip, and go on with --resume."
            )
        trainer.optimizer.zero_grad()  # without gradients the optimizer leaves weights and moments as they are
        if self.filters:
            self._log_without([loss for _, loss in parts])
        if wrong:
            self._say(f"the {what}: the step is skipped", parts)

    def _log_without(self, losses: list[float]) -> None:
        """The logged loss takes the mean so far in place of one that is not finite (`logging_nan_inf_filter`).

        transformers does the same, but asks the device after each micro-batch whether it must.
        """
        trainer, total = self.trainer, self._logged_loss
        assert total is not None
        for loss in losses:
            steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
            total = total + (loss if math.isfinite(loss) else total / steps)
        trainer._tr_loss.copy_(total)

    def _say(self, what: str, parts: list[tuple[list[str], float]]) -> None:
        tell(f"step {self.trainer.state.global_step + 1:,}: {what}; rows {_names(parts, most=3)}", stderr=True)

    def _record(self, why: str, parts: list[tuple[list[str], float]], gradient: float) -> None:
        """Appends a line to `watch.jsonl`."""
        folder = Path(self.trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = newest(folder)
        record = {
            "step": self.trainer.state.global_step + 1, "why": why, "loss": sum(loss for _, loss in parts),
            "gradient": gradient, "process": self.trainer.args.process_index, "rows": [ids for ids, _ in parts],
            "losses": [loss for _, loss in parts], "checkpoint": checkpoint.name if checkpoint else None,
        }  # fmt: skip
        with open(folder / STRANGE_STEPS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
    rows = ", ".join(read_text(file) for file in files if file.is_file())
    where = f"in a batch of {rows}" if rows else "before its first batch"
    return (
        f"A data-loader worker died {where}; if memory ran out, "
        f"use fewer workers (sft.dataloader_num_workers), smaller images or a smaller batch, and go on with --resume."
    )


def gone_workers(notes: Path) -> str:
    """What torch would say of the workers that wrote notes and live no longer; "" where there are none."""
    alive = {str(child.pid) for child in active_children()}
    gone = sorted(file.name for file in notes.iterdir() if file.name not in alive)
    return f"DataLoader worker (pid(s) {', '.join(gone)}) exited unexpectedly" if gone else ""
