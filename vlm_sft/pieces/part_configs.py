"""What stands beside the weights of a part: its configuration, or shapes of tensors; its tokenizer, its images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)

from ..base.errors import UserError
from ..base.names import CONFIG, Values
from ..base.words import one_line
from ..model.encoder_decoder import OWN_HEAD, is_language_model, reads_by_encoder
from ..model.positions import INTERPOLATING
from ..recipe.passed_on import is_plain
from ..recipe.safety import check_config, check_picture
from ..systems import chatglm  # noqa: F401  # which makes its class known to transformers
from ..systems.chatglm_tokenizer import VOCABULARY, read_tokenizer
from .beside import check_growth, check_processor, check_tokenizer
from .checkpoints import unreachable
from .expected import IMAGES, TOKENIZER, VOCABULARIES, WHOLE, laid_out
from .layouts import Shapes, at, detect
from .piece import FOREIGN, Piece, Spec, specs_of

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import LanguageModel, PretrainedModel, Resampler, VisionTower


# It needs torchvision in transformers. ViT's does the same, but rounds what it resized: pixels differ by half a step.
LIKE_VIT = "DINOv3ViTImageProcessor"

# LLaVA's own checkpoints are those of a language model with a projector beside it, under another model type.
LLAVA_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA_MARK = "mm_hidden_size"
# How larger checkpoints name a language model inside them → what its own class calls its tensors: BLIP-2, InstructBLIP
# and LLaVA as they are published, mPLUG-Owl; LAVIS and MiniGPT-4; and LLaVA as transformers 5 saves it.
LANGUAGE_MODEL_NAMES = {
    r"^(language_model|llm_model|llama_model|opt_model|t5_model)\.": "",
    r"^model\.language_model\.": "model.",
}


def find_language_model(spec: LanguageModel) -> Piece[LanguageModel]:
    """The piece that is a language model, or holds one: LLaVA's, BLIP-2's, mPLUG-Owl's.

    Raises:
        UserError: It cannot be had, or holds no causal language model.
    """
    piece = Piece("language_model", spec)
    raw = piece.raw
    if LLAVA_MARK in raw and raw.get("model_type") in LLAVA_MODEL_TYPES:  # as LLaVA's own code wrote it
        sizes = {name: value for name, value in raw.items() if name != "model_type" and not name.startswith("mm_")}
        piece.config, piece.renamed = AutoConfig.for_model(LLAVA_MODEL_TYPES[raw["model_type"]], **sizes), {}
        return piece
    if raw.get("model_type") in FOREIGN and "text_config" in raw:  # mPLUG-Owl
        piece.config, piece.renamed = AutoConfig.for_model(**raw["text_config"]), LANGUAGE_MODEL_NAMES
        return piece
    piece.config = piece.whole.get_text_config()
    if piece.config is piece.whole or type(piece.whole) in AutoModelForCausalLM._model_mapping:
        return _with_own_head(piece)
    if not is_language_model(piece.config):
        raise UserError(f"{piece.key}: a {piece.config.model_type!r} checkpoint is no causal language model.")
    piece.renamed = LANGUAGE_MODEL_NAMES
    said = getattr(piece.whole, "tie_word_embeddings", False) and not piece.config.tie_word_embeddings
    if said and not any(name.endswith("lm_head.weight") for name in piece.checkpoint.files):
        piece.config.tie_word_embeddings = True  # InternVL says it of the whole alone
    return _with_own_head(piece)


def _with_own_head(piece: Piece[LanguageModel]) -> Piece[LanguageModel]:
    """Notes whether an encoder–decoder has a head of its own (FlanT5), which its configuration does not say."""
    if reads_by_encoder(piece.config):
        if piece.is_gguf:
            raise UserError(f"{piece.where}: a {piece.config.model_type} model is not read from GGUF; name a folder.")
        last = {name.rpartition(".")[0].rpartition(".")[2] for name in piece.checkpoint.files}
        setattr(piece.config, OWN_HEAD, {"lm_head", "shared"} <= last)
    return piece


def find_vision_tower(spec: VisionTower) -> Piece[VisionTower]:
    """The piece that is a vision tower, or holds one.

    Raises:
        UserError: There is no vision tower in the checkpoint, or its sizes cannot be told.
    """
    piece = Piece("vision_tower", spec)
    if piece.is_foreign:
        config = _from_shapes(piece, "vision_tower", spec.config)[0]
    else:
        config = state(vision_config_of(piece.whole, piece.key), spec.config, piece.section)
    piece.config = _at_image_size(config, spec.image_size, piece.section)
    return piece


def _at_image_size(config: PreTrainedConfig, size: int | None, key: str) -> PreTrainedConfig:
    check_config({"image_size": size}, key, "the recipe")
    if size is None or config.model_type in INTERPOLATING or not hasattr(config, "patch_size"):
        return config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    if size % patch:
        raise UserError(
            f"{key}.image_size is {size}, but the tower cuts images into patches of {patch} pixels: use a multiple, "
            f"like {max(size // patch, 1) * patch}."
        )
    config.image_size = size
    return config


QFORMER_KINDS = {"blip_2_qformer": "qformer", "instructblip_qformer": "instruct_qformer"}


def find_resampler(spec: Resampler) -> Piece[Resampler]:
    """The piece that holds a resampler, with its number of query tokens.

    Raises:
        UserError: There is none of this type in the checkpoint, or its sizes cannot be told.
    """
    piece = Piece("resampler", spec)
    if piece.is_foreign:
        piece.config, piece.num_query_tokens = _from_shapes(piece, spec.type, spec.config)
        return piece
    qformer = getattr(piece.whole, "qformer_config", None)
    if qformer is None:
        raise UserError(
            f"{piece.key}: a {piece.whole.model_type!r} checkpoint holds no Q-Former; name a BLIP-2 checkpoint."
        )
    if (kind := QFORMER_KINDS.get(qformer.model_type)) != spec.type:
        raise UserError(
            f"{piece.section}.type: the checkpoint {piece.pretrained!r} holds a resampler of the type {kind}, not "
            f"{spec.type}."
        )
    piece.config, piece.num_query_tokens = state(qformer, spec.config, piece.section), piece.whole.num_query_tokens
    return piece


def find_model(spec: PretrainedModel) -> Piece[PretrainedModel]:
    """The piece that is an existing VLM.

    Raises:
        UserError: It cannot be had.
    """
    piece = Piece("model", spec)
    piece.config = piece.whole
    return piece


FINDERS: dict[str, Callable[[Any], Piece[Any]]] = {
    "vision_tower": find_vision_tower,
    "resampler": find_resampler,
    "language_model": find_language_model,
    "model": find_model,
}


def find_pieces(recipe: Recipe) -> dict[str, Piece[Any]]:
    """Part → its piece, of every part that a recipe takes from a checkpoint."""
    return {part: FINDERS[part](spec) for part, spec in specs_of(recipe).items()}


def vision_config_of(config: PreTrainedConfig, key: str) -> PreTrainedConfig:
    """The configuration of the vision tower inside `config`, which may be that of a larger model.

    Raises:
        UserError: There is no vision tower in it.
    """
    vision = getattr(config, "vision_config", None) or config
    if isinstance(vision, dict):  # a mapping: the configuration is none of transformers' own
        raise UserError(f"{key}: transformers has no class for the vision tower of a {config.model_type!r} checkpoint.")
    if not hasattr(vision, "num_channels") and not (hasattr(vision, "image_size") and hasattr(vision, "patch_size")):
        raise UserError(f"{key}: a {config.model_type!r} checkpoint holds no vision tower; name a ViT, CLIP, SigLIP, …")
    return vision


def state(config: PreTrainedConfig, stated: Values, key: str) -> PreTrainedConfig:
    """Puts what the recipe states under `config` in place of what the checkpoint says.

    Raises:
        UserError: The configuration has no such setting, or none that is a size, a switch or a word.
    """
    general = vars(PreTrainedConfig())  # dtypes, kernels and names of classes build no part
    for name, value in stated.items():
        if not hasattr(config, name) or name in general or name.startswith("_") or callable(getattr(config, name)):
            raise UserError(f"{key}.config: a {type(config).__name__} has no setting {name!r}.")
        if not is_plain(value):
            raise UserError(f"{key}.config: `{name}` takes numbers and words, not {value!r}.")
        try:
            setattr(config, name, value)
        except Exception as error:  # transformers checks some types when a value is set
            raise UserError(f"{key}.config: `{name}` cannot be {value!r}: {one_line(error)}") from error
    check_config(dict(stated), f"{key}.config", "it")
    return config


def _from_shapes(piece: Piece[Spec], kind: str, stated: Values) -> tuple[PreTrainedConfig, int]:
    """Sizes of a part in a bare weight file, and (of a resampler) its number of query tokens."""
    checkpoint, where = piece.checkpoint, f"{piece.key}: the file {piece.pretrained!r}"
    found = detect(kind, checkpoint.files)
    if found is None:
        raise UserError(
            f"{where} holds no {kind} in a layout that is known here, so its sizes cannot be told; name a folder with "
            f"config.json, or a LAVIS or MiniGPT-4 file."
        )
    layout, prefix = found
    sizes = piece.raw.get(layout.section) if layout.section and not Path(piece.pretrained).is_file() else None
    if isinstance(sizes, Mapping) and "num_attention_heads" in sizes:
        stated = {"num_attention_heads": sizes["num_attention_heads"], **stated}
    rows = at(layout.rows, prefix)
    found_shapes = checkpoint.shapes(name for name in checkpoint.files if name.startswith(prefix) or name == rows)
    shapes: Shapes = {name.removeprefix(prefix): s for name, s in found_shapes.items()}
    try:
        config = layout.configure(shapes, stated)
        return state(config, stated, piece.section), found_shapes[rows][-2] if layout.rows else 0
    except KeyError as error:
        raise UserError(
            f"{where} holds a {piece.part} without its tensor {error.args[0]!r}, so its sizes cannot be told; is it "
            f"whole?"
        ) from error


def load_tokenizer(piece: Piece[Any]) -> PreTrainedTokenizerBase:
    """A checkpoint's own; ChatGLM's, which is published with code of its own, is made of its vocabulary.

    Raises:
        UserError: There is none that can be read.
    """
    check_tokenizer(piece.place, piece.revision, piece.key)
    try:
        place = laid_out(piece.place, piece.revision, piece.key, TOKENIZER)
        if (Path(place) / VOCABULARY).is_file():
            tokenizer = read_tokenizer(Path(place), piece.where)
            check_growth(json.loads(tokenizer.backend_tokenizer.to_str()), piece.where)
            return tokenizer
        if piece.trusts_code:
            return AutoTokenizer.from_pretrained(piece.place, revision=piece.revision, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(place)
        if tokenizer.vocab_files_names and not any((Path(place) / name).is_file() for name in (WHOLE, *VOCABULARIES)):
            raise ValueError("its class was filled with special tokens alone")
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # whatever odd values in its files meet there
        raise unreachable(piece.pretrained, piece.key, "tokenizer") from error


def load_image_processor(piece: Piece[Any], image_size: int | None = None) -> BaseImageProcessor:
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
            images = _images_at(images, image_size)
        check_picture(images.to_dict(), piece.where)
        return images
    except UserError:
        raise
    except Exception as error:  # whatever odd values in its file meet there
        raise UserError(f"{piece.where} has no image processor (preprocessor_config.json).") from error


def _read_image_processor(tower: Piece[Any]) -> BaseImageProcessor:
    place, options = tower.pretrained, {"revision": tower.revision, "trust_remote_code": True}
    if not tower.trusts_code:
        place, options = laid_out(place, tower.revision, tower.key, (CONFIG, *IMAGES)), {}
    try:
        return AutoImageProcessor.from_pretrained(place, backend="pil", **options)
    except ImportError as error:  # a class that has no PIL side
        settings, _ = BaseImageProcessor.get_image_processor_dict(place, revision=options.get("revision"))
        if not str(settings.get("image_processor_type")).startswith(LIKE_VIT):
            raise UserError(
                f"{tower.key}: the image processor of {tower.pretrained!r} cannot be used here ({one_line(error)}); "
                f"write a preprocessor_config.json for one that needs Pillow alone, such as ViTImageProcessor."
            ) from error
        return ViTImageProcessorPil.from_dict(settings)


def _images_at(images: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """The image processor for a square of `size` pixels; a margin that it cuts off keeps its share."""
    settings = images.to_dict()
    square = {"height": size, "width": size}
    if (edge := settings["size"].get("shortest_edge")) is None:
        return type(images).from_dict({**settings, "size": square})
    cropped = settings.get("crop_size") or {"height": edge}
    return type(images).from_dict(
        {**settings, "size": {"shortest_edge": round(size * edge / cropped["height"])}, "crop_size": square}
    )
