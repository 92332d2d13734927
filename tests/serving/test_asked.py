"""The body of a request: what is understood, and the sentence for all that is not."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.serving.asked import Asked, read_body
from vlm_sft.serving.refusal import Refusal

HELLO = [{"role": "user", "content": "你好"}]


def read(**body) -> Asked:
    return read_body(json.dumps({"messages": HELLO, **body}).encode())


def test_a_whole_request_is_understood() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "看："}, image, image, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "Really?", "name": "li"},
    ]
    asked = read(
        model="m", messages=messages, max_tokens=5, max_completion_tokens=7, temperature=0, top_p=0.5, seed=-3,
        stop="###", stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, n=1, user="u",
        frequency_penalty=0.0, logit_bias=None, response_format={"type": "text"}, tools=[], metadata={"a": "b"},
    )  # fmt: skip
    assert (asked.model, asked.most, asked.stop, asked.seed, asked.likely) == ("m", 7, ["###"], -3, 2)
    assert asked.options == {"temperature": 0.0, "top_p": 0.5} and asked.stream and asked.usage
    assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in asked.messages[1]["content"]] == ["text", "image", "image", "text"]
    assert [(each["detail"], each["where"]) for each in asked.images] == [
        ("low", "messages[1].content[1]"),
        ("low", "messages[1].content[2]"),
    ]


def test_what_is_not_said_is_null() -> None:
    asked = read(max_tokens=None, stop=None, logprobs=False, stream=None, temperature=None, n=None, stream_options=None)
    assert asked == Asked(None, asked.messages, [])


WRONG = {
    "n": ({"n": 2}, "n can only be 1 here"),
    "tools": ({"tools": [{"type": "function"}]}, "tools can only be [] here"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format can only be"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty can only be 0"),
    "key": ({"temprature": 1}, "There is no key 'temprature' here; did you mean 'temperature'?"),
    "strange key": ({"zzz": 1}, "There is no key 'zzz' here; see docs/serving.md"),
    "hot": ({"temperature": 3}, "temperature is 3: write a number from 0 to 2"),
    "nan": ({"temperature": float("nan")}, "temperature is nan"),
    "text": ({"max_tokens": "5"}, "max_tokens is text that is not understood: write a whole number"),
    "half": ({"max_tokens": 1.5}, "write a whole number"),
    "true": ({"max_tokens": True}, "write a whole number"),
    "none": ({"max_tokens": 0}, "max_tokens is 0: write a number from 1"),
    "seed": ({"seed": 2**70}, "seed is"),
    "stream": ({"stream": "yes"}, "stream is text: write true or false"),
    "stream options": ({"stream_options": {"x": 1}}, "stream_options is one with 'x'"),
    "stops": ({"stop": ["a"] * 17}, "stop is not understood"),
    "empty stop": ({"stop": [""]}, "stop is not understood"),
    "likely": ({"top_logprobs": 2}, "top_logprobs is given without logprobs"),
    "many likely": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    "model": ({"model": 5}, "model is a number: write a text"),
    "no messages": ({"messages": None}, "messages is missing"),
    "empty": ({"messages": []}, "messages is an empty list"),
    "object": ({"messages": {}}, "messages is an object"),
    "message": ({"messages": ["hi"]}, "messages[0] is text"),
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role is null"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null"),
    "tool": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}, *HELLO]}, "'tool_calls'"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "type 'input_audio'"),
    "part": ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0] is no object with a type"),
    "no text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0] has no text"),
    "no url": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url is not understood"),
    "last": ({"messages": [*HELLO, {"role": "assistant", "content": "好"}]}, "The last message is not the user's"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
    "long": ({"messages": [{"role": "user", "content": "猫" * 1_000_001}]}, "more than 10,000 messages and parts"),
    "many": ({"messages": HELLO * 6_000}, "or 1,000,000 characters: shorten them"),
    "shown by system": (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": "x"}]}, *HELLO]},
        "shows an image as system",
    ),
}


@pytest.mark.parametrize(("body", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_sentence(body, sentence) -> None:
    with pytest.raises(Refusal) as refused:
        read(**body)
    assert sentence in str(refused.value) and refused.value.status == 400
    assert str(refused.value).count("\n") == 0 and str(refused.value).endswith((".", "?"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"messages": 1, "messages": 2}', b"[" * 99_999]
)
def test_what_is_no_object_is_refused(data) -> None:
    with pytest.raises(Refusal):
        read_body(data)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image_url"]) | ANY, "text": ANY, "image_url": ANY}
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "system"]) | ANY, "content": st.lists(PART | ANY, max_size=3) | ANY}
)
KEYS = ["model", "max_tokens", "temperature", "stop", "n", "seed", "logprobs", "top_logprobs", "stream", "tools"]
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | ANY, max_size=3) | ANY}, optional=dict.fromkeys([*KEYS, "stream_options"], ANY)
)


@given(BODY | ANY)
@settings(max_examples=300, deadline=None)
def test_any_json_is_understood_or_refused(body) -> None:
    found, refused = None, None
    try:
        found = read_body(json.dumps(body).encode())
    except Refusal as error:
        refused = error
    if refused is not None:
        assert refused.status == 400 and set(refused.body()["error"]) == {"message", "type", "param", "code"}
    else:
        shown = [part for message in found.messages for part in message["content"] if part["type"] == "image"]
        assert found.messages and len(shown) == len(found.images)


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(data) -> None:
    with pytest.raises(Refusal):
        read_body(data)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"0,", b'"",'])
def test_a_body_of_many_values_is_refused_before_it_is_read(unit) -> None:
    """20 MB of empty lists take 400 MB."""
    body = b'{"messages": [' + unit * 6_000_000 + b"0]}"
    tracemalloc.start()
    with pytest.raises(Refusal, match=r"The body has more than 2,500,000 values: send fewer\."):
        read_body(body)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
