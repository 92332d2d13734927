"""Configuration of the composed model, and the sizes that follow from its pieces."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class VLMConfig(PreTrainedConfig):
    """What the composed model is made of; the sizes are those of the pieces.

    Args:
        vision_config: Configuration of the vision tower.
        text_config: Configuration of the causal language model.
        resampler_config: Configuration of the resampler, or None where there is none.
        resampler_type: A key of `connectors.RESAMPLERS`, or None.
        num_query_tokens: Tokens an image has after the resampler; ignored without one.
        projector_type: A key of `connectors.PROJECTORS`.
        projector_options: Options of that projector beside its two widths.
        vision_feature_layer: -1 takes the tower's `last_hidden_state` (after its final norm), any other number takes
            `hidden_states[number]` (LLaVA: -2).
        vision_feature_select: `full` keeps every token, `patch` drops the class token in front (LLaVA).
        vision_width: Width of the tower's features, where it is not the `hidden_size` of its configuration.
        image_token_id: Id of the placeholder. It may lie beyond the embedding matrix: it is never looked up.
        num_image_tokens: T, for the processor and for checks; those of a tile, where images are cut into tiles.
        tiles: How images are cut, or None: their `type`; of `anyres` its `side` in pixels and `grids`, (height, width)
            in pixels each, as `TileLayout` takes them; of `dynamic` the `max` of tiles.
    """

    model_type = "vlm_sft"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "resampler_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_qformer", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    resampler_config: dict | PreTrainedConfig | None = None
    resampler_type: str | None = None
    num_query_tokens: int = 32
    projector_type: str = "linear"
    projector_options: dict | None = None
    vision_feature_layer: int = -1
    vision_feature_select: str = "full"
    vision_width: int | None = None
    image_token_id: int = 0
    num_image_tokens: int = 0
    tiles: dict | None = None
    tie_word_embeddings: bool = False

    @property
    def projector_widths(self) -> tuple[int, int]:
        """(width that arrives at the projector, width of the language model's embeddings)."""
        assert isinstance(self.text_config, PreTrainedConfig)
        width = getattr(self.resampler_config, "hidden_size", 0) if self.resampler_type else self.tower_width
        return width, text_width_of(self.text_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of the language model; of its decoder, for a cache, with as many layers as that has."""
        text = super().get_text_config(decoder, encoder)
        if decoder and not encoder and self.is_encoder_decoder:
            text = copy.deepcopy(text)
            text.num_hidden_layers = text.num_decoder_layers
        return text

    @property
    def tower(self) -> PreTrainedConfig:
        """`vision_config`, which is no mapping any more once the configuration is made."""
        assert isinstance(self.vision_config, PreTrainedConfig)
        return self.vision_config

    @property
    def tower_width(self) -> int:
        """Width of the tower's features."""
        return self.vision_width or self.tower.hidden_size


def text_width_of(config: PreTrainedConfig) -> int:
    """Width of the token embeddings (OPT-350M embeds narrower than it computes)."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def image_size_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) in pixels that a vision configuration was made for."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blank_size(config: VLMConfig, projector: object) -> tuple[int, int]:
    """(height, width) in pixels of an image that the whole image path takes.

    Images may be shown in another size than the tower was made for, and a projector that folds squares of patches does
    not take every grid.
    """
    folded = getattr(projector, "scale_factor", 1)
    patch = getattr(config.tower, "patch_size", None)
    if folded == 1 or not isinstance(patch, int) or not config.num_image_tokens:
        return image_size_of(config.tower)
    side = math.isqrt(config.num_image_tokens) * folded * patch
    return side, side


def count_patches(config: PreTrainedConfig, height: int, width: int) -> int:
    """Patches of an image of this size in pixels. What a tower gives before them are class and register tokens.

    0 where the tower has no one size of patches: it gives a grid, with nothing before it.
    """
    if getattr(config, "patch_size", None) is None:
        return 0
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return (height // patch) * (width // patch)
