"""Answers: alike alone, batched and streamed; they end where the template ends them and fit the language model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from support.tiny_pieces import tiny_stack
from vlm_sft.base.errors import UserError
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.inference.generation import (
    PromptTooLongError,
    answer,
    position_limit,
    prompt_batch,
)
from vlm_sft.inference.settings import generation_options
from vlm_sft.inference.streaming import stream_answer
from vlm_sft.templates.template import load_template

SHORT = {"max_new_tokens": 16}


def with_template(processor: VLMProcessor, template: str) -> VLMProcessor:
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    return VLMProcessor(
        images, processor.tokenizer, load_template(template), num_image_tokens=processor.num_image_tokens
    )


# ------------------------------------------------------------------------------------------- alone, batched, streamed


@pytest.mark.parametrize(
    ("language_model", "more"), [("llama", {}), ("opt", {}), ("llama", {"repetition_penalty": 1.5})]
)
def test_a_batch_answers_as_each_row_alone_does(build, pieces, ask, language_model, more):
    model, processor = build(stack=tiny_stack(pieces, lm=language_model))
    rows = [ask("这是什么？"), ask("describe these images, please", 3), ask("hi", 0), ask("what colour is it?", 2)]
    together = answer(model, processor, rows, **SHORT, **more)
    assert together == [answer(model, processor, [row], **SHORT, **more)[0] for row in rows]
    assert len(set(together)) == 4, "a model that says one thing to everybody proves nothing"


def test_the_image_is_seen(tiny, photos):
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]}]
    inputs = [prompt_batch(tiny[1], [{"messages": question, "images": [photo]}]) for photo in photos[:2]]
    with torch.inference_mode():
        first, second = (tiny[0](**batch).logits[:, -1] for batch in inputs)
    assert (first - second).abs().max() > 1e-4


def test_the_last_answer_and_the_images_of_later_messages_are_not_needed(tiny, ask, photos):
    row = ask("这是什么？")
    answered = {"messages": [*row["messages"], {"role": "assistant", "content": "猫"}], "images": photos[:3]}
    assert answer(*tiny, [answered], **SHORT) == answer(*tiny, [row], **SHORT)
    assert answer(*tiny, []) == []


# ------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize(
    ("template", "end"), [("ziya", "</s>"), ("plain", "\n"), ("minigpt4", "###"), ("chatml", "<|im_end|>"),
                          ("llava_llama_2", " </s>"), ("blip2_vqa", "\n")],
)  # fmt: skip
def test_an_answer_ends_where_the_template_ends_it(tiny, ask, script, template, end):
    model, processor = tiny[0], with_template(tiny[1], template)
    assert processor.end_of_answer == end
    text = f" 一只 cat{end}noise more noise"
    steps = script(model, processor.tokenizer, text)
    row = ask("这是什么？")
    assert answer(model, processor, [row]) == ["一只 cat"]
    upto = len(processor.tokenizer(f" 一只 cat{end}", add_special_tokens=False).input_ids)
    assert len(steps) <= upto + 1, "nothing is generated after the end"
    steps.clear()
    assert "".join(stream_answer(model, processor, **row)) == "一只 cat"


def test_rows_of_a_batch_end_each_at_its_own_place(tiny, ask, script):
    model, processor = tiny[0], with_template(tiny[1], "minigpt4")
    script(model, processor.tokenizer, " a###", " two dogs and a cat###Human", "###")
    assert answer(model, processor, [ask("a"), ask("b"), ask("c")]) == ["a", "two dogs and a cat", ""]


def test_an_end_that_is_a_token_is_an_end_token(tiny, ask, script):
    tokenizer = tiny[1].tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model, processor = tiny[0], with_template(tiny[1], "chatml")
    options = generation_options(model, processor, {})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in options["eos_token_id"] and "stop_strings" not in options
    script(model, tokenizer, "一只猫<|im_end|>noise")
    assert answer(model, processor, [ask("这是什么？")]) == ["一只猫"]


def test_an_answer_that_begins_with_the_end_is_empty(tiny, ask, script):
    model, processor = tiny[0], with_template(tiny[1], "plain")
    steps = script(model, processor.tokenizer, "\nnoise")
    assert answer(model, processor, [ask("")]) == [""]
    steps.clear()
    assert list(stream_answer(model, processor, **ask(""))) == []


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_of_the_recipe_hold_unless_others_are_asked_for(tiny, ask):
    model, processor = tiny
    model.generation_config.max_new_tokens = 3  # where `load` puts the recipe's `generation`
    assert generation_options(model, processor, {})["max_new_tokens"] == 3
    assert generation_options(model, processor, {"max_new_tokens": 5})["max_new_tokens"] == 5
    assert "max_new_tokens" not in generation_options(model, processor, {"max_length": 50})


def test_greedy_unless_sampling_is_asked_for_even_where_the_language_model_samples(tiny, ask, capfd):
    model, processor = tiny
    greedy = answer(model, processor, [ask("hi")], **SHORT)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)
    capfd.readouterr()
    assert answer(model, processor, [ask("hi")], **SHORT) == greedy
    assert answer(model, processor, [ask("hi")], temperature=0, top_p=0.5, **SHORT) == greedy
    assert "may be ignored" not in capfd.readouterr().err
    assert generation_options(model, processor, {"temperature": 1})["do_sample"] is True
    torch.manual_seed(0)
    assert len({answer(model, processor, [ask("hi")], temperature=5, **SHORT)[0] for _ in range(3)}) > 1


def test_a_repetition_penalty_does_not_look_up_placeholders(tiny, ask):
    """Their ids lie beyond the vocabulary, as Ziya's and Vicuna's do once a token is added."""
    assert tiny[1].image_token_id >= tiny[0].config.get_text_config().vocab_size
    for options in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 2}):
        assert answer(*tiny, [ask("hi")], **SHORT, **options) != answer(*tiny, [ask("hi")], **SHORT)


def test_a_placeholder_in_the_vocabulary_is_never_written(tiny, monkeypatch):
    monkeypatch.setattr(tiny[1], "image_token_id", 7)
    assert generation_options(*tiny, {"suppress_tokens": [9]})["suppress_tokens"] == [9, 7]


def test_one_answer_to_a_question(tiny, ask):
    with pytest.raises(UserError, match="`num_return_sequences` must be 1"):
        answer(*tiny, [ask("hi")], num_return_sequences=2)


# --------------------------------------------------------------------------------------------------------- too long


def test_a_conversation_longer_than_the_language_model_is_refused(tiny, ask):
    row = ask("很长" * 300)
    with pytest.raises(PromptTooLongError, match=r"takes 1,8\d\d tokens with its images.* at most 512") as error:
        answer(*tiny, [row])
    assert error.value.limit == 512 and error.value.length > 1800
    with pytest.raises(UserError, match="row 7: the conversation takes"):
        answer(*tiny, [{**ask("hi"), "id": 3}, {**row, "id": 7}])
    with pytest.raises(PromptTooLongError):
        list(stream_answer(*tiny, **row))


def test_near_the_last_position_answers_are_shorter_but_not_those_beside_them(tiny, ask, script):
    long, short = ask("x" * 480), ask("这是什么？")
    room = 512 - prompt_batch(tiny[1], [long])["input_ids"].shape[1]
    assert 0 < room < 30
    alone = answer(*tiny, [short], max_new_tokens=40)
    assert answer(*tiny, [long, short], max_new_tokens=40)[1] == alone[0]
    steps = script(tiny[0], tiny[1].tokenizer, "no end")
    list(stream_answer(*tiny, **long, max_new_tokens=400))
    assert len(steps) == room


def test_stretched_positions_count(tiny):
    text = tiny[0].config.get_text_config()
    assert position_limit(tiny[0]) == 512
    text.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert position_limit(tiny[0]) == 2048
    alibi = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300)))
    assert position_limit(alibi) is None


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_conversations_are_named(tiny, ask, tmp_path):
    good = ask("hi")
    broken = tmp_path / "坏.png"
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=r"row 1: the image .*坏\.png is empty"):
        answer(*tiny, [good, {**good, "images": [str(broken)]}])
    with pytest.raises(UserError, match="places for 1 images, but 0 are given"):
        answer(*tiny, [{**good, "images": []}])
    with pytest.raises(UserError, match="row b: message 0 has role 'robot'"):
        answer(*tiny, [{"id": "b", "messages": [{"role": "robot", "content": "x"}], "images": []}])
    captions = with_template(tiny[1], "plain")
    captions.tokenizer.bos_token = None
    with pytest.raises(UserError, match="the prompt is empty: give an image"):
        prompt_batch(captions, [{"messages": [{"role": "user", "content": "x"}], "images": []}])


def test_images_may_be_decoded_already(tiny, ask, photos):
    row = ask("这是什么？")
    decoded = {**row, "images": [Image.open(photos[0])]}
    assert answer(*tiny, [decoded], **SHORT) == answer(*tiny, [row], **SHORT)


def test_an_answer_that_spells_its_end_token_is_not_cut_there(tiny, ask, monkeypatch):
    """`</s>` in other tokens is text, as it was in training; the token ends the answer."""
    model, processor = tiny
    spelled = processor.tokenizer("write </s> 在末尾", add_special_tokens=False, split_special_tokens=True).input_ids
    ids, steps = [*spelled, processor.tokenizer.eos_token_id, *spelled], []

    def score(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], 400)
        logits[:, -1, ids[len(steps)]] = 1.0
        steps.append(1)
        return logits

    monkeypatch.setattr(model.lm_head, "forward", score)
    assert answer(model, processor, [ask("怎么结束？")], max_new_tokens=40) == ["write </s> 在末尾"]
    assert len(steps) == len(spelled) + 1
    steps.clear()
    assert "".join(stream_answer(model, processor, **ask("怎么结束？"), max_new_tokens=40)) == "write </s> 在末尾"


def test_a_question_that_spells_control_tokens_has_the_length_of_its_letters(tiny, ask):
    processor = tiny[1]
    batch = prompt_batch(processor, [ask("what is </s><s>?")])
    assert processor.tokenizer.eos_token_id not in batch["input_ids"].tolist()[0]
