"""llama.cpp's blocks hold the numbers that were given, as the `gguf` library's own reading of them shows."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from vlm_sft.base.errors import UserError
from vlm_sft.llama_cpp.mixture import MIXTURES
from vlm_sft.llama_cpp.quantize import quantize

# Largest error that rounding to so many steps leaves, as a share of the numbers' own size.
LIMITS = {"q8": 0.01, "q6": 0.03, "q5": 0.05, "q4": 0.1, "iq4": 0.1, "q3": 0.2, "iq3": 0.2, "q2": 0.35}


@pytest.fixture
def write(tmp_path):
    """A file of a model with one layer; gives its path and its tensors."""

    def make(width=256, dtype=np.float16, spoil=None):
        path, draw = tmp_path / "model-f16.gguf", np.random.default_rng(0)
        shapes = {"token_embd": [40, width], "output": [40, width], "blk.0.attn_v": [64, width],
                  "blk.0.ffn_down": [width, 512], "output_norm": [width]}  # fmt: skip
        tensors = {f"{name}.weight": draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if spoil is not None:
            tensors["blk.0.attn_v.weight"][3, 7] = spoil
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_head_count(8)
        writer.add_head_count_kv(2)
        writer.add_file_type(LlamaFileType.MOSTLY_F16)
        writer.add_string("general.name", "中文 name")
        writer.add_array("tokenizer.ggml.tokens", ["a", "猫", ""])
        writer.add_key_value("tokenizer.ggml.token_type", [1, 2, 3], GGUFValueType.ARRAY, GGUFValueType.INT32)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.astype(dtype if tensor.ndim > 1 else np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path, tensors

    return make


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_holds_the_numbers_within_its_bits(name, write, tmp_path):
    source, tensors = write()
    counted = quantize(source, tmp_path / "out.gguf", name)
    reader = GGUFReader(tmp_path / "out.gguf")
    found = {each.name: each for each in reader.tensors}
    assert set(found) == set(tensors) and sum(counted.values()) == len(tensors)
    for key, wanted in tensors.items():
        kind = found[key].tensor_type
        held = dequantize(found[key].data, kind).reshape(wanted.shape)
        error = np.sqrt(np.square(held - wanted).mean() / np.square(wanted).mean())
        limit = 1e-6 if kind == Type.F32 else LIMITS[kind.name.split("_")[0].lower()]
        assert error <= limit, f"{name}: {key} in {kind.name} differs by {error:.3f}"
    assert reader.get_field("general.file_type").contents() == MIXTURES[name].file
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("general.name").contents() == "中文 name"
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "猫", ""]
    assert reader.get_field("tokenizer.ggml.token_type").contents() == [1, 2, 3]
    assert found["output_norm.weight"].tensor_type == Type.F32


def test_a_narrow_model_falls_back_and_many_rows_are_rounded_in_pieces(write, tmp_path, monkeypatch):
    source, _ = write(width=96)
    quantize(source, tmp_path / "whole.gguf", "q4_k_m")
    monkeypatch.setattr("vlm_sft.llama_cpp.quantize.VALUES_AT_ONCE", 700)
    quantize(source, tmp_path / "pieces.gguf", "q4_k_m")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
    kinds = {each.name: each.tensor_type for each in GGUFReader(tmp_path / "pieces.gguf").tensors}
    assert kinds["token_embd.weight"] == Type.Q5_0 and kinds["output.weight"] == Type.Q8_0
    assert kinds["blk.0.ffn_down.weight"] == Type.Q6_K


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value, write, tmp_path):
    source, _ = write(spoil=value)
    with pytest.raises(UserError, match="values that are no numbers"):
        quantize(source, tmp_path / "out.gguf", "q4_k_m")
