"""FlanT5 as the language model of a stack: transformers' numbers of BLIP-2 and InstructBLIP, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    T5ForConditionalGeneration,
)

from support.flant5 import (
    flant5_config,
    spread,
    write_blip2_flant5,
    write_flant5,
    write_instructblip_flant5,
)
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import IGNORED, INSTRUCTION
from vlm_sft.batch.counts import ANSWERS, counts_of
from vlm_sft.inference.generation import answer, left_padded, new_tokens, pictures_of
from vlm_sft.inference.settings import generation_options
from vlm_sft.model.encoder_decoder import core_of, with_head
from vlm_sft.stack.build_stack import build_empty_stack, build_stack

KINDS = {
    "blip2": (write_blip2_flant5, Blip2ForConditionalGeneration, "qformer", "blip2_flant5_vqa"),
    "instructblip": (write_instructblip_flant5, InstructBlipForConditionalGeneration, "instruct_qformer", "flant5"),
}
TALKS = [("What is this?", "a red 3"), ("这是什么？ describe the image in many words", "two dogs at the top left"),
         ("how many cats are there?", "two")]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    """(folder, transformers' model, kind of the resampler, template)."""
    write, native, resampler, template = KINDS[request.param]
    folder = write(tmp_path_factory.mktemp(request.param) / "published")
    return folder, native.from_pretrained(folder).eval(), resampler, template


def stack_of(folder, resampler, template):
    parts = {name: {"pretrained": folder} for name in ("vision_tower", "language_model")}
    parts["resampler"] = {"type": resampler, "pretrained": folder}
    return {"stack": {**parts, "projector": {"type": "linear", "pretrained": folder}}, "chat_template": template}


@pytest.fixture
def stack(published, recipe_file):
    folder, _, resampler, template = published
    made = build_stack(load_recipe(recipe_file(**stack_of(folder, resampler, template))))
    made.model.eval().requires_grad_(True)
    return made


def row(photo, question, said=None):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if said is not None:
        messages.append({"role": "assistant", "content": said})
    return {"messages": messages, "images": [photo]}


def batch_of(processor, photos, side="right"):
    rows = [row(photo, *talk) for photo, talk in zip(photos, TALKS, strict=False)]
    chats = [processor.encode_chat(each["messages"]) for each in rows]
    pictures = [pictures_of(processor, each, chat) for each, chat in zip(rows, chats, strict=True)]
    images = [image for each in pictures for image in each.images]
    said = [text for each in pictures for text in each.instructions]
    return {**processor.batch(chats, side), **processor.image_inputs(images, said)}


def natively(model, batch):
    """What transformers' class makes of the same batch; its labels have no place in front."""
    given = {
        name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", *INSTRUCTION) if name in batch
    }
    return model(**given, labels=batch["labels"][:, 1:].contiguous())


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_loss_and_gradients_are_those_of_transformers(published, stack, photos, side):
    native = published[1]
    batch = batch_of(stack.processor, photos, side)
    assert not batch["attention_mask"].all()
    wanted, found = natively(native, batch), stack.model(**batch)
    learned = batch["labels"][:, 1:] != IGNORED
    torch.testing.assert_close(found.logits[:, :-1][learned], wanted.logits[learned], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0, atol=1e-5)
    alone = stack.model(**batch, **counts_of(batch, stack.processor.image_token_id), supervised_only=True)
    torch.testing.assert_close(alone.loss, wanted.loss, rtol=0, atol=1e-5)
    assert alone.token_losses.numel() == int(learned.sum())
    native.zero_grad(), wanted.loss.backward(), alone.loss.backward()
    core, theirs = stack.model.model, dict(native.language_model.named_parameters())
    pairs = [
        (core.projector.linear.weight, native.language_projection.weight),
        (core.resampler.query_tokens, native.query_tokens),
        (stack.model.lm_head.weight, theirs["lm_head.weight"]),
    ]
    pairs += [(p, theirs[name]) for name, p in core.language_model.named_parameters()]
    assert len(pairs) > 60
    for ours, native_one in pairs:
        scale = float(native_one.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours.grad, native_one.grad, rtol=1e-4, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_transformers_alone_and_in_a_batch(published, stack, photos, beams):
    native, model, processor = published[1], stack.model, stack.processor
    # transformers lays its cache out by the layers of the encoder, of which there are fewer here.
    native.language_model.config.num_hidden_layers = native.language_model.config.num_decoder_layers
    rows = [row(photo, question) for photo, (question, _) in zip(photos, TALKS, strict=False)]
    options = {"max_new_tokens": 7, "num_beams": beams}
    together = answer(model, processor, rows, **options)
    assert [str(each) for each in together] == [str(answer(model, processor, [each], **options)[0]) for each in rows]
    chats = [processor.encode_chat(each["messages"], add_generation_prompt=True) for each in rows]
    batch = left_padded(processor, chats, [pictures_of(processor, *pair) for pair in zip(rows, chats, strict=True)])
    assert batch[ANSWERS].tolist() == [[0]] * 3
    settings = generation_options(model, processor, options)
    with torch.inference_mode():
        ours = new_tokens(model, dict(batch), settings)
        given = {name: batch[name] for name in batch if name != ANSWERS}
        theirs = native.generate(**given, **options, do_sample=False)
    length = max(ours.shape[1], theirs.shape[1] - 1)
    ours, theirs = (F.pad(ids, (0, length - ids.shape[1])).tolist() for ids in (ours, theirs[:, 1:]))
    assert ours == theirs and len(set(map(tuple, ours))) > 1


def test_the_prompt_goes_to_the_encoder_and_the_last_answer_to_the_decoder(stack, photos):
    processor = stack.processor
    first = row(photos[0], *TALKS[0])["messages"]
    turns = [*first, {"role": "user", "content": "And now? 还有呢？"}, {"role": "assistant", "content": "a blue 7"}]
    batch = processor.batch([processor.encode_chat(turns), processor.encode_chat(first)])
    ids = processor.tokenizer("a blue 7").input_ids
    assert batch["labels"][0].tolist() == [IGNORED, *ids] and batch[ANSWERS][0].tolist() == [0, *ids[:-1], 0]
    prompts = processor.tokenizer.batch_decode(batch["input_ids"])
    assert "a red 3" in prompts[0] and "a blue 7" not in prompts[0] and "a red 3" not in prompts[1]
    images = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert images.tolist() == [4, 4]
    ends = batch["input_ids"].gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1)
    assert ends.flatten().tolist() == [processor.tokenizer.eos_token_id] * 2
    asked = processor.encode_chat(turns[:-1], add_generation_prompt=True)
    assert asked.input_ids == batch["input_ids"][0].tolist() and set(asked.labels) == {IGNORED}


def test_any_template_learns_its_last_answer_or_the_one_before_that_is_learned(published, recipe_file, photos):
    folder, _, resampler, _ = published
    processor = build_empty_stack(load_recipe(recipe_file(**stack_of(folder, resampler, "vicuna_v1")))).processor
    turns = [*row(photos[0], *TALKS[0])["messages"], {"role": "user", "content": "And now?"},
             {"role": "assistant", "content": "a blue 7", "loss": False}]  # fmt: skip
    labels = processor.batch([processor.encode_chat(turns)])["labels"][0].tolist()
    assert processor.tokenizer.decode([label for label in labels if label != IGNORED]).strip() == "a red 3</s>"
    del turns[-1]["loss"]
    labels = processor.batch([processor.encode_chat(turns)])["labels"][0].tolist()
    assert processor.tokenizer.decode([label for label in labels if label != IGNORED]).strip() == "a blue 7</s>"


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_by_itself_keeps_its_head_and_its_scale(tied, tmp_path):
    """The first T5 has one table and divides by its width; FlanT5 has a head of its own and does not."""
    model = spread(T5ForConditionalGeneration(flant5_config(tie_word_embeddings=tied)))
    if tied:
        model.lm_head.weight = model.shared.weight
    again = with_head(core_of(model), model.lm_head).eval()
    ids = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7, 8]])}
    torch.testing.assert_close(again(**ids).logits, model.eval()(**ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_stack_is_like_the_loaded_one(tied, published, recipe_file, photos, tmp_path):
    folder, _, resampler, template = published
    made = stack_of(folder, resampler, template)
    made["stack"]["language_model"]["pretrained"] = write_flant5(tmp_path / "t5", tie_word_embeddings=tied)
    recipe = load_recipe(recipe_file(**made))
    loaded, empty = build_stack(recipe), build_empty_stack(recipe).model
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (loaded.model, empty)]
    assert shapes[0] == shapes[1] and ("lm_head.weight" in shapes[0]) is not tied
    native = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    loaded.model.eval()
    batch = batch_of(loaded.processor, photos)
    embeds = loaded.model.model.embed(batch["input_ids"], batch["pixel_values"],
                                      **{name: batch.get(name) for name in INSTRUCTION})  # fmt: skip
    wanted = native(inputs_embeds=embeds, attention_mask=batch["attention_mask"], decoder_input_ids=batch[ANSWERS])
    torch.testing.assert_close(loaded.model(**batch).logits, wanted.logits, rtol=0, atol=1e-5)
    assert native.config.scale_decoder_outputs is tied


REFUSED = [
    ({"sft.packing": True}, "its encoder reads a row whole, and packed rows would see each other"),
    ({"sft.eval_packing": True}, "`sft.eval_packing` is not for a t5 language model"),
    ({"data.train.0.merge_by_image": True}, "`merge_by_image` is not for a t5 language model"),
    ({"lora": {"r": 2, "add_tokens": ["<a>"]}}, "`lora.add_tokens` is not for a t5 language model"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=lambda value: next(iter(value), "")[:20])
def test_what_cannot_work_is_refused_with_its_place(changes, sentence, recipe_file, tmp_path):
    folder = write_blip2_flant5(tmp_path / "published")
    path = recipe_file(**stack_of(folder, "qformer", "flant5"))
    recipe = load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    with pytest.raises(UserError) as caught:
        build_empty_stack(recipe)
    assert sentence in str(caught.value) and next(iter(changes)).split(".")[-1] in str(caught.value)


def test_a_batch_without_answers_or_in_packs_is_an_error(stack, photos):
    batch = batch_of(stack.processor, photos)
    with pytest.raises(ValueError, match="what stands before each label"):
        stack.model(**{name: tensor for name, tensor in batch.items() if name != ANSWERS})
    with pytest.raises(ValueError, match="can be neither packed nor share a prefix"):
        stack.model(**batch, row_lengths=torch.tensor([[3]]))
