"""Answers as OpenAI's own client reads them."""

from __future__ import annotations

import json

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.model import Model

from vlm_sft.serving.replies import Reply, dumped, event, listed, usage_of
from vlm_sft.serving.writing import Share

SHARES = [Share("猫", -0.5, (Share("猫", -0.5), Share("\ufffd", float("-inf"))))]


def test_the_clients_own_classes_take_them() -> None:
    reply = Reply("m")
    whole = ChatCompletion.model_validate(reply.whole("一只猫", "stop", usage_of(7, 2), SHARES), strict=True)
    assert whole.choices[0].message.content == "一只猫" and whole.usage.total_tokens == 9
    (told,) = whole.choices[0].logprobs.content
    assert (told.token, told.logprob, bytes(told.bytes).decode()) == ("猫", -0.5, "猫")
    assert [(each.bytes, each.logprob) for each in told.top_logprobs] == [(list("猫".encode()), -0.5), (None, -9999.0)]
    for piece in (
        reply.piece({"content": "猫"}, shares=SHARES),
        reply.piece({}, "length"),
        reply.counts(usage_of(1, 1)),
    ):
        assert ChatCompletionChunk.model_validate(piece, strict=True).id == whole.id
    assert Model.model_validate(listed("m", 5), strict=True).id == "m"


def test_json_is_utf8_and_half_characters_are_escaped() -> None:
    assert dumped({"a": "猫"}) == '{"a": "猫"}'.encode()
    assert json.loads(dumped({"a": "\ud800"})) == {"a": "\ud800"}
    assert event({"a": 1}) == b'data: {"a": 1}\n\n'
