"""The processor of a recipe's stack: what its tower, its language model and its resampler bring along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BlipImageProcessorPil,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)

from ..base.errors import UserError
from ..base.hub import look_for_hub
from ..base.names import CONFIG, IMAGE_TOKEN
from ..base.words import one_line
from ..batch.processor import QFORMER_TOKENIZER, VLMProcessor, load_qformer_tokenizer
from ..model.configuration import VLMConfig, image_size_of
from ..model.encoder_decoder import answer_start_of
from ..pieces.beside import check_growth, check_processor, check_tokenizer
from ..pieces.checkpoints import unreachable
from ..pieces.expected import IMAGES, TOKENIZER, VOCABULARIES, WHOLE, laid_out
from ..pieces.piece import Piece, Spec
from ..recipe.safety import check_picture
from ..systems.chatglm_tokenizer import VOCABULARY, read_tokenizer
from ..templates.template import load_template
from .vocabulary import add_words

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import Resampler, VisionTower

# It needs torchvision in transformers. ViT's does the same, but rounds what it resized: pixels differ by half a step.
LIKE_VIT = "DINOv3ViTImageProcessor"


def build_processor(recipe: Recipe, config: VLMConfig, pieces: Mapping[str, Piece[Any]]) -> VLMProcessor:
    """Image processor of the vision tower, tokenizer of the language model, the recipe's chat template."""
    assert recipe.chat_template is not None
    tower, lm = pieces["vision_tower"], pieces["language_model"]
    image_processor = _load_image_processor(tower, config)
    tokenizer = load_tokenizer(lm)
    template = load_template(recipe.chat_template)
    # Counted before the image token and padding are added, which need no row of a table.
    words = add_words(tokenizer, recipe.words, template, [IMAGE_TOKEN])
    processor = VLMProcessor(
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


def load_tokenizer(lm: Piece[Spec]) -> PreTrainedTokenizerBase:
    """The language model's own; ChatGLM's, which is published with code of its own, is made of its vocabulary."""
    check_tokenizer(lm.place, lm.revision, lm.key)
    try:
        place = laid_out(lm.place, lm.revision, lm.key, TOKENIZER)
        if (Path(place) / VOCABULARY).is_file():
            tokenizer = read_tokenizer(Path(place), lm.where)
            check_growth(json.loads(tokenizer.backend_tokenizer.to_str()), lm.where)
            return tokenizer
        if lm.trusts_code:
            return AutoTokenizer.from_pretrained(lm.place, revision=lm.revision, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(place)
        if tokenizer.vocab_files_names and not any((Path(place) / name).is_file() for name in (WHOLE, *VOCABULARIES)):
            raise ValueError("its class was filled with special tokens alone")
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # odd values in its files make transformers raise anything
        raise unreachable(lm.pretrained, lm.key, "tokenizer") from error


def _load_qformer_tokenizer(piece: Piece[Resampler], config: VLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, at the top of its folder, or the one that lies in the checkpoint."""
    named = piece.spec.tokenizer
    source, revision, subfolder = (named, None, "") if named else (piece.pretrained, piece.revision, QFORMER_TOKENIZER)
    if named and not Path(named).exists():
        look_for_hub()
    check_tokenizer(source, revision, "stack.resampler.tokenizer", subfolder)
    try:
        names = [f"{subfolder}/{name}".lstrip("/") for name in TOKENIZER]
        tokenizer = load_qformer_tokenizer(laid_out(source, revision, piece.key, names), subfolder)
    except UserError:
        raise
    except Exception as error:  # odd values in its files make transformers raise anything
        raise UserError(
            f"stack.resampler: {source!r} has no tokenizer for the instruction that the "
            f"Q-Former reads; name one under stack.resampler.tokenizer (published: google-bert/bert-base-uncased)."
        ) from error
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


def load_image_processor(piece: Piece[Spec], image_size: int | None = None) -> BaseImageProcessor:
    """The image processor that lies beside a checkpoint's weights.

    Args:
        piece: The checkpoint.
        image_size: Side of the square that it is to make, in pixels; None: its own.

    Raises:
        UserError: There is none that can be read.
    """
    try:
        # The PIL backend everywhere: the torchvision one resizes slightly differently, and a bundle must give the
        # same pixels on every machine.
        check_processor(piece.pretrained, piece.revision, piece.key)
        images = _read_image_processor(piece)
        if image_size is not None:
            images = _at_image_size(images, image_size)
        check_picture(images.to_dict(), piece.where)
        return images
    except UserError:
        raise
    except Exception as error:  # odd values in its file make transformers raise anything
        raise UserError(f"{piece.where} has no image processor (preprocessor_config.json).") from error


def _read_image_processor(tower: Piece[Spec]) -> BaseImageProcessor:
    place, options = tower.pretrained, {"revision": tower.revision, "trust_remote_code": True}
    if not tower.trusts_code:
        place, options = laid_out(place, tower.revision, tower.key, (CONFIG, *IMAGES)), {}
    try:
        return AutoImageProcessor.from_pretrained(place, backend="pil", **options)
    except ImportError as error:  # the class has no side that works with PIL
        settings, _ = BaseImageProcessor.get_image_processor_dict(place, revision=options.get("revision"))
        if not str(settings.get("image_processor_type")).startswith(LIKE_VIT):
            raise UserError(
                f"{tower.key}: the image processor of {tower.pretrained!r} cannot be used here ({one_line(error)}); "
                f"write a preprocessor_config.json for one that needs Pillow alone, such as ViTImageProcessor."
            ) from error
        return ViTImageProcessorPil.from_dict(settings)


def _at_image_size(images: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """The image processor for a square of `size` pixels; a margin that it cuts off keeps its share."""
    settings = images.to_dict()
    square = {"height": size, "width": size}
    if (edge := settings["size"].get("shortest_edge")) is None:
        return type(images).from_dict({**settings, "size": square})
    cropped = settings.get("crop_size") or {"height": edge}
    return type(images).from_dict(
        {**settings, "size": {"shortest_edge": round(size * edge / cropped["height"])}, "crop_size": square}
    )
