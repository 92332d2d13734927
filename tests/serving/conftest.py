"""A tiny model behind an address of this machine, and what asks it."""

from __future__ import annotations

import base64
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.asking import QUESTIONS, running, tiny_served


@pytest.fixture(scope="session")
def served(pieces, caption_file, tmp_path_factory):
    """The tiny model as a bundle called `tiny`."""
    return tiny_served(pieces, caption_file, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(served):
    """Model in evaluation mode and processor."""
    return served.model, served.processor


@pytest.fixture(scope="session")
def picture(shared_photos):
    """A photo as a part of a message."""

    def make(number: int = 0) -> dict:
        data = base64.b64encode(Path(shared_photos[number % 8]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return make


@pytest.fixture(scope="session")
def body(picture):
    """A request about one photo."""

    def make(number: int = 0, **more) -> dict:
        text = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        messages = [{"role": "user", "content": [picture(number), text]}]
        return {"model": "tiny", "messages": messages, "max_tokens": 12, **more}

    return make


@pytest.fixture
def start(served):
    """Starts servers of the tiny model, which end with the test."""
    with ExitStack() as stack:
        yield lambda *rules, bundles=None, **more: stack.enter_context(
            running(bundles or {"tiny": served}, *rules, **more)
        )


@pytest.fixture
def alone(tiny, shared_photos):
    """What the model answers to a request by itself, by `vlm_sft.answer`."""
    from vlm_sft import answer

    def say(number: int = 0, most: int = 12, **options) -> str:
        asked = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
        row = {"messages": [{"role": "user", "content": asked}], "images": [shared_photos[number % 8]]}
        (said,) = answer(*tiny, [row], max_new_tokens=most, **options)
        return str(said)

    return say
