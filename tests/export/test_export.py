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
    GenerationConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    pipeline,
)

from support import published_names
from support.bundles import BLIP2, LLAVA, MESSAGES, trained
from vlm_sft import answer, load
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.handover import hand_over
from vlm_sft.export.export import export
from vlm_sft.export.native_model import grow_vocabulary, native_form
from vlm_sft.export.native_processor import native_template
from vlm_sft.stack.build_stack import build_stack


@pytest.fixture
def bundle(bundle_recipe, tmp_path):
    """Trains nothing, but moves what would be trained, and saves it. Returns the folder."""

    def make(name="bundle", **stack):
        trained(bundle_recipe(**stack), tmp_path / name)
        return tmp_path / name

    return make


def with_image(path):
    image = {"type": "image", "path": str(path)}
    return [{"role": "user", "content": [image, {"type": "text", "text": "这是什么？ What?"}]}]


CASES = {
    "LLaVA": (LLAVA, LlavaForConditionalGeneration),
    "LLaVA, every token, last layer": ({**LLAVA, "vision": {}}, LlavaForConditionalGeneration),
    "LLaVA, padded to a square": (
        {**LLAVA, "vision": {**LLAVA["vision"], "pad_to_square": True}}, LlavaForConditionalGeneration),
    "LLaVA, system text of its own": ({**LLAVA, "system": "It's 简短."}, LlavaForConditionalGeneration),
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


@pytest.mark.slow
def test_a_merged_instructblip_still_reads_the_question(instruct_bundle, photos, tmp_path, in_process_parity):
    folder, out = instruct_bundle("instructblip"), tmp_path / "merged"
    assert export(folder, out, "bundle-merged")["merge_difference"] <= 1e-4
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
         "images": [photos[photo]]}
        for text in ("What is this?", "Describe the cat.") for photo in (0, 1)
    ]  # fmt: skip
    model, processor = load(out)
    assert not hasattr(model, "peft_config") and processor.qformer_tokenizer is not None
    wanted = answer(*load(folder), rows, max_new_tokens=6)
    assert answer(model, processor, rows, max_new_tokens=6) == wanted and len(set(wanted)) > 1


def saved_shapes(out):
    return {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}


@pytest.mark.slow
def test_vllm_gets_the_names_that_are_published(bundle, tmp_path):
    out = tmp_path / "export"
    assert export(bundle(**LLAVA), out, "vllm")["max_difference"] <= 1e-4
    assert saved_shapes(out) == published_names.llava(tokens=302)
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
    assert saved_shapes(tmp_path / "export") == published_names.blip2(tokens=302)
    template = (tmp_path / "export" / "chat_template.jinja").read_text()
    assert template.startswith("{%- set image_token = '' -%}"), "vLLM adds the placeholders to what a template prints"
    assert "vllm serve export" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(UserError, match="vLLM puts the image of a BLIP-2 in front of the whole prompt"):
        export(bundle("other", **BLIP2), tmp_path / "no", "vllm")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stack", [LLAVA, {**BLIP2, "lora": {"r": 2, "target_modules": r".*\.(q_proj|qkv)"}}])
