"""Exports load by transformers alone and give the bundle's logits; what has no native form says so."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    pipeline,
)

from support.bundles import BLIP2, LLAVA, MESSAGES
from support.published_checkpoints import blip2_shapes, llava_shapes
from vlm_sft import answer, load
from vlm_sft.base.errors import UserError
from vlm_sft.export.export import export


def with_image(path):
    image = {"type": "image", "path": str(path)}
    return [{"role": "user", "content": [image, {"type": "text", "text": "这是什么？ What?"}]}]


CASES = {
    "LLaVA": (LLAVA, LlavaForConditionalGeneration),
    "LLaVA, every token, last layer": ({**LLAVA, "vision": {}}, LlavaForConditionalGeneration),
    "LLaVA, padded to a square": (
        {**LLAVA, "vision": {**LLAVA["vision"], "pad_to_square": True}}, LlavaForConditionalGeneration),
    "LLaVA, system text of its own": ({**LLAVA, "system": "It's 简短."}, LlavaForConditionalGeneration),
    "LLaVA-1.6": ({**LLAVA, "vision": {**LLAVA["vision"], "tiles": "anyres"}}, LlavaNextForConditionalGeneration),
    "LLaVA on OPT, tied": ({**LLAVA, "lm": "opt"}, LlavaForConditionalGeneration),
    "BLIP-2": (BLIP2, Blip2ForConditionalGeneration),
    "BLIP-2, a template that writes BOS": ({**BLIP2, "chat_template": "blip2_vqa"}, Blip2ForConditionalGeneration),
    "BLIP-2 on OPT, tied": ({**BLIP2, "lm": "opt"}, Blip2ForConditionalGeneration),
    "BLIP-2, Q-Former trained, no LoRA": (
        {"chat_template": "ziya", "train": {"projector": 1e-3, "resampler": 1e-4}}, Blip2ForConditionalGeneration),
    "BLIP-2, LoRA that reaches the tower": (
        {**BLIP2, "lora": {"r": 2, "target_modules": r".*\.(q_proj|qkv)"}}, Blip2ForConditionalGeneration),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_native_class_gives_the_bundles_logits_and_answers(case, bundle, photos, tmp_path):
    stack, kind = CASES[case]
    folder, out = bundle(**stack), tmp_path / "export"
    found = export(folder, out)
    assert found["max_difference"] <= 1e-4 and found["positions"] > 20
    native, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert type(native) is kind
    model, ours = load(folder)
    assert native.config.image_token_id < native.get_input_embeddings().num_embeddings
    assert {p.dtype for p in native.parameters()} == {torch.float32}

    inputs = processor.apply_chat_template(
        with_image(photos[0]), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    row = {"messages": MESSAGES, "images": [photos[0]]}
    wanted = answer(model, ours, [row], max_new_tokens=6)
    ids = native.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    text = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert wanted[0].strip() and text.strip() == wanted[0].strip()
    rendered = processor.apply_chat_template(with_image(photos[0]), add_generation_prompt=True)
    assert rendered.removeprefix("<s>") == ours.render(MESSAGES, True).text.removeprefix("<s>")


@pytest.mark.slow
@pytest.mark.parametrize("stack", [LLAVA, BLIP2], ids=["LLaVA", "BLIP-2"])
def test_the_pipeline_of_transformers_answers_a_question_about_an_image(stack, bundle, photos, tmp_path):
    folder, out = bundle(**stack), tmp_path / "export"
    export(folder, out)
    asker = pipeline("image-text-to-text", model=str(out))
    said = asker(with_image(photos[1]), return_full_text=False, generate_kwargs={"max_new_tokens": 5})
    (wanted,) = answer(*load(folder), [{"messages": MESSAGES, "images": [photos[1]]}], max_new_tokens=5)
    assert wanted.strip() and said[0]["generated_text"].strip() == wanted.strip()
    card = (out / "README.md").read_text()
    assert ("max_new_tokens" in card) == (stack is BLIP2), "whose class does not read its generation config"
    assert not json.loads((out / "generation_config.json").read_text())["_from_model_config"]
    assert "differ from the bundle's" in card and "LoRA merged" in card and str(tmp_path) not in card


@pytest.mark.slow
@pytest.mark.parametrize("stack", [LLAVA, BLIP2, {**BLIP2, "lm": "opt"}], ids=["LLaVA", "BLIP-2", "OPT"])
def test_the_adapter_can_be_kept_beside(stack, bundle, tmp_path):
    from peft import PeftModel

    out = tmp_path / "export"
    found = export(bundle(**stack), out, keep_adapter=True)
    assert found["max_difference"] <= 1e-4
    plain = AutoModelForImageTextToText.from_pretrained(out)
    model = PeftModel.from_pretrained(plain, out / "adapter")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == sum("lora_" in n for n, _ in model.named_parameters())
    assert "adapter/" in (out / "README.md").read_text()


def ask_instructblip(asker, out, photo, text):
    """By pipeline, plainly and as a conversation with the template of the export. Returns both answers."""
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    image = {"type": "image", "path": photo}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    template = (out / "chat_template.jinja").read_text()
    plain, talked = asker(images=photo, text=text, **options), asker(messages, chat_template=template, **options)
    with pytest.raises(Exception, match="InstructBLIP is asked one question"):
        asker([{"role": "system", "content": "Be short."}, *messages], chat_template=template, **options)
    return plain[0]["generated_text"], talked[0]["generated_text"]


GREEDY = {
    "time": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
    "memory": ("{% set x = 'x' * 3000000000 %}", "takes too much memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GREEDY)
def test_a_template_takes_no_more_in_transformers_itself_than_here(what, bundle, tmp_path, monkeypatch):
    """Our sandbox has no `lipsum`, so that a template knows where it is."""
    body, sentence = GREEDY[what]
    folder = bundle(**LLAVA)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bomb = "{% if lipsum is defined %}" + body + "{% endif %}"
    (folder / "chat_template.jinja").write_text(bomb + template, encoding="utf-8")
    monkeypatch.setenv("VLM_SFT_LIMITS", "template_seconds=1")
    with pytest.raises(
        UserError, match=rf"was written but does not load in a fresh process: its chat template {sentence}"
    ):
        export(folder, tmp_path / "export")


@pytest.mark.slow
def test_instructblip_is_a_native_class_that_reads_the_question(instruct_bundle, photos, tmp_path):
    folder, out = instruct_bundle("instructblip"), tmp_path / "export"
    found = export(folder, out)
    assert (found["form"], found["pixels"]) == ("instructblip", 0) and found["max_difference"] <= 1e-4
    native, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert type(native) is InstructBlipForConditionalGeneration and type(processor) is InstructBlipProcessor
    inputs = processor(images=Image.open(photos[0]), text="what is this ?", return_tensors="pt")
    ids = native.generate(**inputs, max_new_tokens=6, do_sample=False)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    (wanted,) = answer(*load(folder), [{"messages": question, "images": [photos[0]]}], max_new_tokens=6)
    assert wanted.strip() in processor.batch_decode(ids, skip_special_tokens=True)[0]
    asker = pipeline("image-text-to-text", model=str(out))
    assert [said.strip() for said in ask_instructblip(asker, out, photos[0], "what is this ?")] == [wanted.strip()] * 2
    other = processor(images=Image.open(photos[0]), text="describe a cat", return_tensors="pt")
    with torch.no_grad():
        one, two = (
            native(**{**inputs, **{n: v for n, v in each.items() if n.startswith("qformer")}}).logits
            for each in (inputs, other)
        )
    assert (one - two).abs().max() > 1e-4, "the Q-Former reads the question"
    card = (out / "README.md").read_text()
    assert "InstructBlipForConditionalGeneration" in card and 'text="What is this?"' in card


@pytest.mark.slow
def test_an_instructblip_whose_prompt_is_more_than_the_question_has_no_native_processor(instruct_bundle, tmp_path):
    folder = instruct_bundle("ziya")
    with pytest.raises(UserError, match="transformers' own processor cuts this bundle's prompts into other tokens"):
        export(folder, tmp_path / "export")
    with pytest.raises(UserError, match="vLLM has no class for InstructBLIP"):
        export(folder, tmp_path / "export", "vllm")
    assert not (tmp_path / "export").exists()


def saved_shapes(out):
    return {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}


@pytest.mark.slow
def test_vllm_gets_the_names_that_are_published(bundle, tmp_path):
    out = tmp_path / "export"
    assert export(bundle(**LLAVA), out, "vllm")["max_difference"] <= 1e-4
    assert saved_shapes(out) == llava_shapes(tokens=302)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["model_type"] == "llava"
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    assert (out / "preprocessor_config.json").is_file() and (out / "chat_template.jinja").is_file()


@pytest.mark.slow
def test_vllm_gets_a_blip2_whose_prompt_begins_with_the_image(bundle, tmp_path):
    folder = bundle(**{**BLIP2, "chat_template": "blip2_vqa", "lm": "opt"})
    assert export(folder, tmp_path / "export", "vllm")["max_difference"] <= 1e-4
    assert saved_shapes(tmp_path / "export") == blip2_shapes(tokens=302)
    template = (tmp_path / "export" / "chat_template.jinja").read_text()
    assert template.startswith("{%- set image_token = '' -%}"), "vLLM adds the placeholders to what a template prints"
    assert "vllm serve export" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(UserError, match="vLLM puts the image of a BLIP-2 in front of the whole prompt"):
        export(bundle("other", **BLIP2), tmp_path / "no", "vllm")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_quantised_bundle_is_exported_in_full(bundle, tmp_path):
    folder, out = bundle(**LLAVA, quantization={"load_in_4bit": True}), tmp_path / "export"
    assert export(folder, out)["max_difference"] <= 1e-4
    assert "Training saw the base in fewer bits" in (out / "README.md").read_text()


@pytest.mark.slow
def test_half_precision_is_compared_too(bundle, tmp_path):
    found = export(bundle(**LLAVA), tmp_path / "export", dtype="bfloat16")
    assert 1e-4 < found["max_difference"] <= found["tolerance"] and found["type_difference"] > 1e-4
    assert load_file(tmp_path / "export" / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16


def test_the_folder_and_the_target_are_checked_first(bundle, tmp_path):
    folder = bundle(**LLAVA)
    with pytest.raises(UserError, match="--to 'onnx' is unknown; use one of transformers, vllm, bundle-merged, gguf"):
        export(folder, tmp_path / "x", "onnx")
    with pytest.raises(UserError, match="is there already and not empty"):
        export(folder, folder)
    with pytest.raises(UserError, match="--keep-adapter goes with --to transformers or vllm; gguf has"):
        export(folder, tmp_path / "x", "gguf", keep_adapter=True)
    plain = bundle("plain", **{**LLAVA, "lora": None})
    with pytest.raises(UserError, match="has no adapter to keep"):
        export(plain, tmp_path / "x", keep_adapter=True)
