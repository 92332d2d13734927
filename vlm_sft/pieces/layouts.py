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

import torch
from transformers import Blip2QFormerConfig, Blip2VisionConfig, InstructBlipQFormerConfig, PreTrainedConfig

from ..base.errors import UserError
from ..base.names import Json, Values
from ..systems.mplug_owl import MPLUGOwlAbstractorConfig, MPLUGOwlVisionConfig
from ..systems.qwen_vl import QwenVLResamplerConfig, QwenVLVisionConfig

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
            root of the checkpoint, not under the prefix; one that becomes `a|b` is `a` where the checkpoint has that.
        made: End of a name of theirs → (ends of the tensors it is made of, function of them).
        config: Class of the configuration; None where there are no sizes to tell.
        sizes: Setting → the tensor and the axis whose length it is, by names without prefix.
        layers: What stands before the numbers of the layers.
        head: Width of an attention head in the published models, which no tensor tells.
        more: (shapes, sizes so far) → settings that follow from them otherwise.
        rows: Name of the tensor whose last axis but one counts the query tokens, as `names` gives names.
        section: Key of `config.json` under which the number of heads stands, where it stands there.
    """

    kind: str
    mark: str
    names: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    config: type[PreTrainedConfig] | None = None
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    layers: str = ""
    head: int = 64
    more: Callable[[Shapes, Values], Values] = lambda shapes, sizes: {}
    made: Mapping[str, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = field(default_factory=dict)
    rows: str = ""
    section: str = ""

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """What stands before the names of this layout in a checkpoint; None where it is another layout."""
        for name in names:
            if match := re.fullmatch(self.mark, name):
                return match["prefix"]
        return None

    def configure(self, shapes: Shapes, stated: Values) -> PreTrainedConfig:
        """The configuration of a part with these shapes, by names without prefix; what the recipe states goes first.

        Raises:
            UserError: The number of heads cannot be told.
            KeyError: A tensor is not there.
        """
        assert self.config is not None, f"{self.kind} has no sizes of its own"
        sizes = {name: shapes[tensor][axis] for name, (tensor, axis) in self.sizes.items()}
        width, key = sizes["hidden_size"], f"stack.{'vision_tower' if self.kind == 'vision_tower' else 'resampler'}"
        if "num_attention_heads" not in stated and width % self.head:
            raise UserError(
                f"{key}.pretrained: the width {width} is no multiple of {self.head}, the width of a head in the "
                f"published models of this layout; state {key}.config: {{num_attention_heads: …}}."
            )
        sizes["num_attention_heads"] = width // self.head
        if self.layers:
            numbers = (re.match(re.escape(self.layers) + r"(\d+)\.", name) for name in shapes)
            sizes["num_hidden_layers"] = 1 + max(int(number[1]) for number in numbers if number)
        return self.config(**{**sizes, **self.more(shapes, sizes), **stated})

    def origin(self, name: str, prefix: str, held: Collection[str]) -> Origin:
        """Where the tensor that we call `name` comes from in a checkpoint that holds these tensors."""
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        choices = [at(choice, prefix) for choice in name.split("|")]
        theirs = next((choice for choice in choices if choice in held), choices[-1])
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


def join_qkv_bias(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(D,) and (D,) → (3D,): EVA has no bias on its keys."""
    return torch.cat([query, torch.zeros_like(query), value])


