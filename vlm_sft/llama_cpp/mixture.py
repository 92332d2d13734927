"""Which type each tensor of a quantised language model gets: the mixtures that `llama-quantize` knows by name.

Head and embeddings, values and what leads down from the feed-forward layers lose most when they are rounded, so files
named after 4 bits hold some tensors in 5 and 6. The rules are those of llama.cpp's `src/llama-quant.cpp` without an
importance matrix; its own table of what they give for published models is what the tests hold them against.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from ..base.errors import UserError


class Mixture(NamedTuple):
    """What a name stands for: the type of most tensors, and what the file says that it is."""

    most: Type
    file: LlamaFileType


_FILES = {each.name.removeprefix("MOSTLY_").lower(): each for each in LlamaFileType}
MIXTURES = {
    name: Mixture(kind, _FILES[name])
    for kind, names in {
        Type.Q8_0: ["q8_0"],
        Type.Q6_K: ["q6_k"],
        Type.Q5_K: ["q5_k_m", "q5_k_s"],
        Type.Q5_1: ["q5_1"],
        Type.Q5_0: ["q5_0"],
        Type.Q4_K: ["q4_k_m", "q4_k_s"],
        Type.IQ4_NL: ["iq4_nl"],
        Type.IQ4_XS: ["iq4_xs"],
        Type.Q4_1: ["q4_1"],
        Type.Q4_0: ["q4_0"],
        Type.Q3_K: ["q3_k_l", "q3_k_m", "q3_k_s"],
        Type.IQ3_S: ["iq3_m", "iq3_s"],
        Type.Q2_K: ["q2_k"],
    }.items()
    for name in names
}
"""By the names that llama.cpp gives them, the largest first."""
ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}
WITH_MATRIX = ("q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
FALCON = "llama.cpp has rules of its own for quantised Falcons, which are not followed here; leave --quantize out."

# What is taken where a tensor's width is no multiple of a type's block; where that does not do either, 16 bits.
_NARROW = {
    **dict.fromkeys((Type.IQ3_S, Type.IQ4_XS), Type.IQ4_NL),
    **dict.fromkeys((Type.Q2_K, Type.Q3_K), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|^position_embd"
    r"|^token_types|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight"
    r"|time_mix_(?:first|[wvag][012]|decay_w[12]|lerp_fused)\.weight"
)
_LAYER = re.compile(r"blk\.(\d+)\.")
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


class Shape(NamedTuple):
    """What a mixture asks of a model.

    Attributes:
        architecture: llama.cpp's name of it.
        layers: How many.
        sharing: Heads that share one key and value.
        experts: 0 without.
    """

    architecture: str
    layers: int
    sharing: int
    experts: int = 0


def mixture_of(name: str) -> str:
    """The name of a mixture as it stands in `MIXTURES`, from what somebody wrote.

    Raises:
        UserError: llama.cpp has none of that name, or makes it by an importance matrix alone.
    """
    known = name.lower().replace("-", "_")
    known = ALIASES.get(known, known)
    if known in MIXTURES:
        return known
    ours = ", ".join(MIXTURES)
    if known in WITH_MATRIX:
        raise UserError(
            f"--quantize {name} needs an importance matrix, which llama.cpp measures on texts of your own; use one of "
            f"{ours}."
        )
    raise UserError(f"--quantize {name} is unknown; use one of {ours}.")


def types_of(name: str, shapes: Mapping[str, Sequence[int]], model: Shape) -> dict[str, Type | None]:
    """The type of each tensor; None for those that stay as they are.

    Args:
        name: A key of `MIXTURES`.
        shapes: Of every tensor of the file, by its name, as numpy has them: the last one is what a block lies along.
        model: What the file says of the model.

    Raises:
        UserError: Nobody looked how llama.cpp quantises the architecture.
    """
    if model.architecture == "falcon":
        raise UserError(FALCON)
    tied, seen = "output.weight" not in shapes, {"values": 0, "down": 0}
    values = sum(any(part in each for part in _VALUES) for each in shapes)
    found: dict[str, Type | None] = {}
    for tensor in sorted(shapes, key=lambda each: (_layer(each), each)):
        if len(shapes[tensor]) < 2 or not tensor.endswith("weight") or _KEPT.search(tensor):
            found[tensor] = None
            continue
        width = shapes[tensor][-1]
        if tensor == "output.weight" or (tied and tensor in ("token_embd.weight", "per_layer_token_embd.weight")):
            kind = _of_the_head(MIXTURES[name].most, width)
        elif any(part in tensor for part in _VALUES):
            kind = _of_values(name, seen["values"], values, model)
            seen["values"] += 1
        elif "ffn_down" in tensor:
            at = _layer(tensor) if model.experts > 1 else seen["down"]
            kind = _of_down(name, at, model)
            seen["down"] += 1
        else:
            kind = _of_others(name, tensor, model)
        found[tensor] = _fitting(kind, width)
    return found


def _layer(tensor: str) -> int:
    found = _LAYER.match(tensor)
    return int(found[1]) if found else -1


def _of_the_head(most: Type, width: int) -> Type:
    return Type.Q8_0 if most == Type.Q8_0 or width % GGML_QUANT_SIZES[most][0] else Type.Q6_K


def _more_bits(at: int, of: int) -> bool:
    """Whether a tensor is one of the first or last eighth, or each third between."""
    return at < of // 8 or at >= 7 * of // 8 or (at - of // 8) % 3 == 2


def _of_values(name: str, at: int, of: int, model: Shape) -> Type:
    most, shared = MIXTURES[name].most, model.sharing >= 4
    kind = {
        "q2_k": Type.Q4_K if shared else Type.Q3_K,
        "q3_k_m": Type.Q5_K if at < 2 else Type.Q4_K,
        "q3_k_l": Type.Q5_K,
        "iq3_s": Type.Q4_K if shared else most,
        "iq3_m": Type.Q4_K,
        "iq4_nl": Type.Q5_K if shared else most,
        "iq4_xs": Type.Q5_K if shared else most,
        "q4_k_m": Type.Q6_K if _more_bits(at, of) else most,
        "q5_k_m": Type.Q6_K if _more_bits(at, of) else most,
        "q4_k_s": Type.Q5_K if at < 4 else most,
    }.get(name, most)
    if _is_70b(model) and kind in (Type.Q3_K, Type.Q4_K):
        kind = Type.Q5_K
    return Type.Q8_0 if model.experts == 8 else kind


def _is_70b(model: Shape) -> bool:
    """Whether llama.cpp calls it a 70B, of which so many heads share values that more bits cost next to nothing."""
    layers = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
    return layers.get(model.architecture) == model.layers and (model.architecture != "llama" or model.sharing > 1)


def _of_down(name: str, at: int, model: Shape) -> Type:
    most, of = MIXTURES[name].most, model.layers
    first = at < of // 8
    return {
        "q2_k": Type.Q3_K,
        "q3_k_m": Type.Q5_K if at < of // 16 else Type.Q4_K,
        "q3_k_l": Type.Q5_K,
        "iq3_m": Type.Q4_K if first or (model.experts == 8 and _more_bits(at, of)) else most,
        "q4_k_m": Type.Q6_K if _more_bits(at, of) else most,
        "iq4_nl": Type.Q5_K if first else most,
        "iq4_xs": Type.Q5_K if first else most,
        "q5_k_m": Type.Q6_K if _more_bits(at, of) else most,
        "q4_k_s": Type.Q5_K if first else most,
    }.get(name, most)


def _of_others(name: str, tensor: str, model: Shape) -> Type:
    """Of queries, keys, what leads out of attention, and the rest."""
    most = MIXTURES[name].most
    if "attn_k.weight" in tensor and model.experts == 8:
        return Type.Q8_0
    if "attn_output.weight" not in tensor:
        return most
    if model.experts == 8:
        return Type.Q5_K if most in (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.IQ3_S, Type.IQ4_NL, Type.IQ4_XS) and (
            name != "q3_k_l") else most  # fmt: skip
    return {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K, "q3_k_l": Type.Q5_K, "iq3_m": Type.Q4_K}.get(name, most)


def _fitting(kind: Type, width: int) -> Type:
    if width % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    kind = _NARROW.get(kind, Type.F16)
    return Type.F16 if width % GGML_QUANT_SIZES[kind][0] else kind
