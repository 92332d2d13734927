"""A Q-Former that reads the instruction, in training, chat and bundle; equal to transformers' InstructBLIP."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration

from support.shrink import WORDS
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.bundle.load import load
from vlm_sft.inference.generation import answer, prompt_batch
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import train


@pytest.fixture
def recipe(recipe_file, instructblip, tmp_path, photos):
    """Rows with a question, one of them in Chinese, all four parts out of the one checkpoint."""
    rows = [{"id": i, "image": photos[i], "question": q, "answer": "a cat"} for i, q in enumerate(QUESTIONS)]
    path = tmp_path / "vqa.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    piece = {"pretrained": instructblip}
    stack = {
        "vision_tower": piece,
        "resampler": {"type": "instruct_qformer", **piece},
        "projector": {"type": "linear", **piece},
        "language_model": piece,
    }
    data = {"train": [{"path": str(path), "format": "vqa"}]}
    return load_recipe(
        recipe_file(stack=stack, data=data, chat_template="ziya", train={"resampler": 1e-2, "projector": 1e-2})
    )


QUESTIONS = ["what is this ?", "describe a cat", "这 是 猫 ?", "what is a cat ?"]


def conversation(text, photo, *turns):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return {"messages": [user, *turns], "images": [{"path": photo, "bytes": None}], "id": text}


def test_logits_equal_those_of_the_native_class(recipe, instructblip, photos):
    native = InstructBlipForConditionalGeneration.from_pretrained(instructblip).eval()
    stack = build_stack(recipe)
    model = stack.model.eval()
    batch = prompt_batch(stack.processor, [conversation(q, p) for q, p in zip(QUESTIONS[:3], photos, strict=False)])
    words = batch["qformer_input_ids"]
    assert words[2].tolist()[:4] == [2, WORDS.index("这"), WORDS.index("是"), WORDS.index("猫")]
    assert batch["qformer_attention_mask"].sum(1).tolist() == [6, 5, 6]
    with torch.no_grad():
        mine = model.get_image_features(
            batch["pixel_values"],
            qformer_input_ids=words,
            qformer_attention_mask=batch["qformer_attention_mask"],
        )
        theirs = native.get_image_features(
            pixel_values=batch["pixel_values"],
            qformer_input_ids=words,
            qformer_attention_mask=batch["qformer_attention_mask"],
        )
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        other = model.get_image_features(batch["pixel_values"], qformer_input_ids=words.flip(0))
    assert (other - mine).abs().max() > 1e-3, "the instruction must change what is seen"


def test_each_image_goes_with_the_words_beside_it(recipe, photos):
    processor = build_stack(recipe).processor
    image, say = {"type": "image"}, lambda text: {"type": "text", "text": text}
    messages = [
        {"role": "user", "content": [image, say("what is "), image, say("this ?")]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "describe"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [image]},
        {"role": "assistant", "content": "猫"},
    ]
    assert processor.instructions(messages) == ["what is this ?", "what is this ?", ""]
    collator = MultimodalCollator(processor, max_length=90)
    images = [{"path": photo, "bytes": None} for photo in photos[:3]]
    row = {"messages": messages, "images": images, "id": "three"}
    plain = {"messages": [{"role": "user", "content": "describe"}, messages[1]], "images": [], "id": "text"}
    batch = collator([plain, row])
    assert len(batch["pixel_values"]) == len(batch["qformer_input_ids"])
    assert "qformer_input_ids" not in collator([plain])


def test_a_long_instruction_loses_its_beginning(recipe):
    processor = build_stack(recipe).processor
    inputs = processor.image_inputs([Image.new("RGB", (28, 28))], ["what " * 300 + "cat"])["qformer_input_ids"]
    assert inputs.shape == (1, 128) and inputs[0, -2:].tolist() == [WORDS.index("cat"), WORDS.index("[SEP]")]


def test_a_model_without_its_instruction_says_so(recipe, photos):
    stack = build_stack(recipe)
    batch = prompt_batch(stack.processor, [conversation(QUESTIONS[0], photos[0])])
    with pytest.raises(ValueError, match=r"give qformer_input_ids with 1 rows \(got none\); the processor makes them"):
        stack.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])


def test_every_trained_tensor_has_a_gradient_without_images_too(recipe):
    stack = build_stack(recipe)
    plain = {"messages": [{"role": "user", "content": "describe"}, {"role": "assistant", "content": "a cat"}],
             "images": [], "id": "text"}  # fmt: skip
    stack.model.train()
    stack.model(**MultimodalCollator(stack.processor)([plain])).loss.backward()
    lacking = [n for n, p in stack.model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def test_it_trains_saves_and_answers(recipe, photos):
    """That the bundle gives the same logits is checked by `train` itself (parity)."""
    folder = train(recipe) or recipe.sft["output_dir"]
    model, processor = load(recipe.sft["output_dir"], device="cpu")
    assert processor.qformer_tokenizer.truncation_side == "left" and folder
    rows = [conversation(q, p) for q, p in zip(QUESTIONS, photos, strict=False)]
    together = answer(model, processor, rows, max_new_tokens=4)
    assert together == [answer(model, processor, [row], max_new_tokens=4)[0] for row in rows]
    assert len(answer(model, processor, rows[:2], max_new_tokens=4, num_beams=2)) == 2


def test_the_kind_must_be_that_of_the_checkpoint(recipe_file, instructblip, pieces):
    wrong = ((instructblip, "qformer", "instruct_qformer"), (pieces["blip2"], "instruct_qformer", "qformer"))
    for source, kind, other in wrong:
        piece = {"pretrained": source}
        stack = {"vision_tower": piece, "resampler": {"type": kind, **piece}, "projector": {"type": "linear"},
                 "language_model": {"pretrained": pieces["llama"]}}  # fmt: skip
        recipe = load_recipe(recipe_file(stack=stack))
        with pytest.raises(UserError, match=rf"holds a resampler of the type {other}, not {kind}\.$"):
            build_stack(recipe)
    stack["resampler"] = {"type": "qformer", "tokenizer": "x", **piece}
    path = recipe_file(stack=stack)
    with pytest.raises(UserError, match="a resampler of type qformer reads no text; remove `tokenizer`"):
        load_recipe(path)
