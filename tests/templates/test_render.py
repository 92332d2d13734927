"""Renders: text and masks against LLaVA's own, against transformers, and against whatever people type."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paths import GOLDENS, ROOT
from support.template_texts import AROUND, CHINESE, ENGLISH, IMAGE, LAST_ALONE, assistant, refusal, text, user
from vlm_sft.base.names import IMAGE_TOKEN
from vlm_sft.rows.messages import normalise_messages
from vlm_sft.templates.render import render, render_chat
from vlm_sft.templates.template import load_template

DOCS = ROOT / "docs" / "chat_templates.md"


# -- goldens: LLaVA's own renders and spans ----------------------------------------------------------------------------

CASES = json.loads((GOLDENS / "llava_templates" / "cases.json").read_text(encoding="utf-8"))
# Upstream's key → our template, and the system text it has where ours has another.
UPSTREAM = {
    "v1": ("vicuna_v1", None),
    "llava_v1": (
        "vicuna_v1",
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    ),
    "plain": ("plain", None),
    "llava_llama_2": ("llava_llama_2", None),
    "mpt": (
        "chatml",
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    ),
    "chatml_direct": ("chatml", None),
}
CHATML_HEADER = "<|im_start|>system\n"  # part of upstream's system text, part of our template


def golden_messages(turns: list[str], has_image: bool) -> list[dict]:
    messages = []
    for index, turn in enumerate(turns):
        if index % 2:
            messages.append(assistant(turn))
            continue
        parts: list[dict[str, str] | str] = []
        for number, piece in enumerate(turn.split(IMAGE_TOKEN) if has_image else [turn]):
            parts += [IMAGE] if number else []
            parts += [piece] if piece else []
        messages.append(user(*parts))
    return messages


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden(case: dict) -> None:
    template, system = UPSTREAM[case["template"]]
    expected = case["prompt"]
    if case["system_override"] is not None:
        system = case["system_override"]
        if template == "chatml" and system:  # an override of upstream's replaces its header too
            if not system.startswith(CHATML_HEADER):
                expected = CHATML_HEADER + expected
            system = system.removeprefix(CHATML_HEADER)
    turns = case["messages_after_multimodal"]
    chat = render(golden_messages(turns, case["has_image"]), template, system=system)

    assert chat.text == expected
    before, after = AROUND[template]
    assert chat.supervised == [before + answer + after for answer in turns[1::2]]
    if not case["all_masked"]:  # where upstream masks a whole sample by accident, only the lines above hold
        assert chat.spans == [tuple(span) for span in case["loss_spans"]]
        assert chat.supervised == case["loss_text"]


def test_goldens_know_no_template_that_we_do_not() -> None:
    assert {case["template"] for case in CASES} <= set(UPSTREAM)
    assert not all(case["all_masked"] for case in CASES)


# -- the other templates, in full --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("ziya", "<human>:{i}What animal is this?\n<bot>:A cat.</s><human>:What colour?\n<bot>:Black.</s>"),
        ("mistral", "[INST] {i}\nWhat animal is this? [/INST] A cat.</s>[INST] What colour? [/INST] Black.</s>"),
        (
            "minigpt4",
            "###Human: <Img>{i}</Img> What animal is this? ###Assistant: A cat."
            "###Human: What colour? ###Assistant: Black.###",
        ),
        (
            "blip2_vqa",
            "{i}[BOS]Question: What animal is this? Short answer: A cat.\n"
            "Question: What colour? Short answer: Black.\n",
        ),
        ("plain", "{i}A cat.\nBlack.\n"),
        ("blip2_caption", "{i}[BOS]A cat.\nBlack.\n"),
        ("instructblip", "{i}[BOS]What animal is this? A cat.</s>What colour? Black.</s>"),
        ("flant5", "{i}What animal is this? A cat. What colour?</s>Black.</s>"),
        (
            "blip2_flant5_vqa",
            "{i}Question: What animal is this? Short answer: A cat. Question: What colour? Short answer:</s>Black.</s>",
        ),
        (
            "visualglm",
            "<img>{i} </img>Q:What animal is this?\nA:A cat.\nQ:What colour?\nA:[gMASK]<sop> Black.</s>",
        ),
    ],
)
def test_render(template: str, expected: str) -> None:
    assert render_chat(ENGLISH, template, bos_token="[BOS]")[0] == expected.format(i="<image>")
    assert render_chat(ENGLISH, template, bos_token="[BOS]", image_token="[I]")[0] == expected.format(i="[I]")


@pytest.mark.parametrize("template", sorted(set(AROUND) - {"plain", "blip2_caption"}))
def test_system_text(template: str) -> None:
    system = {"role": "system", "content": "Be brief. 请简短。"}
    given = render_chat(ENGLISH, template, system="Be brief. 请简短。")
    assert "Be brief. 请简短。" in given[0]
    assert given == render_chat([system, *ENGLISH], template)
    assert given == render_chat([system, *ENGLISH], template, system="the conversation's own wins")
    assert render_chat(ENGLISH, template, system="") != given


def test_images_stand_where_the_user_put_them() -> None:
    messages = [user("left ", IMAGE, " right ", IMAGE), assistant("ok"), user(IMAGE, IMAGE, "两张"), assistant("好")]
    body = render_chat(messages, "vicuna_v1", system="S")[0]
    assert body == "S USER: left <image> right <image> ASSISTANT: ok</s>USER: <image>\n<image>\n两张 ASSISTANT: 好</s>"
    body = render_chat(messages, "minigpt4")[0]
    assert body == (
        "###Human: left <Img><image></Img> right <Img><image></Img> ###Assistant: ok"
        "###Human: <Img><image></Img><Img><image></Img> 两张 ###Assistant: 好###"
    )
    body = render_chat(messages, "ziya")[0]
    assert body == "<human>:<image><image>left  right\n<bot>:ok</s><human>:<image><image>两张\n<bot>:好</s>"


def test_visualglm_asks_in_the_language_of_the_first_question() -> None:
    for first, asks, answers in (("What is 3?", "Q:", "A:"), ("What is 猫?", "问：", "答："), ("", "问：", "答："),
                                 ("3?", "问：", "答："), ("Ist das schön?", "Q:", "A:")):  # fmt: skip
        messages = [user(IMAGE, first) if first else user(IMAGE), assistant("一"), user("再说一次 once more")]
        expected = f"<img><image> </img>{asks}{first}\n{answers}一\n{asks}再说一次 once more\n{answers}[gMASK]<sop>"
        assert render(messages, "visualglm", True).text == expected


def test_visualglm_learns_the_last_answer_also_before_a_question_that_nobody_answered() -> None:
    chat = render([*CHINESE, user("还有吗？")], "visualglm", eos_token="<eop>")
    assert chat.text.endswith("答：一只猫。\n问：什么颜色？\n答：[gMASK]<sop> 黑色。<eop>问：还有吗？\n答：")
    assert chat.supervised == [" 黑色。<eop>"]


def test_a_typed_placeholder_is_text() -> None:
    for name in AROUND:
        chat = render([user("Is <image> a tag? ", IMAGE), assistant("Yes, <image> is.")], name)
        assert len(chat.image_spans) == 1
        assert [chat.text[a:b] for a, b in chat.image_spans] == [IMAGE_TOKEN]
        before, after = AROUND[name]
        assert chat.supervised == [f"{before}Yes, <image> is.{after}"]
    text_only = render([user("what does <image> mean?"), assistant("nothing")], "ziya")
    assert text_only.image_spans == []
    assert "<image>" in text_only.text


# -- properties: any conversation, every template ----------------------------------------------------------------------

MARKS = [
    "<image>", "</s>", "<s>", "USER: ", " ASSISTANT: ", "###", "###Human: ", "<|im_end|>", "<|im_start|>assistant\n",
    "[INST] ", " [/INST] ", "<human>:", "\n<bot>:", "Question: ", "{% generation %}", "{% endgeneration %}", "{#",
    "{{ 7 * 7 }}", "\n", "\r\n", "\U000f0000", "\U000f0001\U000f0002", "\ue000", "\x00", " ", "é", "🐱",
    "左上角是红色的3",
]  # fmt: skip
words = st.lists(st.sampled_from(MARKS) | st.text(max_size=8), max_size=5).map("".join)
image = st.just(IMAGE)
questions = st.lists(image | words.map(text), min_size=1, max_size=4).filter(
    lambda parts: any(part["type"] == "image" or part["text"] for part in parts)
)
answers = words.filter(lambda answer: answer.strip() != "")
turns = st.lists(st.tuples(questions, answers), min_size=1, max_size=3)
systems = st.none() | words


def conversation(pairs: list[tuple[list[dict], str]]) -> list[dict]:
    return [
        message
        for question, answer in pairs
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


@pytest.mark.parametrize("template", sorted(AROUND))
@settings(max_examples=60, deadline=None)
@given(pairs=turns, system=systems)
def test_the_supervised_text_is_the_answers_and_their_ends(template: str, pairs: list, system: str | None) -> None:
    messages = conversation(pairs)
    chat = render(messages, template, system=system, image_token="<image>")
    before, after = AROUND[template]
    learned = pairs[-1:] if template in LAST_ALONE else pairs
    assert chat.supervised == [before + answer + after for _, answer in learned]
    borders = [edge for span in chat.spans for edge in span]
    assert borders == sorted(borders)
    assert all(start < end for start, end in chat.spans)

    parts = [part for question, _ in pairs for part in question]
    assert len(chat.image_spans) == sum(part["type"] == "image" for part in parts)
    assert [chat.text[start:end] for start, end in chat.image_spans] == ["<image>"] * len(chat.image_spans)
    for start, end in chat.image_spans:
        assert not any(a < end and start < b for a, b in chat.spans)

    # The placeholder's length moves nothing but positions: with another one the same text is supervised.
    other = render(messages, template, system=system, image_token="⟨a much longer placeholder⟩")
    assert other.supervised == chat.supervised


@pytest.mark.parametrize("template", sorted(AROUND))
@settings(max_examples=40, deadline=None)
@given(pairs=turns, system=systems)
def test_a_prompt_and_its_answer_begin_the_training_text(template: str, pairs: list, system: str | None) -> None:
    messages = conversation(pairs)
    full = render(messages, template, system=system)
    before = len(pairs) - len(full.spans)
    assert before == (len(pairs) - 1 if template in LAST_ALONE else 0)
    for number, (start, end) in enumerate(full.spans):
        turn = before + number
        prompt = render(messages[: 2 * turn + 1], template, True, system=system)
        assert prompt.text == full.text[:start]
        assert prompt.spans == full.spans[:number]
        so_far = render(messages[: 2 * turn + 2], template, system=system)
        # Dropping later turns changes nothing before them; a newline after the end is in no loss.
        assert full.text.startswith(so_far.text) and so_far.text[end:] in ("", "\n") and len(so_far.text) >= end


# -- the same file in transformers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    own = "".join(map(load_template, AROUND))  # letters of system texts and of tokens around turns
    alphabet = sorted(set(string.printable + json.dumps([ENGLISH, CHINESE], ensure_ascii=False) + own))
    model = tokenizers.models.WordLevel({letter: index for index, letter in enumerate(["<unk>", *alphabet])}, "<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # a token a character: masks are exact
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>", "<image>"],
    )


@pytest.mark.parametrize("messages", [ENGLISH, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize("template", sorted(AROUND))
def test_transformers_renders_and_masks_the_same(template: str, messages: list[dict], tokenizer) -> None:
    source = load_template(template)
    # Unlike ours, transformers hands contents over as they are; as a list each of them works in both.
    messages = normalise_messages(messages)
    chat = render(messages, template, bos_token="<s>", eos_token="</s>")
    options = {"chat_template": source, "image_token": IMAGE_TOKEN}
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == chat.text
    prompt = render(messages[:-1], template, True, bos_token="<s>", eos_token="</s>")
    theirs = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **options)
    assert theirs == prompt.text

    ids = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    tokens = tokenizer.convert_ids_to_tokens(ids["input_ids"])
    assert "".join(tokens) == chat.text
    masked = [token for token, learned in zip(tokens, ids["assistant_masks"], strict=True) if learned]
    assert "".join(masked) == "".join(chat.supervised)


@pytest.mark.parametrize("template", sorted(AROUND))
def test_transformers_renders_plain_string_contents(template: str, tokenizer) -> None:
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello"}]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=load_template(template))
    assert theirs == render_chat(messages, template, bos_token="<s>")[0]


# -- bad conversations -------------------------------------------------------------------------------------------------


def test_bad_messages_are_named() -> None:
    assert refusal("ziya", [user("a"), assistant(" \n")]).startswith("message 1 is an empty answer; drop the turn or")


def test_nothing_to_generate_after_an_answer() -> None:
    message = refusal("ziya", ENGLISH, add_generation_prompt=True)
    assert message == (
        "message 3 is already an answer, so there is nothing to generate; drop it, or add the user's next message."
    )


def test_the_callers_messages_are_left_alone() -> None:
    before = json.dumps(ENGLISH)
    render_chat(ENGLISH, "chatml", system="S")
    assert json.dumps(ENGLISH) == before


# -- the page ----------------------------------------------------------------------------------------------------------


def shown(messages: list[dict], template: str) -> str:
    """A render as the page shows it: what is in the loss between ⟦ and ⟧, newlines as ↵."""
    chat = render(messages, template, bos_token="<s>")
    out, last = "", 0
    for start, end in chat.spans:
        out += chat.text[last:start] + "⟦" + chat.text[start:end] + "⟧"
        last = end
    return (out + chat.text[last:]).replace("\n", "↵")


@pytest.mark.parametrize("template", sorted(AROUND))
def test_the_page_shows_true_renders(template: str) -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert f"### `{template}`" in page
    for messages in (ENGLISH, CHINESE):
        assert shown(messages, template) in page


def test_the_pages_first_example_is_true() -> None:
    page = DOCS.read_text(encoding="utf-8")
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    chat = names["chat"]
    for value in (chat.text, chat.spans, chat.image_spans):
        assert f"# {value!r}" in page


# -- what messages say beside their content ----------------------------------------------------------------------------


def off(words: str) -> dict:
    return {**assistant(words), "loss": False}


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen2_5_vl", "ziya", "mistral", "chatml"])
@pytest.mark.parametrize("messages", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_an_answer_that_is_not_learned_has_the_same_text_and_no_span(template: str, messages: list[dict]) -> None:
    whole = render(messages, template)
    first = render([messages[0], {**messages[1], "loss": False}, *messages[2:]], template)
    assert (first.text, first.spans, first.unlearned) == (whole.text, whole.spans[1:], whole.spans[:1])
    both = render([{**message, "loss": False} for message in messages], template)
    assert (both.spans, both.unlearned) == ([], whole.spans) and whole.unlearned == []
    assert render([{**message, "loss": True} for message in messages], template) == whole


TOGETHER = "{% generation %}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}{% endgeneration %}"


def test_a_template_without_a_block_for_each_answer_cannot_switch_one_off() -> None:
    messages = [user("a"), assistant("b"), user("c"), off("d")]
    assert "has 1 supervised blocks for 2 answers, so the loss of one cannot be switched off" in refusal(
        TOGETHER, messages
    )
    assert render([user("a"), assistant("b"), user("c"), assistant("d")], TOGETHER).supervised == ["abcd"]


@pytest.mark.parametrize("template", ["qwen2_5_vl", "chatml"])
def test_an_answer_shows_a_picture_that_is_not_learned(template: str) -> None:
    shows = {"role": "assistant", "content": [text("看"), IMAGE, text("a cat")]}
    chat = render([user("q"), shows, user(IMAGE, "r"), assistant("s")], template)
    assert len(chat.image_spans) == 2
    learned = {place for start, end in chat.spans for place in range(start, end)}
    assert not any(learned & set(range(*span)) for span in chat.image_spans)
    said = "".join(chat.supervised)
    assert said.startswith("看") and "a cat" in said and said.endswith("s<|im_end|>") and IMAGE_TOKEN not in said
    silent = render([user("q"), {**shows, "loss": False}, user(IMAGE, "r"), assistant("s")], template)
    assert silent.supervised == ["s<|im_end|>"] and len(silent.unlearned) == 2


def test_a_template_without_room_for_a_picture_in_an_answer_refuses_it() -> None:
    plain = "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ image_token if p.type == 'image' else p.text }}{% endfor %}{% else %}{% generation %}{{ m.content[-1].text }}{% endgeneration %}{% endif %}{% endfor %}"  # noqa: E501
    shows = {"role": "assistant", "content": [IMAGE, text("猫")]}
    assert "prints 0 image placeholders for 1 images" in refusal(plain, [user("q"), shows])


THINKS = """{{ tools | tojson if tools }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}
{%- else %}{% generation %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content[0].text }}{% endgeneration %}{% endif %}{% endfor %}"""


def test_tools_and_thoughts_are_printed_or_refused() -> None:
    tools = [{"name": "放大", "parameters": {}}]
    messages = [{**user("q"), "tools": tools}, {**assistant("是"), "reasoning_content": "two <image> cats"}]
    chat = render(messages, THINKS)
    assert '"放大"' in chat.text and chat.supervised == ["<think>two <image> cats</think>是"]
    assert "the row has tools, which the chat template" in refusal("vicuna_v1", messages)
    sentence = refusal("qwen3_vl", [user("q"), messages[1]])
    assert (
        sentence.startswith("message 1 has reasoning_content, which the chat template") and "does not print" in sentence
    )
    commented = "{# tools, reasoning_content #}" + TOGETHER
    assert "the row has tools" in refusal(commented, messages)


def test_control_tokens_that_were_typed_are_told_and_change_no_text() -> None:
    messages = [user("<|im_end|>", IMAGE, " a </s>"), assistant("x</s>猫<|im_end|>")]
    for name in AROUND:
        plain = render(messages, name)
        chat = render(messages, name, control=("</s>", "<|im_end|>"))
        assert (chat.text, chat.spans, chat.image_spans) == (plain.text, plain.spans, plain.image_spans)
        assert all(chat.text[place - 1] == "<" for place in chat.typed)
        within = [place for place in chat.typed for start, end in chat.spans if start < place < end]
        assert [chat.text[place - 1 :][:4] for place in within] == ["</s>", "<|im"]
        assert render(messages, name).typed == []
