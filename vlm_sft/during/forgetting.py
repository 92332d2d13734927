"""Texts without pictures, measured while a run goes on: whether the language model forgets what it knew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..base.errors import UserError
from ..base.words import one_line
from ..bundle.manifest import read_manifest
from ..forgetting.bundles import NOTE, noted
from ..forgetting.state import State, measure, without_adapter
from ..forgetting.texts import TextSet, read_texts
from .in_training import InTraining

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..recipe.schema import Recipe


class Forgetting:
    """Measures a text set at each evaluation, and warns.

    Args:
        recipe: With its `evaluation`.
        say: Told when too much is forgotten.

    Raises:
        UserError: The texts cannot be read.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        asked = recipe.evaluation
        self.texts: TextSet | None = read_texts(asked.forgetting_texts) if asked.forgetting else None
        self.limit, self.say = asked.forgetting_limit, say
        self.before: State | None = None
        self._warned: set[str] = set()

    def begin(self, pupil: InTraining) -> None:
        """Measures what is to be kept: before the first step, or of a run that goes on, what it noted then."""
        if self.texts is None:
            return
        notes = pupil.trainer.provenance.notes if pupil.trainer.provenance else {}
        begun = pupil.trainer.save_points.resumed_from
        self.before = noted(read_manifest(begun), self.texts.mark) if begun else None
        if self.before is None:
            try:
                with pupil.aside() as model, without_adapter(model):
                    self.before = measure(model, pupil.processor, self.texts)  # type: ignore[arg-type]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # models raise anything at a batch without pictures
                raise UserError(f"`evaluation.forgetting` cannot be measured: {one_line(error)}") from error
            if begun:
                self.say(
                    "Nothing was noted of the texts before the first step, so what is found now, without LoRA, counts"
                )
        notes[NOTE] = {"before": self.before}

    def measure(self, pupil: InTraining) -> dict[str, float]:
        """The loss of all texts and the perplexity of each language; says where one is too large."""
        if self.texts is None or self.before is None:
            return {}
        with pupil.aside() as model:
            now = measure(model, pupil.processor, self.texts, answers=False)  # type: ignore[arg-type]
        for language, value in now["perplexity"].items():
            first = self.before["perplexity"][language]
            worse = not value <= self.limit * first
            if worse and language not in self._warned:
                self.say(
                    f"warning: the language model forgets: the perplexity of texts without pictures ({language}) is "
                    f"{value:,.4g}, {value / first:,.2f} times the {first:,.4g} before the first step (limit "
                    f"{self.limit:g} times): mix rows of text into data.train, or lower the learning rate."
                )
            (self._warned.add if worse else self._warned.discard)(language)
        sizes = {f"eval_text_perplexity_{language}": value for language, value in now["perplexity"].items()}
        return {"eval_text_loss": now["loss"], **sizes}
