"""A stack before any weight is read: its configuration and processor, every size checked against the next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import PreTrainedConfig

from ..base.errors import UserError, refused_by_library
from ..base.limits import limits
from ..batch.processor import VLMProcessor
from ..families.kind import Composed
from ..model.configuration import VLMConfig, image_size_of
from ..model.encoder_decoder import is_language_model, reads_by_encoder
from ..model.parts import projector_of
from ..model.positions import INTERPOLATING
from ..pieces.part_configs import find_pieces
from .build_processor import build_processor
from .fit import check_language_model, count_features, measure_tower, refuse_for_encoder
from .tiles import check_tiles, most_tokens, refuse_beside_tiles

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


def compose_stack(recipe: Recipe) -> Composed:
    """Configuration, processor and pieces of a stack, from small files alone; every width is checked here.

    Raises:
        UserError: A piece cannot be had, or two do not fit.
    """
    stack, pieces = recipe.parts, find_pieces(recipe)
    tower, text = pieces["vision_tower"], pieces["language_model"]
    if not is_language_model(text.config) and not text.trusts_code:
        raise UserError(f"{text.key}: a {text.config.model_type!r} checkpoint is no causal language model.")
    if not text.trusts_code:
        check_language_model(text.config, text.key)
    if by_encoder := reads_by_encoder(text.config):
        refuse_for_encoder(recipe, text.config.model_type)
    config = VLMConfig(
        vision_config=tower.config,
        text_config=text.config,
        projector_type=stack.projector.type,
        projector_options=stack.projector.options,
        vision_feature_layer=tower.spec.feature_layer,
        vision_feature_select=tower.spec.feature_select,
        is_encoder_decoder=by_encoder,
    )
    if (resampler := pieces.get("resampler")) is not None:
        config.resampler_config, config.resampler_type = resampler.config, resampler.spec.type
        config.num_query_tokens = resampler.num_query_tokens
    _check_feature_layer(tower.spec.feature_layer, tower.config)
    refuse_beside_tiles(recipe)
    processor = build_processor(recipe, config, pieces)
    with refused_by_library(f"{tower.key}: the image processor of {tower.pretrained!r} cannot be used"):
        size = check_image_size(config, processor, tower.pretrained)
    if (width := measure_tower(config, *size, tower.key)) != getattr(tower.config, "hidden_size", None):
        config.vision_width = width
    if resampler is not None and (reads := resampler.config.encoder_hidden_size) != config.tower_width:
        raise UserError(
            f"The vision tower gives features of width {config.tower_width} but the resampler of "
            f"{resampler.pretrained!r} reads width {reads}; take both from the same checkpoint, or leave the resampler "
            f"out and use an mlp projector."
        )
    config.num_image_tokens = processor.num_image_tokens = count_image_tokens(config, size)
    check_tiles(config, size)
    if (tokens := most_tokens(config)) > (most := limits().image_tokens):
        less = "a resampler or a smaller image_size" if config.tiles is None else "smaller tile_grids or max_tiles"
        raise UserError(
            f"stack: an image becomes {tokens:,} tokens, but `limits.image_tokens` is {most:,}; use {less}, or raise "
            f"the limit."
        )
    config.image_token_id = processor.image_token_id
    return Composed(config, processor, pieces)


def _check_feature_layer(layer: int, vision_config: PreTrainedConfig) -> None:
    """`hidden_states` has one entry before the first layer and one after each."""
    layers = getattr(vision_config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= layer <= layers:
        raise UserError(
            f"stack.vision_tower.feature_layer is {layer}, but the vision tower has {layers} layers: use -1 (after its "
            f"final norm), or a number from {-layers - 1} to {layers}."
        )


def check_image_size(config: VLMConfig, processor: VLMProcessor, name: str) -> tuple[int, int]:
    """(height, width) in pixels that the image processor gives, found by sending two blank images through it.

    Raises:
        UserError: The size depends on the image, or is not the one that the tower was made for. Some towers raise
            nothing then and read wrong positions (BLIP-2's takes the first rows of its position table).
    """
    key = "stack.vision_tower.pretrained"
    try:
        pixels = [processor.encode_images([Image.new("RGB", shape)]) for shape in ((96, 64), (64, 96))]
        sizes = {tuple(each.shape[1:]) for each in pixels if each is not None}
        ((_, height, width),) = sizes  # one shape for all pictures, of four dimensions
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{key}: the image processor of {name!r} does not turn each image into one picture of a fixed size; give "
            f"it a fixed size in preprocessor_config.json, or say stack.vision_tower.tiles where it cuts tiles."
        ) from error
    vision_config: Any = config.vision_config
    if getattr(vision_config, "image_size", None) is None:
        vision_config.image_size = [height, width]
    wanted = image_size_of(vision_config)
    if (height, width) != wanted and vision_config.model_type not in INTERPOLATING:
        raise UserError(
            f"{key}: the image processor of {name!r} gives images of {height}×{width} pixels but its vision tower was "
            f"made for {wanted[0]}×{wanted[1]}; correct the size in preprocessor_config.json, "
            f"or state stack.vision_tower.image_size, which resizes the table of positions."
        )
    return height, width


def count_image_tokens(config: VLMConfig, size: tuple[int, int] | None = None) -> int:
    """Tokens that an image becomes, found by sending an empty image through an empty image path.

    Args:
        config: Configuration of the stack.
        size: (height, width) of the image in pixels; default what the tower was made for.

    Raises:
        UserError: The resampler or the projector cannot take this number of patches.
    """
    height, width = size or image_size_of(config.vision_config)
    with torch.device("meta"):
        if config.resampler_type == "cross_attention":
            features = count_features(config, height, width)
            if math.isqrt(features) ** 2 != features:
                raise UserError(
                    f"stack.resampler: cross_attention gives each feature a place in a square, but the vision tower "
                    f"gives {features} features an image; set stack.vision_tower.feature_select: patch, which drops a "
                    f"class token."
                )
        tokens = config.num_query_tokens if config.resampler_type else count_features(config, height, width)
        return projector_of(config)(torch.empty(1, tokens, config.projector_widths[0])).shape[1]
