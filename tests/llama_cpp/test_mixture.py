"""Each tensor gets the type that llama.cpp gives it, by the table that its own test is held against."""

from __future__ import annotations

import re

import pytest
from gguf import GGMLQuantizationType as Type

from vlm_sft.base.errors import UserError
from vlm_sft.llama_cpp.mixture import MIXTURES, WITH_MATRIX, Shape, mixture_of, types_of
from vlm_sft.llama_cpp.packages import converter

LAYER = ["attn_k", "attn_norm", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_norm", "ffn_up"]
# Of llama.cpp's snapshots those of dense models. Their architecture, and whether head and embeddings are one.
MODELS = {
    "qwen3-0.6b": ("qwen3", False),
    "qwen3-14b": ("qwen3", False),
    "meta-llama-3.1-70b-instruct": ("llama", False),
    "gemma-3-4b-it": ("gemma3", True),
}


def snapshot(name):
    """The sizes of a model, and what llama.cpp gives its tensors for each mixture: type of most, name → other type."""
    lines = (converter() / "tests" / "snapshots" / f"{name}.schema").read_text(encoding="utf-8").splitlines()
    sizes = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", lines[1])}
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for line in filter(None, lines[2:]):
        if head := re.match(r"\[(\w+)] (\w+)", line):
            found[head[1].lower()] = (head[2].upper(), {})
        else:
            tensor, kind = line.split()
            found[list(found)[-1]][1][tensor] = kind.upper()
    return sizes, found


def shapes_of(sizes, tied):
    wide, inner, words = sizes["n_embd"], sizes["n_ff"], sizes["n_vocab"]
    layer = {
        **{f"{name}.weight": [wide, wide] for name in LAYER if not name.endswith("norm")},
        **{f"{name}.weight": [wide] for name in LAYER if name.endswith("norm")},
        "ffn_down.weight": [wide, inner],
    }
    head = {} if tied else {"output.weight": [words, wide]}
    layers = range(sizes["n_layer"])
    return {
        "token_embd.weight": [words, wide], "output_norm.weight": [wide], **head,
        **{f"blk.{number}.{name}": shape for number in layers for name, shape in layer.items()},
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_mixtures_are_those_of_llama_cpp(model):
    architecture, tied = MODELS[model]
    sizes, wanted = snapshot(model)
    shape = Shape(architecture, sizes["n_layer"], sizes["n_head"] // sizes["n_head_kv"])
    shapes = shapes_of(sizes, tied)
    assert set(MIXTURES) <= set(wanted) and len(MIXTURES) == 18
    for name in MIXTURES:
        most, others = wanted[name]
        found = {tensor: kind.name for tensor, kind in types_of(name, shapes, shape).items() if kind is not None}
        assert found == {tensor: others.get(tensor, most) for tensor in found}, name
        assert set(others) <= set(found) and len(found) == 7 * sizes["n_layer"] + (1 if tied else 2)


def test_eight_experts_keep_their_attention_in_more_bits():
    shapes = {
        "blk.0.attn_k.weight": [64, 256],
        "blk.0.attn_v.weight": [64, 256],
        "blk.0.attn_output.weight": [256, 256],
        "blk.0.ffn_gate_inp.weight": [8, 256],
        "blk.0.ffn_down_exps.weight": [8, 256, 512],
    }
    found = types_of("q4_k_m", shapes, Shape("llama", 32, 4, 8))
    assert found["blk.0.attn_k.weight"] == found["blk.0.attn_v.weight"] == Type.Q8_0
    assert found["blk.0.attn_output.weight"] == Type.Q5_K and found["blk.0.ffn_gate_inp.weight"] is None
    assert found["blk.0.ffn_down_exps.weight"] == Type.Q6_K, "the first eighth of the layers"


@pytest.mark.parametrize(
    ("width", "kind"), [(256, Type.Q4_K), (96, Type.Q5_0), (48, Type.F16)], ids=["whole", "of 32", "of neither"]
)
def test_a_width_that_is_no_multiple_of_a_block_gets_the_next_type(width, kind):
    assert types_of("q4_k_m", {"blk.0.attn_q.weight": [64, width]}, Shape("llama", 2, 1)) == {
        "blk.0.attn_q.weight": kind
    }


def test_names_are_read_as_llama_cpp_writes_them_and_the_rest_is_refused():
    assert (mixture_of("Q4_K_M"), mixture_of("q4_k"), mixture_of("q5-k-s")) == ("q4_k_m", "q4_k_m", "q5_k_s")
    for name in WITH_MATRIX:
        with pytest.raises(UserError, match=f"--quantize {name} needs an importance matrix, .* use one of q8_0, "):
            mixture_of(name)
    with pytest.raises(UserError, match="--quantize 4bit is unknown; use one of q8_0, q6_k"):
        mixture_of("4bit")
    with pytest.raises(UserError, match="rules of its own for quantised Falcons"):
        types_of("q4_k_m", {}, Shape("falcon", 2, 1))
