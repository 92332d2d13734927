"""A run that is killed at any moment goes on to the same weights and the same log, and as the run that was begun.

transformers saves and restores weights, optimizer, schedule, random states and the place in the data. Added here: a
save appears as a whole or not at all, the sums between two logs are saved too, what stands at an epoch's end (a
log, an evaluation) is done before the save of the same step, not lost when a run goes on from there, and a run that is
asked benchmarks is evaluated at every save, with rows to evaluate on or without. `check_resumption` compares its recipe
with that of the checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..base.errors import UserError
from ..base.names import RECIPE
from ..base.whole_files import UNFINISHED, read_text
from ..bundle.manifest import Provenance, update_manifest
from ..bundle.run_folder import PREFIX, newest, publish, rotate
from ..recipe.libraries import settle_precision
from ..recipe.yaml_file import KeyPath, YamlFile

if TYPE_CHECKING:
    from trl import SFTConfig

    from ..recipe.schema import Recipe
    from .part_trainer import PartTrainer

NOT_SET = "not set"
# What the weights or the optimizer's state in a checkpoint were made with. The optimizer brings its rates along, so a
# new one would stand in the table and not be used.
FIXED = re.compile(
    r"(stack|model|encoder|chat_template|system|train|lora|lora_from|quantization)\b"
    r"|sft\.(learning_rate|optim|optim_args|weight_decay|adam_beta1|adam_beta2|adam_epsilon)$"
)
# Where pieces lie (fingerprints are compared), and what a run that has begun no longer reads.
ELSEWHERE = re.compile(
    r"(stack\.\w+|model|encoder)\.(pretrained|revision|more|config|tokenizer|answers|trust_remote_code|init|dtype|attn_implementation)\b"
)
# What a run tells, saves and evaluates on the way.
BESIDE = re.compile(
    r"(init_from|hub|generation|watch)\b|cache(\.path|\.max_gb)?$|data\.(eval|test|max_rejected|measure_rows|decode_rows|url_cache)\b"
    r"|sft\.(output_dir|run_name|report_to|resume_from_checkpoint|use_cpu)$"
    r"|sft\.(log|logging|save|eval|dataloader|ddp|per_device_eval)_"
)
# Sections without defaults in a saved recipe: a key that is only in the new one was added. Elsewhere it is new to us.
AS_GIVEN = ("sft", "lora", "quantization", "train", "collator_args")


class SavePoints(TrainerCallback):
    """Where a run can be left and gone on with.

    Attributes:
        beside: The folder in which a checkpoint is being written; None between saves.
        resumed_from: The checkpoint with which this run began, if any.
        epoch: The epoch that begins next.
        evaluates: Whether every save is evaluated first, as it is where benchmarks are asked.
    """

    def __init__(self, trainer: PartTrainer) -> None:
        self.trainer = trainer
        self.beside: Path | None = None
        self.resumed_from: str | None = None
        self.epoch = 0
        self.evaluates = False
        self._due = self._planned = False  # a save that waits for its epoch's end; whether the recipe asks for one here
        self._bundle_of: int | None = None  # the step after which the run's bundle was written

    # -- files ------------------------------------------------------------------------------------------------------

    def write(self, save: Callable[[], None]) -> None:
        """Writes a checkpoint beside its place and renames it, then deletes old ones.

        Args:
            save: Writes it, into a folder of its name in `beside`.

        Raises:
            UserError: The disk is full or the folder read-only; what was there before is untouched.
        """
        trainer = self.trainer
        run = Path(trainer.args.output_dir)
        final = run / f"{PREFIX}{trainer.state.global_step}"
        self.beside = run / f"{UNFINISHED}{final.name}"
        try:
            save()
            state, best = trainer.state, trainer.state.best_model_checkpoint
            # It was written beside its place, and moves there.
            if best is not None and Path(best).parent == self.beside:
                state.best_model_checkpoint = str(final)
                if trainer.args.should_save:
                    state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))
            self._publish(self.beside / final.name, final)
        except Exception as error:  # each library reports a full disk by an error of its own
            if not _is_about_the_disk(error):
                raise
            shutil.rmtree(self.beside, ignore_errors=True)
            own = isinstance(error, UserError)
            reason = str(error).rstrip(".") if own else getattr(error, "strerror", None) or "is the disk full?"
            good = newest(run)
            kept = f"{good} is whole, go on from it with --resume" if good else "there is no earlier one; start again"
            raise UserError(
                f"{final} cannot be written ({reason}): make room or choose another disk; {kept}."
            ) from error
        finally:
            beside, self.beside = self.beside, None
        if trainer.is_local_process_zero():
            shutil.rmtree(beside, ignore_errors=True)
        if trainer.args.should_save:
            best = trainer.state.best_model_checkpoint
            rotate(run, trainer.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _publish(self, unfinished: Path, final: Path) -> None:
        """Renames when every process has written its files; on machines that share no disk, once on each."""
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            publish(unfinished, final)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_local_process_zero() and unfinished.exists():
            publish(unfinished, final)
        trainer.accelerator.wait_for_everyone()

    def save_bundle(self) -> None:
        """Writes the run's bundle or, where it is that of this step, what was noted and logged since."""
        trainer = self.trainer
        folder = trainer.args.output_dir
        if self._bundle_of != trainer.state.global_step:
            trainer.save_model(folder)
            self._bundle_of = trainer.state.global_step
        elif trainer.args.should_save and trainer.provenance is not None:
            update_manifest(folder, trainer.provenance.notes)
        trainer.save_state()

    def write_counters(self, folder: str | Path) -> None:
        """Writes what this process adds up between logs."""
        text = json.dumps(self.trainer.counters())
        (Path(folder) / f"counters_{self.trainer.args.process_index}.json").write_text(text, encoding="utf-8")

    # -- what is chosen by evaluations ------------------------------------------------------------------------------

    @property
    def evaluated(self) -> bool:
        """Whether what is trained so far was evaluated; the log knows, also that of a run that goes on."""
        state = self.trainer.state
        last = (row for row in reversed(state.log_history) if row["step"] == state.global_step)
        return any(name.startswith("eval_") for row in last for name in row)

    @property
    def chosen_among(self) -> bool:
        """Whether an evaluation may find the best checkpoint: one that no save goes with leaves none to load."""
        args = self.trainer.args
        each = args.load_best_model_at_end and args.save_strategy != SaveStrategy.BEST
        return not each or self._due or self.trainer.control.should_save

    def forget_bundle(self) -> None:
        """Other weights than those of the last step were loaded: the run's bundle is written anew."""
        self._bundle_of = None

    # -- moments ----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on adding where the checkpoint stopped; with another number of processes, each starts at zero."""
        self._due = False
        file = Path(self.resumed_from or "") / f"counters_{args.process_index}.json"
        if self.resumed_from and file.is_file():
            self.trainer.set_counters(json.loads(read_text(file)))

    def on_epoch_begin(self, *args: Any, train_dataloader: object, **kwargs: Any) -> None:
        """Tells the sampler its epoch, however deep it lies.

        accelerate looks through two wrappers. With several processes and batches to skip there are three, and a run
        that goes on in its second epoch would see the rows in the order of the first.
        """
        inner = getattr(train_dataloader, "batch_sampler", None)
        while inner is not None:
            if hasattr(inner, "set_epoch"):
                inner.set_epoch(self.epoch)
            inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
        self.epoch += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a signal, saves and stops; a save at an epoch's end waits for what else happens there."""
        self._planned = control.should_save
        if self.trainer.watch.asked:
            self.trainer.interrupted = control.should_save = control.should_training_stop = True
        ends = state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
        if control.should_save and ends:
            self._due, control.should_save = True, False
        elif self._planned:
            self._evaluate_save(control)
        self._save_before_last_evaluation(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Does the save that has waited."""
        stopped = self.trainer.interrupted and state.global_step < state.max_steps
        if stopped and not float(state.epoch or 0).is_integer():
            # The epoch goes on when the run does; its log and its evaluation come then.
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._due or control.should_save:
            if self._planned or control.should_save:  # one that a signal asked for is not waited for
                self._evaluate_save(control)
            self._due, control.should_save = False, True
        self._save_before_last_evaluation(state, control)

    def _evaluate_save(self, control: TrainerControl) -> None:
        """A save is evaluated first, once: what the best checkpoint is chosen by is known of each that there is."""
        control.should_evaluate |= self.evaluates and not self.evaluated

    def _save_before_last_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        """A run that is killed in its last evaluation has its bundle, of the last step until that one chooses."""
        if control.should_evaluate and state.global_step >= state.max_steps:
            self.save_bundle()


class EvaluatesWithoutRows(Trainer):
    """A trainer whose evaluations may have no rows: callbacks alone measure then, by benchmarks.

    Attributes:
        save_points: When it saves.
        provenance: With the recipe, whose `evaluation` names benchmarks or not.
    """

    control: TrainerControl
    save_points: SavePoints
    provenance: Provenance | None

    def __init__(self, *, args: SFTConfig, eval_dataset: Any = None, **kwargs: Any) -> None:
        planned = args.eval_strategy
        self._rowless = eval_dataset is None and bool(self.provenance and self.provenance.recipe.evaluation.benchmarks)
        if self._rowless:
            args.eval_strategy = IntervalStrategy.NO  # transformers refuses others without rows
        super().__init__(args=args, eval_dataset=eval_dataset, **kwargs)
        self.args.eval_strategy = planned

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures; without rows, what its callbacks measure is all."""
        if eval_dataset is not None or not self._rowless:
            return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[no-any-return]
        metrics: dict[str, float] = {}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.save_points.chosen_among and super()._determine_best_metric(metrics, trial)


def _is_about_the_disk(error: Exception) -> bool:
    """torch and the tokenizers report a file that cannot be written as errors of their own."""
    words = ("PytorchStreamWriter", "inline_container", "iostream error", "(os error ")
    return isinstance(error, (OSError, UserError)) or any(word in str(error) for word in words)


def check_resumption(recipe: Recipe, checkpoint: str | Path, say: Callable[[str], None]) -> None:
    """Compares the recipe with that of the checkpoint from which the run goes on.

    Args:
        recipe: What the user gives now.
        checkpoint: Where the run goes on.
        say: Told of differences that change what the rest of the run does.

    Raises:
        UserError: Another model, template, freeze plan or optimizer; a run cannot change those on its way.
    """
    path = Path(checkpoint) / RECIPE
    if not path.is_file():
        return
    told = []
    for key, old, new in _differences(YamlFile.read(path).data, settle_precision(recipe).resolved()):
        dotted = ".".join(map(str, key))
        if ELSEWHERE.match(dotted) or BESIDE.match(dotted):
            continue
        if FIXED.match(dotted):
            raise UserError(
                f"{recipe.where(key)}: the run of {str(checkpoint)!r} was begun with {dotted}: {_shown(old)}, which "
                f"cannot become {_shown(new)} on the way; use the recipe of that run, or start anew in another "
                f"sft.output_dir."
            )
        plain = not isinstance(old, list | dict) and not isinstance(new, list | dict)
        told.append(f"{dotted} ({_shown(old)} → {_shown(new)})" if plain else dotted)
    if told:
        say(f"The recipe has changed since the run began: {', '.join(told)}. From here on the new one counts.")


def _differences(old: object, new: object, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, Any]]:
    """The keys whose values differ, as deep as both sides are mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        if key == ("stack", "projector"):  # older recipes state the defaults of every kind of projector
            old = {name: value for name, value in old.items() if name in new}
        for name in [*old, *(name for name in new if name not in old and key and key[0] in AS_GIVEN)]:
            yield from _differences(old.get(name, NOT_SET), new.get(name, NOT_SET), (*key, name))
    elif key == ("chat_template",):
        if Path(str(old)).stem != Path(str(new)).stem:  # a template may be named or lie elsewhere
            yield key, old, new
    elif key[:1] == ("data",) and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        # Of sources too a key that only the new recipe states is new to us.
        if any(found for pair in zip(old, new, strict=True) for found in _differences(*pair, (*key, 0))):
            yield key, old, new
    elif old != new:
        yield key, old, new


def _shown(value: object) -> str:
    if value is None or value == NOT_SET:
        return NOT_SET
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
