"""InstructBLIP and BLIP-2 on FlanT5, from a checkpoint as it is published to an answer: what a user types."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from openai import OpenAI
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from support.asking import running
from support.flant5 import write_blip2_flant5, write_instructblip_flant5, write_lavis_blip2_flant5
from support.tiny_pieces import tiny_recipe
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.cli.main import app
from vlm_sft.export.export import export
from vlm_sft.inference.generation import prompt_batch
from vlm_sft.inference.likelihood import likelihoods
from vlm_sft.serving.bundles import load_bundles
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import train

KINDS = {
    "blip2": (write_blip2_flant5, "qformer", "blip2_flant5_vqa", Blip2ForConditionalGeneration),
    "instructblip": (write_instructblip_flant5, "instruct_qformer", "flant5", InstructBlipForConditionalGeneration),
}
PAIRS = [("What is this?", "a red 3"), ("这是什么？", "左上角是红色的3"), ("how many cats are there?", "two"),
         ("describe the image", "a blue 7 at the bottom right")]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def trained(request, shared_photos, tmp_path_factory):
    """(bundle, name of the kind) of two steps with LoRA in the attention of encoder and decoder, and the projector."""
    write, resampler, template, _ = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    published = write(folder / "published", equal_depth=True)
    rows = [
        {"id": k, "image": shared_photos[k], "question": question, "answer": said}
        for k, (question, said) in enumerate(PAIRS)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    source = {"path": str(folder / "rows.jsonl"), "format": "vqa"}
    source["image_folders"] = [str(folder), shared_photos[0].rpartition("/")[0]]
    parts = {name: {"pretrained": published} for name in ("vision_tower", "language_model")}
    parts["resampler"] = {"type": resampler, "pretrained": published}
    parts["projector"] = {"type": "linear", "pretrained": published}
    made = tiny_recipe({}, "", folder / "bundle", stack=parts, chat_template=template,
                       data={name: [source] for name in ("train", "eval", "test")},
                       lora={"r": 2, "target_modules": ["q", "v"]})  # fmt: skip
    made["sft"] |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, allow_unicode=True), encoding="utf-8")
    return train(load_recipe(folder / "recipe.yaml")), request.param


def asked(photos):
    return [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
         "images": [{"path": photo, "bytes": None}]}
        for (question, _), photo in zip(PAIRS, photos, strict=False)
    ]  # fmt: skip


@pytest.mark.slow
def test_lora_moves_in_encoder_and_decoder_and_the_bundle_loads_with_equal_logits(trained, shared_photos):
    bundle, _ = trained
    assert json.loads((bundle / "bundle.json").read_text())["parity"]["equal"]
    moved = {n: t for n, t in load_file(bundle / "adapter_model.safetensors").items() if "lora_B" in n}
    for place in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"):
        assert sum(place in name and bool(t.abs().sum() > 0) for name, t in moved.items()) == 1
    history = json.loads((bundle / "metrics.json").read_text())
    logged = next(row for row in history if "loss" in row)
    assert 0 < logged["loss"] < 20 and 0 <= logged["padding_share"] < 1
    evaluated = next(row for row in history if "eval_loss" in row)
    assert evaluated["eval_loss"] > 0 and evaluated["eval_image_use"] != 0
    model, processor = load(bundle)
    rows = asked(shared_photos)
    together = answer(model, processor, rows, max_new_tokens=6)
    assert list(together) == [answer(model, processor, [row], max_new_tokens=6)[0] for row in rows]


@pytest.mark.slow
def test_chat_generate_and_evaluate(trained, shared_photos, tmp_path):
    bundle, _ = trained

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    said = run("chat", bundle, "--image", shared_photos[0], "这是什么？", "--set", "max_new_tokens=4")
    assert said.exit_code == 0, said.output
    assert run("evaluate", bundle).exit_code == 0
    found = json.loads((bundle / "eval.json").read_text(encoding="utf-8"))
    assert sum(found["questions"]["answers"].values()) == len(PAIRS)


@pytest.mark.slow
def test_the_native_class_gives_the_bundles_logits_and_answers(trained, shared_photos, tmp_path):
    bundle, name = trained
    out = tmp_path / "native"
    found = export(bundle, out)
    kind = KINDS[name][3]
    assert found["class"] == kind.__name__ and found["max_difference"] <= 1e-4 and found["positions"] > 3
    native, processor = kind.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out, backend="pil")
    row = asked(shared_photos)[0]
    (wanted,) = answer(*load(bundle), [row], max_new_tokens=6)
    picture = Image.open(shared_photos[0]).convert("RGB")
    if name == "blip2":
        text = processor.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    else:
        text = PAIRS[0][0]
    inputs = processor(text=text, images=picture, return_tensors="pt")
    # BLIP's classes generate by their language model, which does not read the export's generation config.
    unsaid = native.generation_config.suppress_tokens
    ids = native.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=unsaid)
    assert AutoTokenizer.from_pretrained(out).decode(ids[0], skip_special_tokens=True).strip() == wanted.strip()
    with pytest.raises(UserError, match="use --to transformers"):
        export(bundle, tmp_path / "vllm", to="vllm")


@pytest.mark.slow
def test_an_answer_is_as_likely_as_its_tokens_are(trained, shared_photos):
    model, processor = load(trained[0])
    rows = [
        {**row, "id": "1", "messages": [*row["messages"], {"role": "assistant", "content": said}]}
        for row, (_, said) in zip(asked(shared_photos), PAIRS, strict=True)
    ]
    together = likelihoods(model, processor, rows)
    assert [each.log for each in together] == pytest.approx([likelihoods(model, processor, [r])[0].log for r in rows])
    assert together[2].ids == processor.tokenizer("two").input_ids and together[2].log < 0


@pytest.mark.slow
def test_merged_its_language_model_is_a_t5_of_its_own(trained, shared_photos, tmp_path):
    bundle, _ = trained
    export(bundle, tmp_path / "merged", to="bundle-merged")
    alone = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged" / "language_model")
    assert alone.lm_head.weight is not alone.shared.weight
    row = asked(shared_photos)[0]
    (wanted,), (found,) = (answer(*load(each), [row], max_new_tokens=6) for each in (bundle, tmp_path / "merged"))
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["blip2"], indirect=True)
def test_in_four_bits(trained, tmp_path):
    few = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    overrides = [few, f"sft.output_dir={tmp_path / 'few'}", "sft.eval_strategy=no"]
    bundle = train(load_recipe(trained[0].parent / "recipe.yaml", overrides))
    assert json.loads((bundle / "bundle.json").read_text())["parity"]["equal"]
    model, _ = load(bundle)
    core = model.get_base_model().model.language_model
    first = core.encoder.block[0].layer
    assert (
        type(first[0].SelfAttention.k).__name__ == "Linear4bit"
        and type(first[-1].DenseReluDense.wo).__name__ == "Linear"
    )
    assert type(model.get_base_model().lm_head).__name__ == "Linear"


@pytest.mark.slow
def test_the_adapter_can_be_kept_beside_the_native_class(trained, tmp_path):
    from peft import PeftModel

    bundle, name = trained
    found = export(bundle, tmp_path / "native", keep_adapter=True)
    assert found["max_difference"] <= 1e-4
    model = PeftModel.from_pretrained(
        KINDS[name][3].from_pretrained(tmp_path / "native"), tmp_path / "native" / "adapter"
    )
    names = [n for n, _ in model.named_parameters() if "lora_B" in n]
    assert any(".encoder." in n for n in names) and any(".decoder." in n for n in names)
    assert sum(torch.count_nonzero(p) > 0 for n, p in model.named_parameters() if "lora_B" in n) == len(names)


@pytest.mark.slow
def test_it_is_served_whole_and_streamed_as_it_answers(trained, shared_photos):
    """Several at once, with stop texts, probabilities and a seed; an encoder reads questions of other lengths."""
    folder, _ = trained
    served = load_bundles([str(folder)], {})
    model, processor = load(folder)
    with running(served) as caller:
        client = OpenAI(base_url=caller.url, api_key="none", max_retries=0)
        (name,) = [each.id for each in client.models.list()]

        def body(number, **more):
            url = "data:image/png;base64," + base64.b64encode(Path(shared_photos[number]).read_bytes()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PAIRS[number][0]}]
            messages = [{"role": "user", "content": content}]
            return {"model": name, "messages": messages, "max_tokens": 9, "temperature": 0, **more}

        wanted = answer(model, processor, asked(shared_photos), max_new_tokens=9)
        with ThreadPoolExecutor(4) as threads:
            got = list(threads.map(lambda number: client.chat.completions.create(**body(number)), range(4)))
        assert [each.choices[0].message.content for each in got] == wanted and any(wanted)
        for number in range(4):
            chunks = list(client.chat.completions.create(**body(number), stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted[number]
        drawn = [client.chat.completions.create(**body(0, temperature=1.5, seed=3)) for _ in range(2)]
        assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content
        told = client.chat.completions.create(**body(1, logprobs=True, top_logprobs=2)).choices[0].logprobs.content
        assert told and all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in told)
        (whole,) = [text for text in wanted if len(text) > 2][:1]
        number, mark = wanted.index(whole), whole[1:3]
        stopped = client.chat.completions.create(**body(number, stop=[mark])).choices[0]
        assert stopped.message.content == whole.split(mark)[0].strip() and stopped.finish_reason == "stop"


@torch.no_grad()
def test_from_the_files_that_lavis_publishes_to_an_answer(recipe_file, shared_photos, tmp_path):
    files, native = write_lavis_blip2_flant5(tmp_path)
    heads = {"num_attention_heads": 4}
    stack = {
        "vision_tower": {"pretrained": files["vit"], "more": [files["blip2"]], "config": heads},
        "resampler": {"type": "qformer", "pretrained": files["blip2"], "config": {"num_attention_heads": 2}},
        "projector": {"type": "linear", "pretrained": files["blip2"]},
        "language_model": {"pretrained": files["t5"]},
    }
    built = build_stack(load_recipe(recipe_file(stack=stack, chat_template="flant5")))
    model, processor = built.model.eval(), built.processor
    said = answer(model, processor, asked(shared_photos), max_new_tokens=8)
    batch = prompt_batch(processor, asked(shared_photos), model.device)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, native.config.image_token_id)
    given = {"input_ids": ids, "pixel_values": batch["pixel_values"], "attention_mask": batch["attention_mask"]}
    starts = batch["decoder_input_ids"]
    wanted = native(**given, decoder_input_ids=starts).logits
    got = model(**given | {"input_ids": batch["input_ids"]}, decoder_input_ids=starts).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    theirs = native.generate(**given, max_new_tokens=8, do_sample=False)
    assert [text.strip() for text in processor.batch_decode(theirs, skip_special_tokens=True)] == said and any(said)
