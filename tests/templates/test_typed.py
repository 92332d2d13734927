"""Marks behind the first character of every control token in what people say, and nowhere else."""

from __future__ import annotations

from vlm_sft.templates.typed import mark_typed, may_be_typed

CONTROL = ("</s>", "<|im_end|>")


def test_every_text_of_messages_and_tools_is_marked() -> None:
    parts = [{"type": "text", "text": "猫</s> <|im_"}, {"type": "image"}, {"type": "text", "text": "end|>"}]
    chat = [{"role": "</s>", "content": parts, "reasoning_content": "a <|im_end|>", "loss": False}]
    marked = mark_typed(chat, CONTROL, "X")
    assert marked == [
        {
            "role": "</s>",
            "content": [{**parts[0], "text": "猫<X/s> <X|im_"}, parts[1], parts[2]],
            "reasoning_content": "a <X|im_end|>",
            "loss": False,
        }
    ]
    assert mark_typed([{"name": "放大</s>", "n": 1}], CONTROL, "X") == [{"name": "放大<X/s>", "n": 1}]
    assert mark_typed(chat, (), "X") is chat and mark_typed(None, CONTROL, "X") is None


def test_what_is_not_looked_at_closely_has_nothing_to_mark() -> None:
    def said(*texts: str, **more: object) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts], **more}]

    for chat in (said("猫", "a < b"), said("</", "a", "s>"), [{"role": "user", "content": [{"type": "image"}]}]):
        assert not may_be_typed(chat, None, CONTROL) and mark_typed(chat, CONTROL, "X") == chat
    for chat in (said("a </s>"), said("<|im_", "end|>"), said("<loc0001>"), said("a", reasoning_content="</s>")):
        assert may_be_typed(chat, None, CONTROL)
    assert may_be_typed(said("a"), [{"name": "</s>"}], CONTROL) and not may_be_typed(said("</s>"), None, ())
