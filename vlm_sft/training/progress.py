"""What a person sees of a run while it runs: a live bar at the terminal, plain lines in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sized
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.console import make_console
from ..base.words import duration

# How each number of a log is said, the important ones first.
IN_WORDS = {
    "loss": "loss {:.3f}",
    "token_accuracy": "accuracy {:.1%}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "data_wait_share": "data wait {:.0%}",
    "eval_loss": "validation loss {:.3f}",
    "eval_token_accuracy": "accuracy {:.1%}",
    "eval_image_use": "image use {:+.3f}",
}


class RichProgress(TrainerCallback):
    """A progress bar with loss, accuracy, throughput, data wait and time left; plain lines where there is no terminal.

    At the terminal the newest numbers stand below the bar and evaluations scroll by above it.

    Args:
        console: Where to print; default standard error, so that standard output stays free for results.
        heartbeat: Without a terminal, a line is printed after so many seconds without one, so that a log shows whether
            a long step, evaluation or save still goes on.
    """

    def __init__(self, console: Console | None = None, heartbeat: float = 60.0) -> None:
        self.console = console or make_console(quiet=False)
        self.heartbeat = heartbeat
        self._said = 0.0  # when the last line was printed
        self._ended = threading.Event()
        self._step_began = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._numbers = ""
        self._began = (0.0, 0)  # when, and at which step
        self._evaluated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the bar."""
        self._began = (time.monotonic(), state.global_step)
        if not state.is_world_process_zero:
            return
        if not self.console.is_terminal:
            self._said = self._step_began = time.monotonic()
            self._ended = threading.Event()
            threading.Thread(target=self._beat, args=(state, self._ended), daemon=True).start()
            return
        self.close()
        self._bar = _Bar(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            expand=True,
            transient=True,  # the last numbers are printed when it goes
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, left="", numbers="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        self._step_began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, left=self._left(state))

    def on_prediction_step(self, *args: Any, eval_dataloader: Sized, **kwargs: Any) -> None:
        """Says how far an evaluation is."""
        if self._bar is not None:
            self._evaluated += 1
            progress = f"validation: batch {self._evaluated} of {len(eval_dataloader)}"
            self._bar.update(self._task, numbers=progress)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Back to the numbers of the training."""
        self._evaluated = 0
        if self._bar is not None:
            self._bar.update(self._task, numbers=self._numbers)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the newest numbers."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or not logs:
            return
        line = describe(logs)
        if self._bar is not None and "loss" in logs:
            self._numbers = line
            self._bar.update(self._task, numbers=line)
        elif self._bar is not None and "train_runtime" in logs:
            self.close()
            self._print(f"step {state.global_step:,}: {self._numbers}")
            self._print(line)
        elif self._bar is not None or "loss" not in logs:
            self._print(f"step {state.global_step:,}: {line}")
        else:
            left = self._left(state)
            self._print(f"step {state.global_step:,}/{state.max_steps:,}: {line}{' · ' if left else ''}{left}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Takes the bar away."""
        self.close()

    def close(self) -> None:
        """Takes the bar away; to be called also where the training ends by an error, which leaves no cursor else."""
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: TrainerState) -> str:
        """Time left, by the mean over the steps so far, evaluations and saves included."""
        when, first = self._began
        done, missing = state.global_step - first, state.max_steps - state.global_step
        if done <= 0 or missing <= 0:
            return ""
        return f"{duration((time.monotonic() - when) / done * missing)} left"

    def _beat(self, state: TrainerState, ended: threading.Event) -> None:
        """Prints a line whenever none was printed for `heartbeat` seconds."""
        while not ended.wait(max(self._said + self.heartbeat - time.monotonic(), 0.01)):
            if time.monotonic() - self._said >= self.heartbeat:
                self._print(self.pulse(state))

    def pulse(self, state: TrainerState) -> str:
        """`step 12/400 done, the next runs for 0:02:10, 0:31:00 in all`."""
        now = time.monotonic()
        step, whole = duration(now - self._step_began), duration(now - self._began[0])
        return f"step {state.global_step:,}/{state.max_steps:,} done, the next runs for {step}, {whole} in all"

    def _print(self, line: str) -> None:
        self._said = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar(Progress):
    """A bar with a second line of numbers, which a narrow terminal cuts instead of squeezing the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(f"  {task.fields['numbers']}", no_wrap=True, overflow="ellipsis")


def describe(logs: dict[str, float]) -> str:
    """The numbers of one log in words, the important ones first."""
    words = [text.format(logs[name]) for name, text in IN_WORDS.items() if name in logs]
    if "train_runtime" in logs:
        mean = logs.get("train_loss", float("nan"))
        words.append(f"trained for {duration(logs['train_runtime'])}, mean loss {mean:.3f}")
    return " · ".join(words) or ", ".join(f"{name} {value}" for name, value in logs.items())
