"""Benchmarks of a recipe's `evaluation`: asked at each evaluation of a run, and of the bundle that it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.names import Record
from ..base.processes import share_work
from ..evaluation.asking import Asker, How, share_of
from ..evaluation.benchmark import Benchmark, read_benchmarks, run
from ..evaluation.records import answered
from ..evaluation.tasks import check_judge
from ..metrics.measures import MEASURES, Answered
from .in_training import InTraining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe.schema import Recipe


class Benchmarks:
    """Adds the scores of benchmarks to those of an evaluation: `sft.metric_for_best_model: gqa_accuracy` picks by them.

    Args:
        recipe: With its `evaluation`; without benchmarks, nothing is asked.

    Raises:
        UserError: A benchmark or its data are not there or wrong.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.asked, self.settings = recipe.evaluation, dict(recipe.generation)
        self.ready: list[Benchmark] = []
        if asked := recipe.evaluation.benchmarks:
            self.ready = read_benchmarks(asked, recipe.evaluation.data, recipe.evaluation.max_rows)
            check_judge([each.task for each in self.ready])  # a recipe names no server: a command does

    @property
    def names(self) -> list[str]:
        """What is measured, as logs call it without `eval_`."""
        return [f"{each.name}_{score}" for each in self.ready for score in _scores_of(each)]

    def measure(self, pupil: InTraining) -> dict[str, float]:
        """Asks all of them, and gives their scores."""
        found: dict[str, float] = {}
        if self.ready:
            with pupil.aside() as model:
                for benchmark in self.ready:
                    found |= self._scores(benchmark, model, pupil)
        return found

    def _scores(self, benchmark: Benchmark, model: PreTrainedModel, pupil: InTraining) -> dict[str, float]:
        settings = {**self.settings, **benchmark.task.generation}
        how = replace(How(), settings=settings, batch_size=self.asked.batch_size, blank=False)
        asker = Asker(model, pupil.processor, benchmark.pictures, how)  # type: ignore[arg-type]
        asker.shared = pupil.shared()

        def share(process: int, processes: int) -> list[Record]:
            records: list[Record] = []
            asker.ask(share_of(benchmark.asked, process, processes), records.extend)
            return records

        by_id = {record["id"]: record for records in share_work(share) for record in records}
        measured = MEASURES[benchmark.task.metric](
            [answered(by_id[one.id], by_id[one.id]["answer"]) for one in benchmark.asked]
        )
        return {f"eval_{benchmark.name}_{metric}": total.score() for metric, total in measured.totals.items()}

    def finish(self, folder: Path) -> None:
        """Asks the finished bundle, as `vlm-sft evaluate` does, and writes what was found into it."""
        if self.ready:
            asked = self.asked
            how = How(batch_size=asked.batch_size)
            run(str(folder), asked.benchmarks or (), data=asked.data, how=how, max_rows=asked.max_rows)


def _scores_of(benchmark: Benchmark) -> list[str]:
    """Names of a benchmark's scores: some depend on which kinds of questions it has, so one of each is scored."""
    of_kinds = {one.kind: one for one in benchmark.asked}.values()
    given = [Answered("", one.answers, one.choices or {}, one.kind or "", one.group or one.id) for one in of_kinds]
    return list(MEASURES[benchmark.task.metric](given).totals)
