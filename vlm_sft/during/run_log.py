"""What a run writes down of itself as it goes, for `vlm-sft watch`: its plan once, and a line at each log.

Everything is on the disk when a step is over, so that a page can be made of it while the run goes on, and after a kill.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.console import tell
from ..base.names import HISTORY, RUN_FACTS, Json
from ..base.whole_files import write_json, write_whole
from ..base.words import reason_of
from ..bundle.manifest import without_secrets
from ..bundle.run_folder import read_lines

if TYPE_CHECKING:
    from ..training.part_trainer import PartTrainer


class RunLog(TrainerCallback):
    """Adds each log to `history.jsonl`, and keeps `run.json` true.

    Args:
        trainer: Of the run.
    """

    def __init__(self, trainer: PartTrainer) -> None:
        self.trainer = trainer
        self.folder = Path(str(trainer.args.output_dir))
        self._began = time.time()
        self._parts: list[Json] = []
        self._wrong = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what is fixed; where a run goes on, lines of later steps are forgotten."""
        if not state.is_world_process_zero:
            return
        rows = self.trainer.plan.rows(self.trainer.model)
        self._parts = [asdict(row) | {"dtypes": sorted(row.dtypes)} for row in rows]
        lines = read_lines(self.folder / HISTORY) if state.global_step else []
        kept = [line for line in lines if line["step"] <= state.global_step]
        with self._on_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / HISTORY, b"".join(map(_dump, kept)))
            self._write_facts(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A line with all numbers of a log, when it was, and the most memory that was held."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 1), **logs}
        with self._on_disk():
            with (self.folder / HISTORY).open("ab") as file:
                file.write(_dump(line | {"memory_gib": round(most_memory() / 2**30, 4)}))
            self._write_facts(state)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """A disk that is full ends no run: that is what a save says, where it does."""
        try:
            yield
        except OSError as error:
            if not self._wrong:
                self._wrong = True
                tell(f"{self.folder / HISTORY} cannot be written ({reason_of(error)}): `watch` misses it.", stderr=True)

    def _write_facts(self, state: TrainerState) -> None:
        trainer, provenance = self.trainer, self.trainer.provenance
        recipe = provenance.recipe if provenance else None
        notes = provenance.notes if provenance else {}
        facts: Json = {
            "recipe": str(recipe.path) if recipe and recipe.path else None,
            "began": round(self._began, 1),
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epochs": state.num_train_epochs,
            "processes": trainer.args.world_size,
            "device": _device(),
            "batch": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
            "best": {
                "by": trainer.args.metric_for_best_model,
                "value": state.best_metric,
                "step": state.best_global_step,
            },
            "parts": self._parts,
            **{key: notes[key] for key in ("ledger", "train_rows", "eval_rows") if key in notes},
        }
        write_json(self.folder / RUN_FACTS, without_secrets(facts))


def most_memory() -> int:
    """Bytes that this process has held at most: of its GPU, or where it has none, of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _dump(line: Json) -> bytes:
    # JSON has no NaN: what is not finite is written as text, and read back as a number.
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return (json.dumps(plain, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")
