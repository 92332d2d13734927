"""Runs as their files tell of them, while they go on and afterwards; a file that is not there leaves a gap."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.names import HISTORY, MANIFEST, METRICS, RUN_FACTS, RUN_LOCK, SAMPLES, STRANGE_STEPS, Json, Record
from ..bundle.run_folder import checkpoints, is_step, read_lines, read_object, read_value, step_of, with_steps

STATE_FILE = "trainer_state.json"  # transformers' file in a checkpoint
LONGEST = 1e10  # seconds that anybody waits for
ALIVE = 30.0  # seconds since the lock was touched, after which a run is taken for ended


@dataclass
class Run:
    """One run.

    Attributes:
        name: Of its folder.
        folder: Where it is.
        history: Its logs by step.
        facts: What `run.json` says; empty for a run of an earlier version.
        samples: Answers, by step.
        strange: Steps that went wrong.
        state: `running`, `finished` or `stopped`.
        age: Seconds since anything was written.
    """

    name: str
    folder: Path
    history: list[Json]
    facts: Json = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    strange: list[Json] = field(default_factory=list)
    state: str = "stopped"
    age: float = 0.0

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([self._fact("step"), *(row["step"] for row in self.history)])

    @property
    def steps(self) -> int:
        """How many there will be; 0 where that is not known."""
        return self._fact("max_steps")

    def _fact(self, name: str) -> int:
        known: Any = self.facts.get(name)
        return known if is_step(known) else 0

    @property
    def seconds_left(self) -> float | None:
        """By the mean over the steps that were logged; None where that is not known."""
        timed = [row for row in self.history if isinstance(row.get("time"), float | int)]
        done = timed[-1]["step"] - timed[0]["step"] if timed else 0
        if self.state != "running" or done <= 0 or not self.steps:
            return None
        left = (timed[-1]["time"] - timed[0]["time"]) / done * (self.steps - timed[-1]["step"])
        return max(0.0, left) if abs(left) < LONGEST else None

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, number) of a key, the last of each step, in order."""
        found: dict[int, float] = {}
        for row in self.history:
            if (value := _number(row.get(key))) is not None:
                found[row["step"]] = value
        return sorted(found.items())

    def keys(self) -> list[str]:
        """Keys of all logs that are numbers, in the order in which they came."""
        return list(dict.fromkeys(key for row in self.history for key in row if _number(row[key]) is not None))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None  # type: ignore[arg-type]


def read_run(folder: str | Path) -> Run:
    """Reads what is there of a run.

    Raises:
        UserError: The folder is not there, or no run ever wrote to it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{str(folder)!r} is no run: {what}; give the sft.output_dir of one.")
    history = read_lines(folder / HISTORY) or _old_history(folder)
    facts = read_object(folder / RUN_FACTS)
    if not history and not facts and not (folder / RUN_LOCK).exists() and not checkpoints(folder):
        there = [name for name in (HISTORY, METRICS, RUN_FACTS) if (folder / name).exists()]
        lacks = f"it has neither {HISTORY} nor {METRICS} nor a checkpoint"
        why = f"nothing in its {' and '.join(there)} can be read" if there else lacks
        raise UserError(f"{str(folder)!r} is no run: {why}; give the sft.output_dir of one.")
    manifest = read_object(folder / MANIFEST)
    facts = {**{key: manifest[key] for key in ("ledger", "train_rows", "eval_rows") if key in manifest}, **facts}
    watched = [folder / name for name in (HISTORY, RUN_FACTS, SAMPLES, RUN_LOCK, METRICS, MANIFEST)]
    touched = max((path.stat().st_mtime for path in watched if path.exists()), default=folder.stat().st_mtime)
    lock = folder / RUN_LOCK
    alive = lock.exists() and time.time() - lock.stat().st_mtime < ALIVE
    state = "running" if alive else "finished" if (folder / METRICS).is_file() else "stopped"
    samples, strange = read_lines(folder / SAMPLES), read_lines(folder / STRANGE_STEPS)
    age = max(0.0, time.time() - touched)
    return Run(folder.resolve().name, folder, history, facts, samples, strange, state, age)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Several runs, told apart by as much of their paths as that takes."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, name in zip(runs, list(names), strict=True):
        run.name = str(run.folder) if names.count(name) > 1 else name
    return runs


def _old_history(folder: Path) -> list[Json]:
    """Of a run of an earlier version: its metrics, or the log of its newest checkpoint."""
    found = read_value(folder / METRICS)
    newest = max(checkpoints(folder), key=step_of, default=None)
    if not isinstance(found, list) and newest is not None:
        found = read_object(newest / STATE_FILE).get("log_history")
    return with_steps(found if isinstance(found, list) else [])
