"""Whether a recipe or a bundle is of a stack, an existing VLM or an encoder, asked here alone; how a stack is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..base.errors import UserError, refused_by_library
from ..base.names import PROCESSOR_CONFIG, TEMPLATE, Json, Values
from ..batch.collator import MultimodalCollator
from ..batch.processor import QFORMER_TOKENIZER, VLMProcessor
from ..encoders.kind import EncoderKind
from ..families.build_family import FamilyKind
from ..families.kind import Composed, Kind
from ..model.modeling import VLMForConditionalGeneration
from ..model.parts import Cached, Parts, empty_part, projector_of
from ..model.positions import cast
from ..pieces.beside import check_processor, check_tokenizer
from ..pieces.expected import IMAGES, TOKENIZER, laid_out
from ..pieces.gguf_files import unpacking
from ..pieces.load_parts import load_language_model, load_projector_weights, load_resampler, load_vision_tower
from ..pieces.piece import specs_of
from ..pieces.quantization import quantise_empty
from ..recipe.libraries import build_quantization_config
from ..templates.template import learns_last_alone
from .compose import check_image_size, compose_stack
from .precision import precision_warning
from .tiles import processor_class, tiles_of
from .vocabulary import add_words

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


class StackKind:
    """A stack of parts as `Kind` has it, where each method is said; LoRA goes into its language model."""

    base = "language_model"
    collator = MultimodalCollator
    covers: tuple[str, ...] = ("language_model",)
    # The projector lies in the bundle, whatever it began with.
    settled: Values = {"stack.projector.pretrained": None, "stack.projector.init": "default"}

    def compose(self, recipe: Recipe) -> Composed:
        return compose_stack(recipe)

    def remarks(self, recipe: Recipe, composed: Composed) -> Iterator[str]:
        language_model = composed.pieces["language_model"].pretrained
        for token in composed.processor.added_tokens:
            yield f"The tokenizer of {language_model} had no {token} token: it was added (no embedding is)."
        by_encoder = composed.processor.answer_start is not None
        if by_encoder or learns_last_alone(str(composed.processor.chat_template)):
            yield (
                f"chat_template {recipe.chat_template}: of several answers in a row, only the last is learned; "
                f"give each answer a row of its own, with the turns before it, to learn them all."
            )
        for piece in composed.pieces.values():
            if piece.is_gguf:
                yield f"{piece.section}: {unpacking(piece.pretrained, piece.key)}"
            if piece.trusts_code:
                yield f"{piece.section}.trust_remote_code is on: code from {piece.pretrained} is executed."
        if warning := precision_warning(recipe, composed.config):
            yield warning

    def load(
        self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]
    ) -> VLMForConditionalGeneration:
        config, pieces = composed.config, composed.pieces
        tower: nn.Module
        resampler: nn.Module | None = None
        if "vision_tower" in composed.cached:
            tower = Cached(empty_part(config, "vision_tower").to(dtypes["vision_tower"]), composed.features)
        else:
            tower = load_vision_tower(pieces["vision_tower"], dtypes["vision_tower"])
        if "resampler" in composed.cached:
            resampler = Cached(empty_part(config, "resampler"), composed.features)
        elif "resampler" in pieces:
            resampler = load_resampler(pieces["resampler"])
        projector = projector_of(config)
        if (spec := recipe.parts.projector).pretrained:
            load_projector_weights(projector, spec.pretrained, spec.revision)
        dtype = dtypes["language_model"]
        options = {"quantization_config": build_quantization_config(recipe, str(dtype).removeprefix("torch."))}
        language_model = load_language_model(pieces["language_model"], dtype, **options)
        return VLMForConditionalGeneration(config, Parts(tower, resampler, projector, language_model))

    def empty(
        self, recipe: Recipe, composed: Composed, dtypes: Mapping[str, torch.dtype]
    ) -> VLMForConditionalGeneration:
        with torch.device("meta"):
            model = VLMForConditionalGeneration(composed.config)
        for part in ("vision_tower", "language_model"):
            getattr(model.model, part).to(dtypes[part])
        model.lm_head.to(dtypes["language_model"])
        if (quantised := build_quantization_config(recipe)) is not None:
            quantise_empty(model.model.language_model, quantised, dtypes["language_model"])
        return model

    def cast(self, model: PreTrainedModel, recipe: Recipe, dtypes: Mapping[str, torch.dtype]) -> None:
        for part in ("vision_tower", "language_model"):
            cast(getattr(model.model, part), dtypes[part])
        model.lm_head.to(dtypes["language_model"])

    def with_base(self, recipe: Recipe, changes: Values) -> Recipe:
        # The checkpoint needs no code of others any more.
        changed = recipe.parts.language_model.model_copy(update={**changes, "trust_remote_code": False})
        return recipe.model_copy(update={"stack": recipe.parts.model_copy(update={"language_model": changed})})

    def held(self, entries: Mapping[str, Json]) -> set[str]:
        # The projector is in no piece, also where only LoRA is trained.
        return {"projector", *(part for part, entry in entries.items() if "init_from" in entry)}

    def mark_taken(self, entries: dict[str, Json], parts: Collection[str], folder: str) -> None:
        for part in set(parts) & set(entries):
            entries[part]["init_from"] = folder

    def own_files(self, folder: Path) -> dict[str, str]:
        return {"chat_template": str((folder / TEMPLATE).resolve())}

    def read_processor(self, folder: Path, recipe: Recipe, config: PreTrainedConfig) -> VLMProcessor:
        check_processor(str(folder), None, "processor")
        for subfolder in ("", QFORMER_TOKENIZER):
            check_tokenizer(str(folder), None, "processor", subfolder)
        inner = (f"{QFORMER_TOKENIZER}/{name}" for name in TOKENIZER)
        place = laid_out(str(folder), None, "processor", (*TOKENIZER, *IMAGES, TEMPLATE, *inner))
        processor = processor_class(config).from_pretrained(place, trust_remote_code=False)
        if processor.num_image_tokens != config.num_image_tokens:
            raise UserError(
                f"{str(folder)!r}: {PROCESSOR_CONFIG} says that an image is {processor.num_image_tokens:,} tokens, but "
                f"the model makes {config.num_image_tokens:,} of one; the bundle is not whole."
            )
        check_image_size(config, processor, str(folder))
        if config.tiles != tiles_of(processor.image_processor):
            raise UserError(f"{str(folder)!r}: its processor cuts images otherwise than its recipe; it is not whole.")
        return processor


def kind_of(pieces: Collection[str]) -> Kind:
    """The kind of a model by the names of its pieces, as `specs_of` gives them for a recipe and a manifest lists them.

    A bundle that was saved without its recipe names none, and is a stack's.
    """
    return FamilyKind() if "model" in pieces else EncoderKind() if "encoder" in pieces else StackKind()


def compose(recipe: Recipe) -> Composed:
    """Configuration, processor and pieces of a recipe's model, from small files alone.

    Under ZeRO-3 transformers would cut every model while it is made, as soon as the trainer's settings are. From here
    on models are made whole, because sizes are checked and fingerprints taken; DeepSpeed cuts when training starts.

    Raises:
        UserError: A piece cannot be had, or two do not fit.
    """
    with refused_by_library("The base pieces cannot be put together from what their files say; fetch them again"):
        unset_hf_deepspeed_config()
        composed = kind_of(specs_of(recipe)).compose(recipe)
    if not (processor := composed.processor).words:  # a stack's were added before its image token
        template = str(processor.chat_template)
        processor.words = add_words(processor.tokenizer, recipe.words, template, processor.control_tokens)
    return composed
