"""TRL's `SFTTrainer`, killed at any moment and continued to the same weights and the same log.

transformers saves and restores weights, optimizer, schedule, random states and the place in the data. Added here: a
save appears as a whole or not at all, the sums between two logs are saved too, and what stands at an epoch's end (a
log, an evaluation) is done before the save of the same step, not lost when a run goes on from there.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from ..base.errors import UserError
from ..base.interrupts import SIGNALS, Interrupts
from ..base.whole_files import UNFINISHED
from ..bundle.run_folder import PREFIX, newest, publish, rotate


class ResumableTrainer(SFTTrainer):
    """A trainer whose checkpoints are whole and exact.

    Attributes:
        interrupts: Where signals are remembered; None to leave them alone.
        interrupted: The training was saved and stopped because of one.
    """

    interrupts: Interrupts | None = None
    interrupted = False
    control: TrainerControl
    _beside: Path | None = None  # where a checkpoint is being written

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_SavePoints(self))

    # -- saving -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._beside) if self._beside else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place and renames it, then deletes old ones.

        Raises:
            UserError: The disk is full or the folder read-only; what was there before is untouched.
        """
        run = Path(self.args.output_dir)
        final = run / f"{PREFIX}{self.state.global_step}"
        self._beside = run / f"{UNFINISHED}{final.name}"
        try:
            super()._save_checkpoint(model, trial)
            self._name_the_best(final)
            self._publish(self._beside / final.name, final)
        except Exception as error:  # each library has its own
            if not _is_about_the_disk(error):
                raise
            shutil.rmtree(self._beside, ignore_errors=True)
            raise UserError(_cannot_save(final, error)) from error
        finally:
            beside, self._beside = self._beside, None
        if self.is_local_process_zero():
            shutil.rmtree(beside, ignore_errors=True)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _name_the_best(self, final: Path) -> None:
        """The state must not name the folder that the best checkpoint had while it was written."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._beside:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))

    def _publish(self, unfinished: Path, final: Path) -> None:
        """Renames when every process has written its files; on machines that share no disk, once on each."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and unfinished.exists():
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()

    # -- what transformers does not save ----------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """What this process adds up between logs, as JSON can hold it. To extend, together with `set_counters`."""
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Puts back what `counters` gave."""
        self._tr_loss += saved["loss"]
        self._total_loss_scalar = saved["logged_loss"]
        self._globalstep_last_logged = saved["logged_step"]

    def _counters_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"counters_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the one part of a save that every process does
        self._counters_file(output_dir).write_text(json.dumps(self.counters()), encoding="utf-8")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._resumed_from = resume_from_checkpoint
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def restore_counters(self) -> None:
        """Goes on adding where the checkpoint stopped; with another number of processes, each starts at zero."""
        if self._resumed_from and (file := self._counters_file(self._resumed_from)).is_file():
            self.set_counters(json.loads(file.read_text(encoding="utf-8")))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def sum_over_processes(self, values: list[float]) -> list[float]:
        """Sums numbers of every process; all must call it at the same place."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), "sum").tolist()

    def asked_to_stop(self) -> bool:
        """Whether a signal came, to whichever process: all stop after the same step."""
        if self.interrupts is None:
            return False
        came = self.sum_over_processes([float(self.interrupts.signal == each) for each in SIGNALS])
        asked = [each for each, count in zip(SIGNALS, came, strict=True) if count]
        self.interrupts.signal = signal.Signals(asked[0]) if asked else None
        return bool(asked)

    def _run_epoch(self, **given: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed between the last save and the end: transformers would do one step more.
            self.control.should_training_stop = True
            return
        _set_epoch(given["train_dataloader"], given["epoch"])
        super()._run_epoch(**given)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if not self.interrupted:
            return super()._finalize_training(trial, num_train_samples, start_time)
        # No loading of the best weights, and no deletion of the checkpoint that was just saved.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers logs, but the mean loss is that of the whole run, not only of the part after a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)


class _SavePoints(TrainerCallback):
    """Puts a save that falls on an epoch's end behind everything else that happens there."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._due = False
        self.trainer.restore_counters()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.asked_to_stop():
            self.trainer.interrupted = control.should_save = control.should_training_stop = True
        ends = state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
        if control.should_save and ends:
            self._due, control.should_save = True, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stopped = self.trainer.interrupted and state.global_step < state.max_steps
        if stopped and not float(state.epoch or 0).is_integer():
            # The epoch goes on when the run does; its log and its evaluation come then.
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._due:
            self._due, control.should_save = False, True


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tells the sampler its epoch, however deep it lies.

    accelerate looks through two wrappers. With several processes and batches to skip there are three, and a run that
    goes on in its second epoch would see the rows in the order of the first.
    """
    inner = getattr(loader, "batch_sampler", None)
    while inner is not None:
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)


def _is_about_the_disk(error: Exception) -> bool:
    """torch and the tokenizers report a file that cannot be written as errors of their own."""
    words = ("PytorchStreamWriter", "inline_container", "iostream error", "(os error ")
    return isinstance(error, (OSError, UserError)) or any(word in str(error) for word in words)


def _cannot_save(final: Path, error: Exception) -> str:
    reason = str(error).rstrip(".") if isinstance(error, UserError) else getattr(error, "strerror", None)
    good = newest(final.parent)
    kept = f"{good} is whole, go on from it with --resume" if good else "there is no earlier one; start again"
    return f"{final} cannot be written ({reason or 'is the disk full?'}): make room or choose another disk; {kept}."
