"""Existing VLMs are written as their own classes again: the same logits and answers, and the names of their base."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, pipeline

from support.tiny_families import CHECKED, tiny
from vlm_sft import answer, load
from vlm_sft.base.errors import UserError
from vlm_sft.export.check import compare, inputs_of, noise_picture, read_processor
from vlm_sft.export.export import export
from vlm_sft.export.forms import FamilyForm
from vlm_sft.export.native_model import renamed
from vlm_sft.families.table import FAMILIES

EXPORTED = [name for name in CHECKED if not FAMILIES[name].no_export]
CHATTING = [name for name in EXPORTED if name != "kosmos-2"]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this? 这是什么？"}]}


@pytest.fixture
def here(monkeypatch):
    """The comparison in this process in place of a fresh one, which is tested for two families."""

    def run(command, **options):
        found = compare(Path(command[4]), Path(command[5]))
        return SimpleNamespace(returncode=0, stdout=json.dumps(found), stderr="")

    monkeypatch.setattr("vlm_sft.bundle.parity.subprocess.run", run)


def asked_for(folder):
    """What a bundle answers to the question."""
    stream = io.BytesIO()
    noise_picture().save(stream, "PNG")
    row = {"messages": [QUESTION], "images": [stream.getvalue()]}
    return answer(*load(folder), [row], max_new_tokens=6)[0].strip()


def asked_of_the_export(out):
    """The same of transformers' pipeline; without torchvision it is given a processor that reads no videos."""
    picture = {"type": "image", "image": noise_picture()}
    messages = [{"role": "user", "content": [picture, QUESTION["content"][1]]}]
    asker = pipeline("image-text-to-text", model=str(out), processor=read_processor(out))
    said = asker(messages, return_full_text=False, generate_kwargs={"max_new_tokens": 6})
    return said[0]["generated_text"].strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_its_own_class_gives_the_bundles_logits_and_the_pipeline_its_answers(name, save, here, tmp_path):
    folder, out = save(name), tmp_path / "export"
    found = export(folder, out)
    assert found["max_difference"] <= 2e-5 and found["pixels"] == 0 and found["form"] == name
    assert json.loads((out / "config.json").read_text())["architectures"] == [found["class"]]
    assert found["chats"] == (name in CHATTING)
    assert set(load_file(out / "model.safetensors")) == set(load_file(tiny(name) / "model.safetensors"))
    if found["chats"]:
        said = asked_of_the_export(out)
        assert said == asked_for(folder) and (said or name not in ("llava", "qwen2_5_vl"))


@pytest.mark.slow
def test_a_model_whose_processor_knows_no_conversations_is_asked_by_its_prompt(save, here, tmp_path):
    out = tmp_path / "export"
    export(save("kosmos-2"), out)
    card = (out / "README.md").read_text()
    assert "prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False)" in card
    processor, model = read_processor(out), AutoModelForImageTextToText.from_pretrained(out)
    prompt, inputs = inputs_of(processor, [QUESTION], [noise_picture()])
    assert prompt == "Question: What is this? 这是什么？ Answer:"
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_a_quantised_one_in_full_with_its_adapter_beside_and_its_processor_of_videos(save, tmp_path, fresh_python):
    base, out = tmp_path / "base", tmp_path / "export"
    shutil.copytree(tiny("qwen2_5_vl"), base)
    (base / "video_preprocessor_config.json").write_text(json.dumps({"fps": 2}))
    folder = save("qwen2_5_vl", base, quantization={"load_in_4bit": True})
    found = export(folder, out, keep_adapter=True)  # in a fresh process
    assert found["max_difference"] <= 1e-5 and found["quantised_in_training"]
    assert json.loads((out / "video_preprocessor_config.json").read_text()) == {"fps": 2}
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert adapter and all(key.startswith("base_model.model.model.language_model.layers.") for key in adapter)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "A `Qwen2_5_VLForConditionalGeneration` of transformers" in card and "its LoRA lies in `adapter/`" in card
    assert "Training saw the base in fewer bits" in card and str(tmp_path) not in card


def as_published(folder):
    """LLaVA's tensors under the names of llava-hf, which transformers 5 does not write by itself."""
    names = {"vision_tower.": "vision_tower.vision_model."}
    path = shutil.copytree(tiny("llava"), folder) / "model.safetensors"
    state = {renamed(name, names): tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    return folder, set(state)


@pytest.mark.slow
def test_vllm_gets_the_names_of_the_base(save, here, tmp_path):
    base, names = as_published(tmp_path / "base")
    assert "language_model.model.embed_tokens.weight" in names
    assert export(save("llava", base), tmp_path / "export", "vllm", dtype="bfloat16")["to"] == "vllm"
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert set(state) == names and {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_names_that_the_base_does_not_have_are_an_error(monkeypatch, tmp_path):
    files = {"base": {"a": "", "tied": ""}, str(tmp_path): {"a": "", "model.b": ""}}
    monkeypatch.setattr("vlm_sft.export.forms.Checkpoint", lambda path, *rest: SimpleNamespace(files=files[path]))
    form = FamilyForm.__new__(FamilyForm)
    form.spec = SimpleNamespace(pretrained="base", revision=None)
    native = SimpleNamespace(save_pretrained=lambda out: None)
    form.save(native, tmp_path, "transformers")
    with pytest.raises(UserError, match=r"'base' has no tensor named like 'model\.b', so vLLM may not find it"):
        form.save(native, tmp_path, "vllm")


def test_what_cannot_be_exported_is_refused_first(save, tmp_path):
    with pytest.raises(UserError, match="own processor cannot cut images without torchvision; use --to bundle-merged"):
        export(save("fuyu"), tmp_path / "export")
    with pytest.raises(UserError, match="vLLM has no class for Kosmos2ForConditionalGeneration; use --to transformers"):
        export(save("kosmos-2", label="other"), tmp_path / "export", "vllm")
    assert not (tmp_path / "export").exists()
