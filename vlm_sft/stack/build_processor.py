"""The processor of a recipe's stack: what its tower, its language model and its resampler bring along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import BaseImageProcessor, BlipImageProcessorPil, PreTrainedTokenizerBase

from ..base.errors import UserError
from ..base.hub import look_for_hub
from ..base.names import IMAGE_TOKEN
from ..batch.processor import QFORMER_TOKENIZER, VLMProcessor, load_qformer_tokenizer
from ..model.configuration import VLMConfig, image_size_of
from ..model.encoder_decoder import answer_start_of
from ..pieces.beside import check_tokenizer
from ..pieces.expected import TOKENIZER, laid_out
from ..pieces.part_configs import load_image_processor, load_tokenizer
from ..pieces.piece import Piece
from ..templates.template import load_template
from .tiles import cut_tiles, processor_class, tiles_of
from .vocabulary import add_words

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import Resampler, VisionTower


def build_processor(recipe: Recipe, config: VLMConfig, pieces: Mapping[str, Piece[Any]]) -> VLMProcessor:
    """Image processor of the vision tower, tokenizer of the language model, the recipe's chat template."""
    assert recipe.chat_template is not None
    tower, lm = pieces["vision_tower"], pieces["language_model"]
    image_processor = cut_tiles(_load_image_processor(tower, config), tower.spec, tower.where)
    config.tiles = tiles_of(image_processor) if tower.spec.tiles else None
    tokenizer = load_tokenizer(lm)
    template = load_template(recipe.chat_template)
    # Counted before the image token and padding are added, which need no row of a table.
    words = add_words(tokenizer, recipe.words, template, [IMAGE_TOKEN])
    processor = processor_class(config)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=template,
        num_image_tokens=config.num_image_tokens,
        pad_to_square=tower.spec.pad_to_square,
        system=recipe.system,
        box_notation=recipe.box_notation,
        answer_start=answer_start_of(lm.config),
    )
    processor.words = words
    resampler = pieces.get("resampler")
    if resampler is not None and resampler.spec.type == "instruct_qformer":
        processor.qformer_tokenizer = _load_qformer_tokenizer(resampler, config)
    return processor


def _load_qformer_tokenizer(piece: Piece[Resampler], config: VLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, at the top of its folder, or the one that lies in the checkpoint."""
    named = piece.spec.tokenizer
    source, revision, subfolder = (named, None, "") if named else (piece.pretrained, piece.revision, QFORMER_TOKENIZER)
    if named and not Path(named).exists():
        look_for_hub()
    check_tokenizer(source, revision, "stack.resampler.tokenizer", subfolder)
    lacking = UserError(
        f"stack.resampler: {source!r} has no tokenizer for the instruction that the "
        f"Q-Former reads; name one under stack.resampler.tokenizer (published: google-bert/bert-base-uncased)."
    )
    if Path(source).is_file():  # a weight file: nothing lies beside it
        raise lacking
    try:
        names = [f"{subfolder}/{name}".lstrip("/") for name in TOKENIZER]
        tokenizer = load_qformer_tokenizer(laid_out(source, revision, piece.key, names), subfolder)
    except UserError:
        raise
    except Exception as error:  # odd values in its files make transformers raise anything
        raise lacking from error
    rows = getattr(config.resampler_config, "vocab_size", 0)
    if len(tokenizer) > rows:
        raise UserError(
            f"stack.resampler.tokenizer: it has {len(tokenizer)} tokens, but the Q-Former knows {rows}; use the "
            f"tokenizer that the Q-Former was trained with."
        )
    return tokenizer


def _load_image_processor(tower: Piece[VisionTower], config: VLMConfig) -> BaseImageProcessor:
    """The tower's own; for layouts without one: bicubic to a square, OpenAI's mean and std (LAVIS, Owl and Qwen-VL)."""
    if tower.is_foreign:
        height, width = image_size_of(config.vision_config)
        return BlipImageProcessorPil(size={"height": height, "width": width})
    return load_image_processor(tower, tower.spec.image_size)
