"""VLE, a vision-language encoder: DeBERTa's text and CLIP's image, read together by pairs of cross layers.

iFLYTEK and HFL 2023, upstream: `models/VLE` of iflytek/VLE. The names are those of its checkpoints; transformers has no
class for it. What is asked of it (an answer, a match) is one of the heads in `vle_heads`.

Legend of shapes: B rows, L text tokens, P patches of an image, N boxes, T, V and D widths of text, image and both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..base.names import Json
from .cross_layers import CrossLayer, added


class VLEConfig(PreTrainedConfig):
    """Sizes of a VLE, under the names of its `config.json`; the defaults are those of VLE-base.

    Attributes:
        text_config: Of the text encoder, a DeBERTa.
        vision_config: Of the image encoder: CLIP's, or a whole CLIP of which its part is taken.
        num_token_types: Kinds of tokens that are told apart: text, image, and where boxes are given one for each.
        id2label: Number → answer, of a model that answers questions.
        trained_for: What a recipe trains it for, a key of `encoders.vle.MODELS`.
    """

    model_type = "vle"
    sub_configs: ClassVar[Json] = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    text_config: Any = None  # a mapping in a file, a configuration once it is read; so is the next
    vision_config: Any = None
    num_token_types: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    num_vqa_labels: int | None = None
    trained_for: str = "vqa"
    is_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "deberta-v2", **self.text_config})
        if isinstance(self.vision_config, dict):
            sizes = dict(self.vision_config)
            if sizes.get("model_type") == "clip":
                sizes = dict(sizes.get("vision_config") or {})
            sizes.pop("model_type", None)
            self.vision_config = CLIPVisionConfig(**sizes)
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """P of an image of the size that the model reads."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


@dataclass
class VLEOutput(ModelOutput):
    """What `VLEModel` returns.

    Attributes:
        pooler_output: (B, 2·D), the first token of the text and of the image, each through its own layer.
        text_embeds: (B, L, D).
        image_embeds: (B, 1 + P + N, D): the class token, the patches, the boxes.
    """

    pooler_output: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


@dataclass
class Boxes:
    """Places in an image that have a token of their own each, and the types by which text and image name them.

    Attributes:
        patches: (B, N, P), True for the patches that a box covers; a row without any is padding.
        image_types: (B, N) token type of each box, 0 for padding.
        text_types: (B, L) token type of each token of the text.
    """

    patches: torch.Tensor
    image_types: torch.Tensor
    text_types: torch.Tensor

    def means(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 1 + P, D) tokens of images → (B, N, D), the mean of the patches of each box; zeros for padding."""
        patches = self.patches.to(image.dtype)
        return patches @ image[:, 1:] / patches.sum(-1, keepdim=True).clamp(min=1)

    @property
    def present(self) -> torch.Tensor:
        """(B, N), whether there is a box."""
        return self.patches.any(-1)


class Pooler(nn.Module):
    """The first token of a stream through a layer and tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """(B, S, D) → (B, D)."""
        return torch.tanh(self.dense(stream[:, 0]))


class VLEPreTrainedModel(PreTrainedModel):
    """Common base: names and abilities."""

    config_class = VLEConfig
    config: VLEConfig
    base_model_prefix = "vle"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CrossLayer", "CLIPEncoderLayer", "DebertaV2Layer"]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]


class VLEModel(VLEPreTrainedModel):
    """VLE without a head."""

    def __init__(self, config: VLEConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        # transformers' towers have lost this level of their names, which the checkpoints keep.
        self.vision_model = nn.ModuleDict({"vision_model": CLIPVisionModel(config.vision_config)})
        self.text_model = AutoModel.from_config(config.text_config)
        self.text_projection_layer = nn.Linear(config.text_config.hidden_size, width)
        self.image_projection_layer = nn.Linear(config.vision_config.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, width)
        layers = range(config.num_hidden_layers)
        self.cross_modal_image_layers = nn.ModuleList(CrossLayer(config) for _ in layers)
        self.cross_modal_text_layers = nn.ModuleList(CrossLayer(config) for _ in layers)
        self.cross_modal_image_pooler = Pooler(width)
        self.cross_modal_text_pooler = Pooler(width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.text_model.get_input_embeddings()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 1 + P, V), every token through the norm that CLIP keeps for its first."""
        tower = self.vision_model["vision_model"]
        return tower.post_layernorm(tower(pixel_values=pixel_values).last_hidden_state)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, L) ids and mask → (B, L, T)."""
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boxes: Boxes | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> VLEOutput:
        """Reads texts with their images.

        Args:
            input_ids: (B, L) token ids.
            pixel_values: (B, 3, H, W).
            attention_mask: (B, L), 1 for tokens and 0 for padding; None for tokens alone.
            boxes: Places that have tokens of their own.
            image_features: (B, 1 + P, V) as `get_image_features` gives them, in place of pixels.
            **kwargs: Nothing else is read.

        Raises:
            ValueError: Not one of pixels and features is given.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Give either pixel_values or image_features.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        image_features = self.get_image_features(pixel_values) if image_features is None else image_features
        image = self.image_projection_layer(image_features)
        text = self.text_projection_layer(self.get_text_features(input_ids, attention_mask))
        image_types = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        text_types, image_mask = torch.zeros_like(input_ids), image_types
        if boxes is not None:
            image = torch.cat([image, boxes.means(image)], dim=1)
            image_types = torch.cat([image_types, boxes.image_types], dim=1)
            image_mask = torch.cat([image_mask, boxes.present.long()], dim=1)
            text_types = boxes.text_types
        text = text + self.token_type_embeddings(text_types)
        image = image + self.token_type_embeddings(image_types)
        text_mask, image_mask = added(attention_mask, text.dtype), added(image_mask, text.dtype)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = (
                text_layer(text, text_mask, image, image_mask),
                image_layer(image, image_mask, text, text_mask),
            )
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return VLEOutput(pooler_output=pooled, text_embeds=text, image_embeds=image)


AutoConfig.register(VLEConfig.model_type, VLEConfig)
AutoModel.register(VLEConfig, VLEModel)