def _share(number: int, of: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes one of the equal parts that a joint projection stacks."""
    return lambda joint: joint.chunk(of)[number].contiguous()


# LAVIS builds EVA ViT-g without its last block (`create_eva_vit_g`: depth 39), whether or not the file still has it.
EVA_DEPTH = 39


def _side(table: str) -> Callable[[Shapes, Values], Json]:
    """The pixels of a side, by the patches in a table of positions."""
    return lambda shapes, sizes: {"image_size": math.isqrt(shapes[table][-2] - 1) * sizes["patch_size"]}


def _eva(table: str) -> Callable[[Shapes, Values], Json]:
    return lambda shapes, sizes: {
        **_side(table)(shapes, sizes),
        "num_hidden_layers": min(sizes["num_hidden_layers"], EVA_DEPTH),
        "layer_norm_eps": 1e-6,
        # LAVIS normalises after the tower with torch's default, unlike inside it, and unlike transformers' class.
        "post_layernorm_eps": 1e-5,
    }


def _crossing(shapes: Shapes, sizes: Values) -> Json:
    """How many layers of a Q-Former there are for each one that looks at the image."""
    layers = (re.match(r".*layers?\.(\d+)\.cross_?attention\.(self|query)\.(key\.)?weight", name) for name in shapes)
    crossing = sorted(int(layer[1]) for layer in layers if layer)
    return {"cross_attention_frequency": crossing[1] if len(crossing) > 1 else sizes["num_hidden_layers"]}


_LAVIS_QFORMER = Layout(
    kind="qformer",
    mark=r"(?P<prefix>Qformer\.bert\.)embeddings\.LayerNorm\.weight",
    names=(
        (r"^query_tokens", "/query_tokens"),
        (r"^qformer\.(embeddings\.)?layernorm", "embeddings.LayerNorm"),
        (r"^qformer\.", ""),
        (r"attention\.attention\.", "attention.self."),
    ),
    config=Blip2QFormerConfig,
    sizes={
        "hidden_size": ("embeddings.LayerNorm.weight", 0),
        "intermediate_size": ("encoder.layer.0.intermediate_query.dense.weight", 0),
        "encoder_hidden_size": ("encoder.layer.0.crossattention.self.key.weight", 1),
    },
    layers="encoder.layer.",
    more=_crossing,
    rows="/query_tokens",
)

# What SwissArmyTransformer stacks.
_SAT_JOINT = {
    f"{stem}attention.{part}.{end}": ((f"{stem}attention.{joint}.{end}",), _share(number, 1 + joint.count("_")))
    for stem, joint in ((".", "query_key_value"), ("cross_", "key_value"))
    for number, part in enumerate(joint.split("_"))
    for end in ("weight", "bias")
}

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
        config=Blip2VisionConfig,
        sizes={
            "hidden_size": ("cls_token", -1),
            "intermediate_size": ("blocks.0.mlp.fc1.weight", 0),
            "patch_size": ("patch_embed.proj.weight", -1),
        },
        layers="blocks.",
        head=88,
        more=_eva("pos_embed"),
    ),
    "lavis_qformer": _LAVIS_QFORMER,
    # InstructBLIP: beside the queries it has words.
    "lavis_instruct_qformer": replace(
        _LAVIS_QFORMER,
        kind="instruct_qformer",
        mark=r"(?P<prefix>Qformer\.bert\.)embeddings\.word_embeddings\.weight",
        config=InstructBlipQFormerConfig,
        sizes={
            **_LAVIS_QFORMER.sizes,
            "vocab_size": ("embeddings.word_embeddings.weight", 0),
            "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
        },
    ),
    # VisualGLM: as BLIP-2's, in the names and joint projections of SwissArmyTransformer.
    "visualglm_vision": Layout(
        kind="vision_tower",
        mark=r"(?P<prefix>(.*\.)?vit\.)mixins\.patch_embedding\.proj\.weight",
        names=(
            (r"^embeddings\.patch_embedding", "mixins.patch_embedding.proj"),
            (r"^post_layernorm", "mixins.cls.ln_vision"),
            (r"^encoder\.", "transformer."),
            (r"layer_norm1", "input_layernorm"),
            (r"layer_norm2", "post_attention_layernorm"),
            (r"self_attn\.qkv", "attention.query_key_value"),
            (r"self_attn\.projection", "attention.dense"),
            (r"mlp\.fc1", "mlp.dense_h_to_4h"),
            (r"mlp\.fc2", "mlp.dense_4h_to_h"),
        ),
        made={
            "embeddings.class_embedding": (("transformer.word_embeddings.weight",), lambda table: table[None]),
            "embeddings.position_embedding": (("transformer.position_embeddings.weight",), lambda table: table[None]),
        },
        config=Blip2VisionConfig,
        sizes={
            "hidden_size": ("transformer.word_embeddings.weight", -1),
            "intermediate_size": ("transformer.layers.0.mlp.dense_h_to_4h.weight", 0),
            "patch_size": ("mixins.patch_embedding.proj.weight", -1),
        },
        layers="transformer.layers.",
        head=88,
        more=_eva("transformer.position_embeddings.weight"),
        section="eva_config",
    ),
    "visualglm_qformer": Layout(
        kind="qformer",
        mark=r"(?P<prefix>(.*\.)?qformer\.transformer\.)layers\.0\.cross_attention\.key_value\.weight",
        names=(
            (r"^qformer\.layernorm", "layers.0.input_layernorm"),  # each norm of an input ends the layer before
            (
                r"^qformer\.encoder\.layer\.(\d+)\.output_query\.LayerNorm(.*)",
                lambda m: f"layers.{int(m[1]) + 1}.input_layernorm{m[2]}|final_layernorm{m[2]}",
            ),
            (r"^qformer\.encoder\.layer", "layers"),
            (r"intermediate_query\.dense", "mlp.dense_h_to_4h"),
            (r"output_query\.dense", "mlp.dense_4h_to_h"),
            (r"crossattention", "cross_attention"),
            (r"(cross_)?attention\.output\.LayerNorm", r"post_\1attention_layernorm"),
            (r"attention\.(attention|output)", "attention"),
        ),
        made={
            "query_tokens": (("word_embeddings.weight",), lambda table: table[None]),
            **_SAT_JOINT,
        },
        config=Blip2QFormerConfig,
        sizes={
            "hidden_size": ("layers.0.input_layernorm.weight", 0),
            "intermediate_size": ("layers.0.mlp.dense_h_to_4h.weight", 0),
            "encoder_hidden_size": ("layers.0.cross_attention.key_value.weight", 1),
        },
        layers="layers.",
        more=_crossing,
        rows="word_embeddings.weight",
        section="qformer_config",
    ),
    "mplug_owl_vision": Layout(
        kind="vision_tower",
        mark=r"(?P<prefix>vision_model\.)embeddings\.patch_embed\.weight",
        config=MPLUGOwlVisionConfig,
        sizes={
            "hidden_size": ("embeddings.position_embedding", 2),
            "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
            "patch_size": ("embeddings.patch_embed.weight", -1),
        },
        layers="encoder.layers.",
        more=_side("embeddings.position_embedding"),
    ),
    "mplug_owl_abstractor": Layout(
        kind="abstractor",
        mark=r"(?P<prefix>abstractor\.)encoder\.layers\.0\.crossattention\.norm1\.weight",
        names=((r"^query_tokens", "/query_tokens"),),
        config=MPLUGOwlAbstractorConfig,
        sizes={
            "hidden_size": ("encoder.layers.0.crossattention.attention.key.weight", 0),
            "intermediate_size": ("encoder.layers.0.crossattention.output.mlp.w1.weight", 0),
            "encoder_hidden_size": ("encoder.layers.0.crossattention.attention.key.weight", 1),
        },
        layers="encoder.layers.",
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
        config=QwenVLVisionConfig,
        sizes={
            "hidden_size": ("conv1.weight", 0),
            "intermediate_size": ("transformer.resblocks.0.mlp.c_fc.weight", 0),
            "patch_size": ("conv1.weight", -1),
        },
        layers="transformer.resblocks.",
        head=104,
        # 448 pixels; the table of positions has 16 × 16 rows and does not tell.
        more=lambda shapes, sizes: {"image_size": 32 * sizes["patch_size"]},
    ),
    "qwen_vl_resampler": Layout(
        kind="cross_attention",
        mark=r"(?P<prefix>(transformer\.visual\.)?)attn_pool\.query",
        names=((r"^(?!ln_post\.)", "attn_pool."),),
        config=QwenVLResamplerConfig,
        sizes={"hidden_size": ("attn_pool.query", 1)},
        head=128,
        more=lambda shapes, sizes: {
            "encoder_hidden_size": shapes.get("attn_pool.kv_proj.weight", (0, sizes["hidden_size"]))[1]
        },
        rows="attn_pool.query",
    ),
    "qwen_vl_projector": Layout(
        kind="linear_no_bias",
        mark=r"(?P<prefix>transformer\.visual\.|)proj",
        names=((r"^linear\.weight$", "linear"),),
        made={"linear": (("proj",), lambda matrix: matrix.t().contiguous())},  # upstream multiplies from the right
    ),
}
