"""How publishers name the tensors of a part: tables, one entry a layout.

A checkpoint in the layout of transformers needs no entry: there the tensors of a part stand under one prefix, with the
names of our own modules, and `config.json` states the sizes. An entry says for any other layout how our names become
theirs, and how the sizes follow from the shapes of the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Blip2QFormerConfig, Blip2VisionConfig, InstructBlipQFormerConfig, PreTrainedConfig

from ..base.errors import UserError
from ..model.mplug_owl import MPLUGOwlAbstractorConfig, MPLUGOwlVisionConfig
from ..model.qwen_vl import QwenVLResamplerConfig, QwenVLVisionConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        names: The tensors of the checkpoint that it is made of.
        make: Makes it of them; None where it is the one tensor itself.
    """

    names: tuple[str, ...]
    make: Callable[..., torch.Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """How one publisher writes one part.

    Attributes:
        kind: `vision_tower`, or the kind of a resampler or projector.
        mark: A pattern of whole tensor names that tells the layout; what it calls `prefix` stands before every name.
        names: Pairs (pattern in our name, replacement), each applied in turn. A name that becomes `/x` stands at the
            root of the checkpoint, not under the prefix.
        made: End of a name of theirs → (ends of the tensors it is made of, function of them).
        configure: (shapes by their names without prefix, sizes stated in the recipe) → configuration.
        rows: Name of the tensor whose last axis but one counts the query tokens, as `names` gives names.
    """

    kind: str
    mark: str
    names: tuple[tuple[str, str], ...] = ()
    configure: Callable[[Shapes, Mapping[str, Any]], PreTrainedConfig] | None = None
    made: Mapping[str, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = field(default_factory=dict)
    rows: str = ""

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """What stands before the names of this layout in a checkpoint; None where it is another layout."""
        for name in names:
            if match := re.fullmatch(self.mark, name):
                return match["prefix"]
        return None

    def origin(self, name: str, prefix: str, held: Collection[str]) -> Origin:
        """Where the tensor that we call `name` comes from in a checkpoint that holds these tensors."""
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        theirs = at(name, prefix)
        for end, (parts, make) in self.made.items():
            if theirs.endswith(end) and theirs not in held:
                return Origin(tuple(theirs[: -len(end)] + part for part in parts), make)
        return Origin((theirs,))


def at(name: str, prefix: str) -> str:
    """The whole name of a tensor; one that starts with `/` stands at the root."""
    return name[1:] if name.startswith("/") else prefix + name


def detect(kind: str, names: Collection[str]) -> tuple[Layout, str] | None:
    """The layout in which a checkpoint with these tensors holds this kind of part, and its prefix; None if in none."""
    for layout in LAYOUTS.values():
        if layout.kind == kind and (prefix := layout.prefix_in(names)) is not None:
            return layout, prefix
    return None


def _count(shapes: Shapes, stem: str) -> int:
    """How many numbered layers there are under a stem."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(re.escape(stem) + r"(\d+)\.", name))]
    return max(numbers) + 1


def _heads(width: int, head_width: int, key: str, stated: Mapping[str, Any]) -> int:
    """Attention heads, which no tensor tells: the published models' width of one head decides."""
    if "num_attention_heads" not in stated and width % head_width:
        raise UserError(
            f"{key}.pretrained: the width {width} is no multiple of {head_width}, the width of a head in the published "
            f"models of this layout; state {key}.config: {{num_attention_heads: …}}."
        )
    return width // head_width


def join_qkv_bias(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(D,) and (D,) → (3D,): EVA has no bias on its keys."""
    return torch.cat([query, torch.zeros_like(query), value])


def transpose(matrix: torch.Tensor) -> torch.Tensor:
    """(A, B) → (B, A)."""
    return matrix.t().contiguous()


# LAVIS builds EVA ViT-g without its last block (`create_eva_vit_g`: depth 39), whether or not the file still has it.
EVA_DEPTH = 39


def _eva_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    width, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    sizes = {
        "hidden_size": width,
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "num_hidden_layers": min(_count(shapes, "blocks."), EVA_DEPTH),
        "num_attention_heads": _heads(width, 88, "stack.vision_tower", stated),
        "image_size": math.isqrt(shapes["pos_embed"][1] - 1) * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        # LAVIS normalises after the tower with torch's default, unlike inside it, and unlike transformers' class.
        "post_layernorm_eps": 1e-5,
    }
    return Blip2VisionConfig(**{**sizes, **stated})


def _qformer_sizes(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    width = shapes["embeddings.LayerNorm.weight"][0]
    crossing = sorted(
        int(m[1])
        for name in shapes
        if (m := re.match(r"encoder\.layer\.(\d+)\.crossattention\.self\.key\.weight", name))
    )
    layers = _count(shapes, "encoder.layer.")
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layer.0.intermediate_query.dense.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width, 64, "stack.resampler", stated),
        "encoder_hidden_size": shapes["encoder.layer.0.crossattention.self.key.weight"][1],
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else layers,
        **stated,
    }


def _instruct_qformer_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    words = {
        "vocab_size": shapes["embeddings.word_embeddings.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
    }
    return InstructBlipQFormerConfig(**{**words, **_qformer_sizes(shapes, stated)})


def _owl_vision_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    _, tokens, width = shapes["embeddings.position_embedding"]
    patch = shapes["embeddings.patch_embed.weight"][-1]
    sizes = {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers."),
        "num_attention_heads": _heads(width, 64, "stack.vision_tower", stated),
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch_size": patch,
    }
    return MPLUGOwlVisionConfig(**{**sizes, **stated})


def _abstractor_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    layer = "encoder.layers.0.crossattention."
    width, source = shapes[f"{layer}attention.key.weight"]
    sizes = {
        "hidden_size": width,
        "intermediate_size": shapes[f"{layer}output.mlp.w1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers."),
        "num_attention_heads": _heads(width, 64, "stack.resampler", stated),
        "encoder_hidden_size": source,
    }
    return MPLUGOwlAbstractorConfig(**{**sizes, **stated})


def _qwen_vision_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    width, patch = shapes["conv1.weight"][0], shapes["conv1.weight"][-1]
    sizes = {
        "hidden_size": width,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(shapes, "transformer.resblocks."),
        "num_attention_heads": _heads(width, 104, "stack.vision_tower", stated),
        "image_size": 32 * patch,  # 448 pixels; the table of positions has 16 × 16 rows and does not tell
        "patch_size": patch,
    }
    return QwenVLVisionConfig(**{**sizes, **stated})


def _qwen_resampler_config(shapes: Shapes, stated: Mapping[str, Any]) -> PreTrainedConfig:
    width = shapes["attn_pool.query"][1]
    sizes = {
        "hidden_size": width,
        "num_attention_heads": _heads(width, 128, "stack.resampler", stated),
        "encoder_hidden_size": shapes.get("attn_pool.kv_proj.weight", (width, width))[1],
    }
    return QwenVLResamplerConfig(**{**sizes, **stated})


_LAVIS_QFORMER = Layout(
    kind="qformer",
    mark=r"(?P<prefix>Qformer\.bert\.)embeddings\.LayerNorm\.weight",
    names=(
        (r"^query_tokens", "/query_tokens"),
        (r"^qformer\.(embeddings\.)?layernorm", "embeddings.LayerNorm"),
        (r"^qformer\.", ""),
        (r"attention\.attention\.", "attention.self."),
    ),
    configure=lambda shapes, stated: Blip2QFormerConfig(**_qformer_sizes(shapes, stated)),
    rows="/query_tokens",
)

LAYOUTS: dict[str, Layout] = {
    # LAVIS BLIP-2 and InstructBLIP, MiniGPT-4; without prefix it is EVA's own file, and ln_vision is in another one.
    "lavis_vision": Layout(
        kind="vision_tower",
        mark=r"(?P<prefix>(.*\.)?visual_encoder\.|)blocks\.0\.attn\.q_bias",
        names=(
            (r"^embeddings\.class_embedding", "cls_token"),
            (r"^embeddings\.position_embedding", "pos_embed"),
            (r"^embeddings\.patch_embedding", "patch_embed.proj"),
            (r"^encoder\.layers\.(\d+)\.layer_norm", r"blocks.\1.norm"),
            (r"^encoder\.layers\.(\d+)\.self_attn\.projection", r"blocks.\1.attn.proj"),
            (r"^encoder\.layers\.(\d+)\.self_attn", r"blocks.\1.attn"),
            (r"^encoder\.layers\.", "blocks."),
            (r"^post_layernorm", "/ln_vision"),
        ),
        made={"attn.qkv.bias": (("attn.q_bias", "attn.v_bias"), join_qkv_bias)},
        configure=_eva_config,
    ),
    "lavis_qformer": _LAVIS_QFORMER,
    # InstructBLIP: beside the queries it has words.
    "lavis_instruct_qformer": replace(
        _LAVIS_QFORMER,
        kind="instruct_qformer",
        mark=r"(?P<prefix>Qformer\.bert\.)embeddings\.word_embeddings\.weight",
        configure=_instruct_qformer_config,
    ),
    "mplug_owl_vision": Layout(
        kind="vision_tower",
        mark=r"(?P<prefix>vision_model\.)embeddings\.patch_embed\.weight",
        configure=_owl_vision_config,
    ),
    "mplug_owl_abstractor": Layout(
        kind="abstractor",
        mark=r"(?P<prefix>abstractor\.)encoder\.layers\.0\.crossattention\.norm1\.weight",
        names=((r"^query_tokens", "/query_tokens"),),
        configure=_abstractor_config,
        rows="/query_tokens",
    ),
    "mplug_owl_projector": Layout(
        kind="linear_end",
        mark=r"(?P<prefix>abstractor\.)visual_fc\.weight",
        names=((r"^linear\.", "visual_fc."), (r"^end$", "vit_eos")),
    ),
    # Qwen-VL writes its resampler inside its tower.
    "qwen_vl_vision": Layout(
        kind="vision_tower",
        mark=r"(?P<prefix>(transformer\.visual\.)?)transformer\.resblocks\.0\.attn\.in_proj\.weight",
        configure=_qwen_vision_config,
    ),
    "qwen_vl_resampler": Layout(
        kind="cross_attention",
        mark=r"(?P<prefix>(transformer\.visual\.)?)attn_pool\.query",
        names=((r"^(?!ln_post\.)", "attn_pool."),),
        configure=_qwen_resampler_config,
        rows="attn_pool.query",
    ),
    "qwen_vl_projector": Layout(
        kind="linear_no_bias",
        mark=r"(?P<prefix>transformer\.visual\.|)proj",
        names=((r"^linear\.weight$", "linear"),),
        made={"linear": (("proj",), transpose)},  # it multiplies from the right
    ),
}
