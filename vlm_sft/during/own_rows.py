"""Rows of one's own, asked while a run goes on: how many answers are right, and by what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base.errors import RowError, UserError
from ..base.names import Json, Row
from ..evaluation.scoring import FEWEST_ANSWERS, Question, collect, merge
from ..metrics.measures import MEASURES, Answered
from ..recipe.passed_on import answer_scores
from .in_training import InTraining

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import Source

SAMPLES = 4  # rows whose answers are shown, where a recipe does not say how many
FIRST_ROWS = 1000  # rows of each source from which samples are drawn


def wanted_metrics(recipe: Recipe) -> list[str]:
    """What answers to `data.eval` are measured by: what the recipe lists, and what its best checkpoint is chosen by."""
    best = answer_scores().get(str(recipe.sft.get("metric_for_best_model") or "").removeprefix("eval_"))
    return list(dict.fromkeys([*recipe.evaluation.metrics, *([best] if best else [])]))


class OwnRows:
    """Measures answers to the rows of `data.eval`.

    Args:
        recipe: With its `evaluation`.

    Raises:
        UserError: A source cannot be read, or a metric needs what it has not.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.metrics = wanted_metrics(recipe)
        self.settings, self.batch_size = dict(recipe.generation), recipe.evaluation.batch_size
        self._read = read_questions(recipe, recipe.data.eval, recipe.evaluation.max_rows) if self.metrics else {}
        self.questions: list[Question] = []
        if not self.metrics:
            return
        if not self._read:
            raise UserError("evaluation: `metrics` has nothing to measure: no row of `data.eval` can be asked.")
        few = min((len(each.references) for some in self._read.values() for each in some), default=0)
        if few < FEWEST_ANSWERS and (vqa := next((name for name in self.metrics if name.startswith("vqa")), None)):
            raise UserError(
                f"evaluation: `{vqa}` compares an answer with those of ten annotators, and rows of `data.eval` have "
                f"{few}; take `exact_match`, or sources of the format vqav2."
            )
        for name in self.metrics:  # captions need packages, and a missing one is said now
            MEASURES[name]([Answered("", ["one"] * FEWEST_ANSWERS)])

    @property
    def names(self) -> list[str]:
        """What is measured, as logs call it without `eval_`."""
        one = [Answered("one", ["one"] * FEWEST_ANSWERS)]
        return [name for metric in self.metrics for name in _named(metric, dict.fromkeys(MEASURES[metric](one).totals))]

    def measure(self, pupil: InTraining) -> dict[str, float]:
        """Asks all rows and gives what they are measured by.

        Raises:
            UserError: As `InTraining.answers`.
        """
        if not self.metrics:
            return {}
        if not self.questions:
            merged = [merge(some, pupil.processor) for some in self._read.values()]  # type: ignore[arg-type]
            self.questions = [question for some in merged for question in some]
        said = pupil.answers([row_of(each) for each in self.questions], self.batch_size, self.settings)
        answers = ["" if isinstance(found, RowError) else str(found) for found in said]
        pairs = [Answered(text, one.references) for text, one in zip(answers, self.questions, strict=True)]
        found: dict[str, float] = {}
        for metric in self.metrics:
            totals = MEASURES[metric](pairs).totals
            found |= _named(metric, {name: total.score() for name, total in totals.items()})
        return {f"eval_{name}": value for name, value in found.items()}


def _named(metric: str, scores: Json) -> Json:
    """The first score has the metric's own name, the others stand behind it."""
    return {metric if not k else f"{metric}_{name}": value for k, (name, value) in enumerate(scores.items())}


def read_questions(
    recipe: Recipe, sources: Sequence[Source], max_rows: int | None = None
) -> dict[str | None, list[Question]]:
    """Questions by kind as `collect` gives them; wrong rows are left out where the run leaves out such rows too."""
    return {kind: some for kind, some in collect(sources, max_rows, recipe.data.max_rejected > 0).items() if some}


def draw(recipe: Recipe) -> list[Question]:
    """The few rows whose answers are shown: of each recipe and seed always the same."""
    asked = recipe.evaluation
    sources = recipe.data.eval if asked.samples_from is None else [asked.samples_from]
    wanted = SAMPLES if asked.samples is None else asked.samples
    if not wanted or not sources:
        return []
    found = [each for some in read_questions(recipe, sources, FIRST_ROWS).values() for each in some]
    chosen = random.Random(int(recipe.sft.get("seed", 42))).sample(range(len(found)), min(wanted, len(found)))
    return [found[number] for number in sorted(chosen)]


def row_of(question: Question) -> Row:
    """A question as it is asked."""
    return {"messages": question.messages, "images": question.images, "id": question.id}
