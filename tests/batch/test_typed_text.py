"""What people type is text: control tokens in it stay letters, in every family, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversations import PROCESSORS, conversations, make_processor
from support.tiny_families import CHECKED, processor_of
from support.tiny_pieces import TOKENIZERS, make_tokenizer, tokenizer_of
from vlm_sft.base.names import IGNORED
from vlm_sft.batch.encoding import supervised_characters, tokenize
from vlm_sft.batch.typed_text import control_tokens, tokenize_chat, unsaid_tokens
from vlm_sft.stack.vocabulary import add_words
from vlm_sft.templates.render import RenderedChat
from vlm_sft.templates.template import load_template

SIZES = [(40, 30)]
CHATML = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "[INST]"]


def said(question: str, answer: str, system: str = "") -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return [*first, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def with_specials(tokenizer, *more: str):
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHATML, *more]})
    return tokenizer


def learned(processor, chat) -> str:
    return processor.tokenizer.decode([label for label in chat.labels if label != IGNORED])


def controls(processor, chat) -> list[int]:
    ids = set(processor.tokenizer.convert_tokens_to_ids(list(processor.control_tokens)))
    return [token for token in chat.input_ids if token in ids]


@pytest.mark.parametrize("name", CHECKED)
def test_no_control_token_of_a_family_can_be_typed(name):
    processor = processor_of(name)
    wanted = controls(processor, processor.encode_chat(said("what?", "this"), sizes=SIZES))
    assert processor.tokenizer.eos_token in processor.control_tokens
    for token in processor.control_tokens:
        for question, answer in ((f"what is {token}?", f"{token} is {token}，结束{token}x"), (token, token)):
            chat = processor.encode_chat(said(question, answer), sizes=SIZES)
            assert controls(processor, chat) == wanted, token
            assert answer in learned(processor, chat)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "unigram", "words", "joining"])
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "mistral"])
def test_no_control_token_of_a_stack_can_be_typed(kind, template):
    assert kind in TOKENIZERS
    processor = make_processor(template, with_specials(tokenizer_of(kind)))
    unknown = {processor.tokenizer.unk_token_id}
    specials = set(processor.tokenizer.convert_tokens_to_ids(["</s>", "<s>", *CHATML])) - unknown

    def found(*messages: str) -> list[int]:
        return [token for token in processor.encode_chat(said(*messages)).input_ids if token in specials]

    wanted, with_system = found("a", "b"), found("a", "b", "c")
    for token in ("</s>", "<s>", *CHATML):
        assert found(f"a {token} b", f"{token}{token}") == wanted
        if template != "mistral":
            assert found("a", "b", f"be {token} kind") == with_system


def test_the_text_of_a_typed_token_is_spelled_as_text_beside_it_is():
    processor = make_processor("chatml", with_specials(make_tokenizer()))
    spelled = processor.tokenizer("猫 </s><|im_end|> x", split_special_tokens=True, add_special_tokens=False).input_ids
    chat = processor.encode_chat(said("a", "猫 </s><|im_end|> x"))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [label for label in chat.labels if label != IGNORED] == [*spelled, end]


def test_a_token_that_lies_across_two_parts_of_a_message_is_text():
    processor = make_processor("chatml", with_specials(make_tokenizer()))
    content = [{"type": "text", "text": "a <|im_"}, {"type": "image"}, {"type": "text", "text": "end|> b"}]
    whole = [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    wanted = processor.encode_chat(said("a", "c")).input_ids.count(end)
    assert processor.encode_chat(whole).input_ids.count(end) == wanted
    joined = [{"role": "user", "content": [content[0], content[2]]}, whole[1]]
    assert processor.encode_chat(joined).input_ids.count(end) == wanted


def test_a_typed_begin_token_at_the_head_is_not_the_templates():
    bare = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ image_token }}{% elif message.role == 'user' %}{{ part.text }}{% else %}"
        "{% generation %}{{ part.text }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = make_processor(bare)
    chat = processor.encode_chat([{"role": "user", "content": "<s> a"}, {"role": "assistant", "content": "b"}])
    begin = processor.tokenizer.bos_token_id
    assert chat.input_ids[0] == begin and chat.input_ids.count(begin) == 1
    assert processor.tokenizer.decode(chat.input_ids) == "<s><s> ab</s>"


def test_the_instruction_of_a_q_former_is_text():
    processor = make_processor()
    processor.qformer_tokenizer = with_specials(make_tokenizer())
    processor.qformer_tokenizer.pad_token = "</s>"
    from PIL import Image

    text = processor.image_inputs([Image.new("RGB", (9, 9))], ["is </s> a [INST]?"])["qformer_input_ids"][0].tolist()
    assert not set(text) & set(processor.qformer_tokenizer.convert_tokens_to_ids(["</s>", "[INST]"]))


def test_words_of_an_answer_stay_tokens_though_they_are_called_special():
    places = ["<|box_start|>", "<|box_end|>", "<ref>", "<loc0001>", "<patch_index_0001>", "<think>", "</think>"]
    processor = make_processor("chatml", with_specials(make_tokenizer(), *places))
    ids = processor.tokenizer.convert_tokens_to_ids(places)
    chat = processor.encode_chat(said("where?", "".join(places) + "</s>"))
    assert [token for token in chat.labels if token in ids] == ids


def test_what_a_template_writes_is_a_control_token_whatever_the_tokenizer_calls_it():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<table>", "\n\n"])
    found = control_tokens(tokenizer, load_template("chatml"))
    assert {"<|im_start|>", "<|im_end|>", "</s>"} <= set(found) and not {"<table>", "\n\n"} & set(found)
    processor = make_processor("chatml", tokenizer)
    chat = processor.encode_chat(said("a", "x<|im_end|>y<table>"))
    assert chat.labels.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert tokenizer.convert_tokens_to_ids("<table>") in chat.labels
    assert "x<|im_end|>y" in learned(processor, chat)


def test_a_placeholder_that_no_template_wrote_is_text_in_a_conversation_made_by_hand():
    processor = make_processor()
    text = "<image> and <image> a"
    chat = RenderedChat(text, [], [(0, 7)])
    ids, borders = tokenize_chat(processor.tokenizer, chat, bytearray(len(text)), {processor.image_token_id})
    assert ids.count(processor.image_token_id) == 1 and borders[-1][1] == len(text)
    assert processor.tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), name=st.sampled_from(sorted(PROCESSORS)))
def test_a_text_without_control_tokens_is_tokenised_as_ever(messages, name):
    processor = PROCESSORS[name]
    chat = processor.render(messages)
    assert chat.text == processor.render(messages).text
    supervised = supervised_characters(chat)
    found = tokenize_chat(processor.tokenizer, chat, supervised, {processor.image_token_id})
    if not chat.typed:
        assert found == tokenize(processor.tokenizer, chat.text, supervised)
    for token in processor.control_tokens:
        number = processor.tokenizer.convert_tokens_to_ids(token)
        places = [start for i, (start, _) in zip(*found, strict=True) if i == number]
        assert not {start + 1 for start in places} & set(chat.typed)


def test_an_answer_is_shown_with_the_tokens_that_say_where_things_are():
    places = ["<box>", "</box>", "<|object_ref_start|>", "<loc0001>"]
    tokenizer = with_specials(make_tokenizer(), *places, "<think>", "<|im_end|>")
    unsaid = unsaid_tokens(tokenizer)
    assert not unsaid & set(tokenizer.convert_tokens_to_ids(places))
    assert unsaid >= set(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<think>"]))
    ids = tokenizer("<|im_end|><box>(1,2)</box> 猫</s>", add_special_tokens=False).input_ids
    assert tokenizer.decode([i for i in ids if i not in unsaid]).replace(" ", "") == "<box>(1,2)</box>猫"
    plain = make_tokenizer()
    ids = plain("a 猫</s> b<s>").input_ids
    assert plain.decode([i for i in ids if i not in unsaid_tokens(plain)]) == plain.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", ["bytes", "pieces", "unigram"])
def test_words_that_the_recipe_added_stay_tokens_beside_typed_control_tokens(kind):
    tokenizer = with_specials(tokenizer_of(kind))
    words = [word.id for word in add_words(tokenizer, ["<defect>", "缺陷"], load_template("chatml"), ["<image>"])]
    processor = make_processor("chatml", tokenizer)
    specials = set(processor.tokenizer.convert_tokens_to_ids(["</s>", *CHATML])) - {processor.tokenizer.unk_token_id}
    plain, chat = (
        processor.encode_chat(said(question, answer), sizes=SIZES)
        for question, answer in (("what?", "this"), ("is <defect> </s>?", "</s>缺陷 <defect></s>缺陷"))
    )
    assert [t for t in chat.input_ids if t in specials] == [t for t in plain.input_ids if t in specials]
    assert [token for token in chat.input_ids if token in words] == [words[i] for i in (0, 1, 0, 1)]
    answer = processor.tokenizer.decode([label for label in chat.labels if label != IGNORED], skip_special_tokens=True)
    assert "</s>缺陷<defect></s>缺陷" in answer.replace(" ", "")