def test_a_merged_bundle_is_a_bundle_and_the_next_stage_starts_from_it(stack, bundle, bundle_recipe, tmp_path):
    folder, out = bundle(**stack), tmp_path / "merged"
    found = export(folder, out, "bundle-merged")
    assert found["max_difference"] <= 1e-5 and found["merge_difference"] <= 1e-4
    model, processor = load(out)
    before, _ = load(folder)
    ids = torch.tensor([[1, *[processor.image_token_id] * processor.num_image_tokens, 40, 41]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        difference = (
            model(input_ids=ids, pixel_values=pixels).logits - before(input_ids=ids, pixel_values=pixels).logits
        )
    assert difference.abs().max() <= 1e-4
    assert not hasattr(model, "peft_config")
    following = bundle_recipe(**{**stack, "lm": str(out / "language_model"), "name": "next", "init_from": str(out)})
    assert "projector" in hand_over(build_stack(following), out)


@pytest.mark.slow
def test_a_quantised_bundle_is_exported_in_full(bundle, tmp_path):
    folder, out = bundle(**LLAVA, quantization={"load_in_4bit": True}), tmp_path / "export"
    assert export(folder, out)["max_difference"] <= 1e-4
    assert "Training saw the base in fewer bits" in (out / "README.md").read_text()


@pytest.mark.slow
def test_half_precision_is_compared_too(bundle, tmp_path):
    found = export(bundle(**LLAVA), tmp_path / "export", dtype="bfloat16")
    assert 1e-4 < found["max_difference"] <= found["tolerance"]
    assert load_file(tmp_path / "export" / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16


NONE = {
    "pixel_shuffle": ({**LLAVA, "projector": {"type": "pixel_shuffle"}}, "no class has a pixel_shuffle projector"),
    "Q-Former and mlp": ({**BLIP2, "projector": {"type": "mlp"}}, "BLIP-2's projector is linear, this one is mlp"),
    "mlp of depth 3": ({**LLAVA, "projector": {"type": "mlp", "depth": 3}}, "an mlp of depth 2, and this is not"),
    "linear": ({**LLAVA, "projector": {"type": "linear"}}, "an mlp of depth 2, and this is not"),
    "BLIP-2's ViT before an mlp": ({**LLAVA, "tower": "blip2"}, "cannot hold a 'blip_2_vision_model'"),
    "an earlier layer": ({**BLIP2, "vision": {"feature_layer": -2}}, "reads every token after the ViT's last norm"),
}


@pytest.mark.parametrize("case", NONE)
def test_what_has_no_native_form_says_so_in_one_sentence(case, bundle_recipe):
    stack, sentence = NONE[case]
    model = build_stack(bundle_recipe(**stack)).model
    with pytest.raises(UserError, match=rf"has no native form in transformers: .*{sentence}.*; use --to bundle-merged"):
        native_form(model)


def test_towers_and_epsilons_that_the_classes_read_otherwise(stack_recipe, bundle_recipe):
    siglip = build_stack(stack_recipe("siglip", projector="mlp")).model
    with pytest.raises(UserError, match="feature_layer -1 is read after the tower's last norm here"):
        native_form(siglip)
    assert native_form(build_stack(stack_recipe("siglip", projector="mlp", vision={"feature_layer": -2})).model)
    blip2 = build_stack(bundle_recipe(**BLIP2)).model
    blip2.model.vision_tower.post_layernorm.eps = 1e-5
    with pytest.raises(UserError, match="post_layernorm of its ViT has the epsilon 1e-05, BLIP-2's class 1e-06"):
        native_form(blip2)


@pytest.mark.parametrize("lm", ["llama", "opt"])
def test_new_rows_of_the_vocabulary_are_never_the_likeliest(lm, bundle_recipe):
    model = build_stack(bundle_recipe(**{**LLAVA, "lm": lm})).model
    old = model.get_input_embeddings().num_embeddings
    hidden = torch.randn(50, 32)
    before = model.lm_head(hidden)
    grow_vocabulary(model, old + 3)
    after = model.lm_head(hidden)
    assert torch.equal(after[:, :old], before) or torch.allclose(after[:, :old], before, atol=1e-6)
    assert after.shape[1] == old + 3 and (after.argmax(-1) < old).all()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (lm == "opt")


def test_the_folder_and_the_target_are_checked_first(bundle, tmp_path):
    folder = bundle(**LLAVA)
    with pytest.raises(UserError, match="--to 'onnx' is unknown; use one of transformers, vllm, bundle-merged"):
        export(folder, tmp_path / "x", "onnx")
    with pytest.raises(UserError, match="is there already and not empty"):
        export(folder, folder)
    with pytest.raises(UserError, match="--keep-adapter goes with --to transformers"):
        export(folder, tmp_path / "x", "vllm", keep_adapter=True)
    plain = bundle("plain", **{**LLAVA, "lora": None})
    with pytest.raises(UserError, match="has no adapter to keep"):
        export(plain, tmp_path / "x", keep_adapter=True)


def test_a_system_text_with_quotes_survives_in_the_template(bundle_recipe):
    stack = build_stack(bundle_recipe(**{**LLAVA, "system": 'It\'s "short" \\ 简短 {{ x }}'}))
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=native_template(stack.processor), bos_token="<s>", eos_token="</s>"
    )
    assert text.removeprefix("<s>") == stack.processor.render(MESSAGES).text


def test_answers_end_where_the_template_ends_them(bundle_recipe):
    from vlm_sft.export.native_model import native_generation

    stack = build_stack(bundle_recipe(**LLAVA))
    config = native_generation(stack.model, stack.processor, {"max_new_tokens": 7})
    assert isinstance(config, GenerationConfig) and config.eos_token_id == [2] and config.max_new_tokens == 7
