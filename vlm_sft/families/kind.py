"""The kinds of model that a recipe may name, as everything above asks them: a stack, an existing VLM, an encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..base.names import Json, Values
from ..batch.collator import MultimodalCollator
from ..batch.processor import VLMProcessor
from ..model.modeling import VLMForConditionalGeneration
from ..pieces.piece import Piece
from ..systems.mplug_vqa import MPlugForVQA
from ..systems.vle_heads import VLEForTask
from .model import FamilyModel

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

VLM = VLMForConditionalGeneration | FamilyModel | VLEForTask | MPlugForVQA


class Composed(NamedTuple):
    """A recipe's model before any weight is read.

    Attributes:
        config: Its configuration, every size checked against the next.
        processor: Its processor.
        pieces: Part → the piece that it is loaded from.
        cached: Parts whose features are given to the model, and so are not loaded.
        features: (T, W) of the features behind the last of these.
    """

    config: PreTrainedConfig
    processor: VLMProcessor
    pieces: dict[str, Piece[Any]]
    cached: tuple[str, ...] = ()
    features: tuple[int, int] = (0, 0)


class Kind(Protocol):
    """What is not the same for a stack (`StackKind`), an existing VLM (`FamilyKind`) and an encoder (`EncoderKind`).

    Attributes:
        base: The piece that LoRA goes into, as manifests and merged bundles call it.
        collator: Makes its batches, where a recipe names no other.
        covers: The parts that lie in that piece.
        settled: Keys of a recipe that no longer count once its run has ended → what a bundle puts in their place.
    """

    base: str
    collator: type[MultimodalCollator]
    covers: tuple[str, ...]
    settled: Values

    def compose(self, recipe: Recipe) -> Composed:
        """Configuration, processor and pieces, from small files alone.

        Raises:
            UserError: A piece cannot be had, or two do not fit.
        """

    def remarks(self, recipe: Recipe, composed: Composed) -> Iterator[str]:
        """A sentence for each thing that is done without being asked for, or that is known to go wrong."""

    def load(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> VLM:
        """The model with its weights.

        Args:
            recipe: A validated recipe.
            composed: What `compose` gave for it.
            dtypes: Piece → type of its weights (of an existing VLM, of those that are not trained).

        Raises:
            UserError: The weights cannot be had, or do not fit.
        """

    def empty(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> VLM:
        """The same model on the meta device: every size, name and type, no weight is read."""

    def cast(self, model: PreTrainedModel, recipe: Recipe, dtypes: Mapping[str, torch.dtype]) -> None:
        """Puts the parts of a loaded model into the types that `load` gives them."""

    def with_base(self, recipe: Recipe, changes: Values) -> Recipe:
        """A copy of the recipe in which `base` is another checkpoint: `pretrained`, `revision` and `dtype`."""

    def held(self, entries: Mapping[str, Json]) -> set[str]:
        """The parts that a bundle must hold though untrained: by the pieces of its manifest, no base is like them."""

    def mark_taken(self, entries: dict[str, Json], parts: Collection[str], folder: str) -> None:
        """Notes which parts came from another bundle: their pieces are not like them any more.

        Args:
            entries: What the manifest will say of the pieces; changed.
            parts: The parts.
            folder: The bundle.
        """

    def own_files(self, folder: Path) -> dict[str, str]:
        """Keys of a recipe → the files in the folder of its bundle that take the place of what the recipe named."""

    def read_processor(self, folder: Path, recipe: Recipe, config: PreTrainedConfig) -> VLMProcessor:
        """The processor that was saved into a bundle's folder.

        Raises:
            OSError: A file is missing.
            ValueError: A file is not what it should be.
        """
