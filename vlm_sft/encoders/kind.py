"""An encoder that a recipe starts from (`encoder:`): how it is composed, loaded, kept and found again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..base.errors import UserError
from ..base.names import ANSWER_LIST, ENCODER_PARTS, Json, Values
from ..batch.collator import MultimodalCollator
from ..families.kind import Composed
from ..pieces.piece import Piece
from ..systems.mplug_vqa import MPlugConfig, MPlugForVQA
from ..systems.vle import VLEConfig
from ..systems.vle_heads import VLEForTask
from .collator import EncoderCollator
from .encoder import told
from .mplug import MPlugSystem
from .processor import EncoderProcessor
from .vle import VLESystem

if TYPE_CHECKING:
    from ..recipe.schema import Encoder, Recipe


ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


class System(Protocol[ConfigT]):
    """What is not the same for the encoders there are."""

    @staticmethod
    def config(piece: Piece[Any], recipe: Recipe) -> ConfigT:
        """The configuration that the recipe asks for, from small files and, for its answers, the rows.

        Raises:
            UserError: It cannot be had.
        """

    @staticmethod
    def processor(piece: Piece[Any], config: ConfigT) -> EncoderProcessor:
        """Its processor.

        Raises:
            UserError: It cannot be had, or does not fit.
        """

    @staticmethod
    def load(piece: Piece[Any], config: ConfigT) -> VLEForTask | MPlugForVQA:
        """The model with its weights, in fp32.

        Raises:
            UserError: They cannot be had, or do not fit.
        """

    @staticmethod
    def empty(config: ConfigT) -> VLEForTask | MPlugForVQA:
        """The same on the meta device."""


SYSTEMS: dict[str, System[Any]] = {VLEConfig.model_type: VLESystem, MPlugConfig.model_type: MPlugSystem}


class EncoderKind:
    """An encoder as `Kind` has it, where each method is said; there is no LoRA on one."""

    base = "encoder"
    collator: type[MultimodalCollator] = EncoderCollator
    covers: tuple[str, ...] = ENCODER_PARTS
    settled: Values = {}

    def compose(self, recipe: Recipe) -> Composed:
        piece = Piece(self.base, _spec(recipe))
        system = SYSTEMS[_type_of(piece)]
        piece.config = system.config(piece, recipe)
        processor = system.processor(piece, piece.config)
        if recipe.generation and not processor.writes:
            where = recipe.where(("generation",))
            raise UserError(f"{where}: this encoder chooses its answers and writes none; remove `generation`.")
        return Composed(piece.config, processor, {self.base: piece})

    def remarks(self, recipe: Recipe, composed: Composed) -> Iterator[str]:
        if answers := composed.processor.known.answers:  # type: ignore[attr-defined]
            yield f"The model chooses one of {len(answers):,} answers."

    def load(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> VLEForTask | MPlugForVQA:
        return SYSTEMS[composed.config.model_type].load(composed.pieces[self.base], composed.config)

    def empty(self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]) -> VLEForTask | MPlugForVQA:
        return SYSTEMS[composed.config.model_type].empty(composed.config)

    def cast(self, model: PreTrainedModel, recipe: Recipe, dtypes: Mapping[str, torch.dtype]) -> None:
        model.float()

    def with_base(self, recipe: Recipe, changes: Values) -> Recipe:
        known = {key: value for key, value in changes.items() if key != "dtype"}
        return recipe.model_copy(update={"encoder": _spec(recipe).model_copy(update=known)})

    def held(self, entries: Mapping[str, Json]) -> set[str]:
        # The head may be for other answers than the checkpoint's.
        return {"head", *entries[self.base].get("held", ())}

    def mark_taken(self, entries: dict[str, Json], parts: Collection[str], folder: str) -> None:
        entries[self.base] |= {"init_from": folder, "held": sorted(parts)}

    def read_processor(self, folder: Path, recipe: Recipe, config: PreTrainedConfig) -> EncoderProcessor:
        own = {"pretrained": str(folder), "revision": None, "tokenizer": None}
        piece = Piece(self.base, _spec(recipe).model_copy(update=own))
        return SYSTEMS[config.model_type].processor(piece, config)

    def own_files(self, folder: Path) -> dict[str, str]:
        path = folder / ANSWER_LIST
        return {"encoder.answers": str(path.resolve())} if path.is_file() else {}


def _spec(recipe: Recipe) -> Encoder:
    assert recipe.encoder is not None, "the recipe is of another kind"
    return recipe.encoder


def _type_of(piece: Piece[Any]) -> str:
    """A key of `SYSTEMS`: that of a VLE by its own word; what is none is an mPLUG, or said to be no such thing."""
    kind = told(piece).get("model_type")
    return kind if kind in SYSTEMS else MPlugConfig.model_type
