"""Existing VLMs in llama.cpp: both files are written by its own converter, and it answers as the bundle does."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from support.for_llama_cpp import write_for_llama_cpp
from support.tiny_families import tiny
from vlm_sft.base.errors import UserError
from vlm_sft.export.export import export
from vlm_sft.llama_cpp.families import FAMILIES, family_template, save_for_converter

TURNED = FAMILIES["internvl"].turned
NO_CHAIN: tuple[str, ...] = ()


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_answers_as_the_bundle_of_an_existing_vlm_does(name, save_family, tmp_path):
    base = write_for_llama_cpp(name, tmp_path / name)
    found = export(save_family(name, base), tmp_path / "out", to="gguf")
    assert found["same_answer"] and found["max_difference"] < found["tolerance"] and found["kl"] < 1e-4
    files = {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "export.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    told = " ".join(found["differences"])
    assert told and ("--image-min-tokens 4 --image-max-tokens 512" in told) == (FAMILIES[name].shape == "kept")
    assert ("TEMPLATE" in (tmp_path / "out" / "Modelfile").read_text()) == (name not in NO_CHAIN)


def test_positions_of_internvl_are_in_the_order_of_the_graph_which_has_the_class_token_last(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny("internvl"))
    save_for_converter(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in found if name.endswith(TURNED)]
    assert found[name].equal(model.state_dict()[name][:, [1, 2, 3, 4, 0]])


def test_what_llama_cpp_writes_around_pictures_stands_in_a_template_no_more():
    template = "{{ 'Q' + '<|vision_start|>' + image_token + '<|vision_end|>' }}"
    assert family_template(template, "qwen2_vl", "<p><p>", "<p>") == "{{ 'Q' + '' + image_token + '' }}"
    written = "\n\n<start_of_image><p><p><end_of_image>\n\n"
    begin = "{%- set image_token = '\\n\\n' ~ image_token ~ '\\n\\n' -%}"
    assert family_template("{{ image_token }}", "gemma3", written, "<p>") == begin + "{{ image_token }}"
    begin = "{%- set image_token = '<begin>' ~ image_token ~ '<end>' -%}"
    assert family_template("", "janus", "<begin><p><p><end>", "<p>") == begin


def test_windows_of_another_size_and_other_families_are_refused(save_family, tmp_path):
    base = write_for_llama_cpp("qwen2_5_vl", tmp_path / "base", window_size=56)
    with pytest.raises(UserError, match=r"its windows are 112 pixels wide, this bundle's 56"):
        export(save_family("qwen2_5_vl", base), tmp_path / "out", to="gguf")
    with pytest.raises(UserError, match=r"answers for a PaliGemma.* never seen .* use --to transformers, .* qwen2_vl"):
        export(save_family("paligemma"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
