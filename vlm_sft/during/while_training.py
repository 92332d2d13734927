"""What is asked of a model while it is trained: benchmarks, rows of one's own, a few to look at, and other texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..recipe.passed_on import LOSSES, TEXT_LOSS
from .benchmarks import Benchmarks
from .forgetting import Forgetting
from .in_training import InTraining
from .own_rows import OwnRows
from .samples import Samples

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..training.part_trainer import PartTrainer


class WhileTraining(TrainerCallback):
    """Asks at each evaluation of a run, which with benchmarks every save has, and of the bundle that it leaves.

    Args:
        recipe: With its `evaluation`.
        say: Told what the model said, and what cannot be asked.

    Raises:
        UserError: What is to be asked is not there or wrong, or what the best checkpoint is chosen by is not measured.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.recipe, self.say = recipe, say
        self.benchmarks, self.own_rows, self.samples = Benchmarks(recipe), OwnRows(recipe), Samples(recipe, say)
        self.forgetting = Forgetting(recipe, say)
        self._pupil: InTraining | None = None
        self._check_best()

    def _check_best(self) -> None:
        """The name of a score of a benchmark, whose files the recipe's own check does not read."""
        best, asked = self.recipe.sft.get("metric_for_best_model"), [*self.own_rows.names, *self.benchmarks.names]
        asked += [TEXT_LOSS] if self.forgetting.texts else []
        asked = [*(LOSSES if self.recipe.data.eval else ()), *asked]
        if best is not None and str(best).removeprefix("eval_") not in asked:
            raise self.recipe.error(
                ("sft", "metric_for_best_model"),
                f"no evaluation of this recipe measures {best!r}; it can be one of these: {', '.join(asked)}.",
            )

    def attach(self, trainer: PartTrainer) -> None:
        """Asks at the evaluations of a run, where its model can answer while it is trained.

        Raises:
            UserError: It cannot, and the best checkpoint is chosen by answers.
        """
        pupil = InTraining(trainer)
        best = str(self.recipe.sft.get("metric_for_best_model") or "loss").removeprefix("eval_")
        if (why := pupil.mute) and best not in LOSSES:
            raise self.recipe.error(
                ("sft", "metric_for_best_model"),
                f"{best!r} is measured by answers, and while it is trained the model gives none: {why}; choose by one "
                f"of these: {', '.join(LOSSES)}.",
            )
        if why and (self.benchmarks.ready or self.own_rows.metrics or self.samples.drawn or self.forgetting.texts):
            bundle = " The finished bundle is asked the benchmarks." if self.benchmarks.ready else ""
            self.say(f"The model is not asked while it is trained: {why}.{bundle}")
        self._pupil = pupil
        if self.benchmarks.ready and not why:
            trainer.save_points.evaluates = True
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Keeps what the model says before its first step."""
        if self._pupil is not None and not self._pupil.mute:
            self.samples.begin(self._pupil, state.global_step)
            self.forgetting.begin(self._pupil)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Asks, and adds to the metrics from which transformers takes the best checkpoint."""
        pupil = self._pupil
        if pupil is None:
            return
        metrics: dict[str, float] = given["metrics"]
        if not pupil.mute:
            self._ask(pupil, args, state, control, metrics)
        best = args.metric_for_best_model and f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        if best and best not in metrics and pupil.trainer.is_in_train:
            there = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise self.recipe.error(
                ("sft", "metric_for_best_model"),
                f"the evaluation after step {state.global_step:,} did not measure {args.metric_for_best_model!r}: "
                f"choose the best checkpoint by what it did measure ({there or 'nothing'}).",
            )
        if (patience := self.recipe.evaluation.patience) is not None:
            control.should_training_stop |= self._no_better(str(best), patience, state, bool(args.greater_is_better))

    def _ask(
        self,
        pupil: InTraining,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
    ) -> None:
        found = self.own_rows.measure(pupil) | self.forgetting.measure(pupil)
        if pupil.trainer.is_in_train:  # behind it, the finished bundle is asked
            found |= self.benchmarks.measure(pupil)
        if found:
            metrics |= found
            # Logged as of an evaluation, which a model in training is not.
            state.log_history.append({**found, "epoch": state.epoch or 0.0, "step": state.global_step})
            pupil.trainer.callback_handler.on_log(args, state, control, found)
        self.samples.ask(pupil, state.global_step)

    def _no_better(self, key: str, patience: int, state: TrainerState, greater: bool) -> bool:
        """Whether the last evaluations were no better than the best before them.

        Told by the log, which a checkpoint has: transformers' own callback forgets its count where a run goes on.
        """
        values = [row[key] if greater else -row[key] for row in state.log_history if key in row]
        done = len(values) > patience and max(values[-patience:]) <= max(values[:-patience])
        if done:
            self.say(f"Step {state.global_step:,}: no better by {key} in {patience} evaluations, so the run ends here.")
        return done

    def finish(self, folder: Path) -> Path:
        """Asks the finished bundle the benchmarks, and returns its folder; not that of a run that a signal stopped."""
        if self._pupil is None or not self._pupil.trainer.interrupted:
            self.benchmarks.finish(folder)
        return folder
