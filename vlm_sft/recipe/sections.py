"""The model of a recipe: the four parts of a stack, or an existing VLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .recipe_data import RecipeModel

Dtype = Literal["float32", "bfloat16", "float16"]


class _Piece(RecipeModel):
    """What every part of the stack can say about where it comes from."""

    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    trust_remote_code: bool = False
    """Run Python code that a Hub repository brings along. Only for repositories you have read."""


class _Picked(_Piece):
    """A part that can be picked out of files of other layouts."""

    config: dict[str, Any] = Field(default_factory=dict)
    """Sizes that no tensor tells, or in place of those of the checkpoint: `{num_attention_heads: 16}`."""
    more: list[str] = Field(default_factory=list)
    """Further weight files for what the first lacks (MiniGPT-4: the norm after the ViT is in the Q-Former's file)."""


class VisionTower(_Picked):
    """The part that turns an image into patch features."""

    pretrained: str
    """Hub id or folder of any checkpoint that contains a vision encoder, or a weight file of LAVIS or MiniGPT-4."""
    feature_layer: int = -1
    """-1 is the tower's last hidden state after its final norm (BLIP-2); -2 is `hidden_states[-2]` (LLaVA)."""
    feature_select: Literal["full", "patch"] = "full"
    """`full` keeps every token (BLIP-2), `patch` drops the class token (LLaVA)."""
    pad_to_square: bool = False
    """Pad images to a square with the mean colour before resizing (LLaVA-1.5)."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Pixels of a side; a table of positions made for another size is resized (LAVIS: 364). Unset: the checkpoint's."""
    dtype: Dtype | None = None
    """Type of the weights; unset: float32 where trained, else what `sft:` computes in."""


class Resampler(_Picked):
    """The part that turns patch features into a fixed number of query features. Leave it out for LLaVA."""

    type: Literal["qformer", "instruct_qformer", "abstractor", "cross_attention"]
    """`qformer` (BLIP-2), `instruct_qformer` (InstructBLIP: reads the instruction too), `abstractor` (mPLUG-Owl) or
    `cross_attention` (Qwen-VL)."""
    pretrained: str | None = None
    """Hub id or folder of any checkpoint that contains the resampler, or a weight file of LAVIS or MiniGPT-4."""
    tokenizer: str | None = None
    """instruct_qformer: Hub id or folder of its own tokenizer. Unset: `qformer_tokenizer` in the checkpoint."""


class Projector(_Piece):
    """The part that maps features to the width of the language model. Its sizes come from its neighbours."""

    type: Literal["linear", "linear_end", "linear_no_bias", "mlp", "pixel_shuffle"]
    """`linear` (BLIP-2, MiniGPT-4), `mlp` (LLaVA-1.5), `pixel_shuffle` (folds neighbouring patches, then linear),
    `linear_end` (mPLUG-Owl: a learned token ends the image) or `linear_no_bias` (Qwen-VL)."""
    init: Literal["default", "match_embeddings"] = "default"
    """`match_embeddings` scales a new projector's output to the language model's embeddings."""
    depth: Annotated[int, Field(ge=1, le=64)] = 2
    """mlp: number of linear layers."""
    activation: str = "gelu"
    """mlp: the function between the layers, as transformers names it."""
    scale_factor: Annotated[int, Field(ge=1, le=64)] = 2
    """pixel_shuffle: side of the square of patches that becomes one token."""
    pretrained: str | None = None
    """Hub id, folder or file to read the projector from, instead of starting it anew."""


class LanguageModel(_Piece):
    """The causal language model that reads the projected features among its embeddings."""

    pretrained: str
    """Hub id or folder of any causal language model of transformers."""
    dtype: Dtype | None = None
    """Type of the weights; unset: float32 where trained, else what `sft:` computes in."""
    attn_implementation: str | None = None
    """As transformers names it, for example `sdpa` or `flash_attention_2`."""


class Stack(RecipeModel):
    """The four parts, in the order an image passes them."""

    vision_tower: VisionTower
    """Image → patch features."""
    resampler: Resampler | None = None
    """Patch features → a fixed number of query features; leave it out for LLaVA."""
    projector: Projector
    """Features → the width of the language model."""
    language_model: LanguageModel
    """A causal language model, which reads the projected features among its embeddings."""


class PretrainedModel(RecipeModel):
    """An existing VLM of transformers, with its own processor."""

    pretrained: str
    """Hub id or folder: LLaVA-1.5 and 1.6, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, PaliGemma, InternVL, Gemma 3, …"""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Dtype | None = None
    """Type of the weights that are not trained; unset: what `sft:` computes in."""
    attn_implementation: str | None = None
    """As transformers names it, for example `sdpa` or `flash_attention_2`."""
    processor: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's own processor, for example `{max_pixels: 1003520}` (Qwen-VL)."""
