"""Benchmarks of a recipe's `evaluation`: asked at each evaluation of a run, and of the bundle that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import TrainerCallback

from ..base.processes import share_work
from ..metrics.measures import MEASURES
from .asking import Asker, How, Record, share_of
from .benchmark import Benchmark, answered, read_benchmarks, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from ..recipe.schema import Recipe
    from ..training.trainer import VLMSFTTrainer


class Benchmarks(TrainerCallback):
    """Adds the scores of benchmarks to those of an evaluation: `sft.metric_for_best_model: gqa_accuracy` picks by them.

    Args:
        recipe: With its `evaluation`; without, nothing is asked.

    Raises:
        UserError: A benchmark or its data are not there or wrong.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.asked, self.settings = recipe.evaluation, dict(recipe.generation)
        self.ready: list[Benchmark] = []
        if (asked := self.asked) is not None:
            self.ready = read_benchmarks(asked.benchmarks, asked.data, asked.max_rows)
        self._trainer: VLMSFTTrainer | None = None

    def attach(self, trainer: VLMSFTTrainer, say: Callable[[str], None]) -> None:
        """Asks at the evaluations of a run, where its model can answer while it is trained."""
        if self.asked is None:
            return
        split = trainer.is_fsdp_enabled or trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._trainer = trainer
        if trainer.prefix is not None or split:
            why = "the cache has the vision tower's place" if trainer.prefix is not None else "its weights are split"
            say(f"The benchmarks of `evaluation` are asked of the finished bundle alone: while it is trained, {why}.")
            return
        trainer.add_callback(self)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Asks, and adds to the metrics from which transformers takes the best checkpoint."""
        trainer = self._trainer
        assert trainer is not None
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        model.eval()
        found: dict[str, float] = {}
        for benchmark in self.ready:
            found |= self._scores(benchmark, model)
        model.train(was_training)
        given["metrics"] |= found
        # Logged as of an evaluation, which a model in training is not.
        state.log_history.append({**found, "step": state.global_step})
        trainer.callback_handler.on_log(args, state, control, found)

    def _scores(self, benchmark: Benchmark, model: PreTrainedModel) -> dict[str, float]:
        assert self._trainer is not None and self.asked is not None
        settings = {**self.settings, **benchmark.task.generation}
        how = replace(How(), settings=settings, batch_size=self.asked.batch_size, blank=False)
        asker = Asker(model, self._trainer.processing_class, benchmark.pictures, how)  # type: ignore[arg-type]

        def share(process: int, processes: int) -> list[Record]:
            records: list[Record] = []
            asker.ask(share_of(benchmark.asked, process, processes), records.extend)
            return records

        by_id = {record["id"]: record for records in share_work(share) for record in records}
        measured = MEASURES[benchmark.task.metric](
            [answered(by_id[one.id], by_id[one.id]["answer"]) for one in benchmark.asked]
        )
        return {f"eval_{benchmark.name}_{metric}": total.score() for metric, total in measured.totals.items()}

    def finish(self, folder: Path) -> Path:
        """Asks the finished bundle, as `vlm-sft evaluate` does, writes what was found into it, and returns its folder.

        Of a run that a signal stopped, the bundle is not asked.
        """
        if (asked := self.asked) is not None and not (self._trainer and self._trainer.interrupted):
            how = How(batch_size=asked.batch_size)
            run(str(folder), asked.benchmarks, data=asked.data, how=how, max_rows=asked.max_rows)
        return folder
