"""What a bundle's language model has forgotten, against what it was before its stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from ..base.console import make_console
from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import Json
from ..base.progress import waiting
from ..base.whole_files import IrregularError, read_text, write_json
from ..base.words import one_line
from ..bundle.hub import is_fetched
from ..bundle.load import recipe_of
from ..bundle.manifest import read_manifest
from ..recipe.safety import refuse_code
from ..stack.build_stack import build_stack
from .compare import Forgetting, compare, is_whole, nothing, with_tower
from .state import State, measure, without_adapter
from .texts import TextSet, Wish, read_texts
from .towers import Pictures, TowerTest, read_pictures, was_tuned

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..batch.processor import VLMProcessor
    from ..recipe.schema import Recipe

NOTE = "forgetting"
"""Key of `bundle.json`: what the run measured before its first step."""


class BeforeAndAfter:
    """Measures a bundle before and after its stage.

    Before is the same model without its LoRA; of a language model that was trained whole, what the run noted, or its
    base weights, which are read for it.

    Args:
        folder: The bundle.
        wish: What is wanted.
        trust: Lets base pieces run code that they bring.
        say: Told why nothing is measured, where it was wanted.

    Raises:
        UserError: The texts cannot be read, or base weights cannot be had.
    """

    def __init__(self, folder: Path, wish: Wish, trust: bool, say: Callable[[str], None]) -> None:
        texts, pictures = wish.texts, wish.pictures
        manifest = read_manifest(folder)
        recipe = recipe_of(folder, manifest)
        wanted = True if pictures else wish.wanted
        self.say, self.wanted, self.asked_pictures = say, wanted, pictures
        self.recipe, self.fetched = recipe, is_fetched(folder)
        self.limit = recipe.evaluation.forgetting_limit
        self.before: State | None = None
        self.texts: TextSet | None = None
        self.pictures: Pictures | None = None
        self.trained, self.tower = manifest["trained"], ""
        whole = "language_model" in self.trained
        if wanted is False:
            return
        if recipe.stack and ("vision_tower" in self.trained or manifest["adapter"]):  # whether LoRA is in it, it shows
            self.tower = recipe.stack.vision_tower.pretrained
            self.pictures = read_pictures(pictures, recipe, say) if pictures else None
        if not (whole or manifest["adapter"]):
            say("The language model was not trained, so it has forgotten nothing.") if wanted else None
            return
        try:
            # A repository of the Hub names no file of this machine.
            self.texts = read_texts(texts or (None if self.fetched else recipe.evaluation.forgetting_texts))
        except UserError as error:
            if texts or wanted:
                raise
            say(f"What was forgotten is not measured: {error}")
            return
        if whole:
            self.before = noted(manifest, self.texts.mark)
            if self.before is None and wanted:
                self.before = _of_base(recipe, folder, self.texts, trust)
            if self.before is None:
                self.texts = None

    def finish(
        self, load: Callable[[], tuple[PreTrainedModel, VLMProcessor]], file: Path | None = None, loaded: bool = True
    ) -> Forgetting | None:
        """What was forgotten; None where nothing is measured.

        Args:
            load: Gives the bundle's model and processor.
            file: Where it is written.
            loaded: Whether they are there; where not, and it is not wanted, what the file says is all that is told.

        Raises:
            UserError: It was wanted, and the model cannot be measured.
        """
        if self.texts is None and not self.tower:
            return None
        if not (loaded or self.wanted):
            return None if file is None else _written(file)
        try:
            model, processor = load()
            with waiting(make_console(), "Measuring what was forgotten"):
                found = nothing(self.limit) if self.texts is None else self._of_texts(model, processor, self.texts)
                found = with_tower(found, self._of_tower(model))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise anything at a batch without pictures
            sentence = f"What was forgotten is not measured: {one_line(error)}"
            if self.wanted:
                raise UserError(sentence) from error
            self.say(sentence)
            return None
        if found["texts"] is None and not found["tower"]:
            return None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
        return found

    def _of_texts(self, model: PreTrainedModel, processor: VLMProcessor, texts: TextSet) -> Forgetting:
        before = self.before
        if before is None:
            with without_adapter(model):
                before = measure(model, processor, texts)
        return compare(texts, before, measure(model, processor, texts), self.limit)

    def _of_tower(self, model: PreTrainedModel) -> dict[str, Json]:
        """What the vision tower of a stack lost, where its stage changed it and its piece has a text tower."""
        if not self.tower:
            return {}
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        tower: nn.Module = core.model.vision_tower
        if not was_tuned(tower, self.trained):
            return {}
        try:
            # What a bundle of the Hub names lies on another machine.
            captions = None if self.fetched and not self.wanted else self.recipe
            pictures = self.pictures or read_pictures(None, captions, self.say)
            return TowerTest(self.tower, pictures, model.device).compare(tower)
        except UserError as error:
            if self.asked_pictures:
                raise
            self.say(f"What the vision tower forgot is not measured: {str(error).removeprefix('--model ')}")
            return {}


def _written(file: Path) -> Forgetting | None:
    try:
        found = json.loads(bounded(read_text(file)))
        whole = is_whole(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, IrregularError):
        return None
    return found if whole else None


def noted(manifest: Json, mark: str) -> State | None:
    """What a run noted before its first step on the texts of this mark, or None."""
    found = manifest.get(NOTE)
    before = found.get("before") if isinstance(found, dict) else None
    whole = isinstance(before, dict) and before.get("texts") == mark and isinstance(before.get("perplexity"), dict)
    return before if whole and {"loss", "answers"} <= before.keys() else None  # type: ignore[union-attr]


def _of_base(recipe: Recipe, folder: Path, texts: TextSet, trust: bool) -> State:
    if not trust:
        refuse_code(recipe, str(folder))
    with waiting(make_console(), "Measuring what the base knew"):
        stack = build_stack(recipe)
        model = stack.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return measure(model, stack.processor, texts)  # type: ignore[arg-type]
