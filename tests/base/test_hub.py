"""What is tried again and what is not; over HTTP, tests/bundle/test_hub.py tries them all."""

from __future__ import annotations

import pytest

from vlm_sft.base import hub as hub_errors
from vlm_sft.base.errors import UserError
from vlm_sft.base.hub import one_sentence, patiently


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(hub_errors.time, "sleep", seconds.append)
    return seconds


def test_a_broken_connection_is_tried_three_times(slept):
    tries = []

    def call():
        tries.append(1)
        raise ConnectionResetError("cut")

    with pytest.raises(ConnectionResetError):
        patiently(call)
    assert len(tries) == 3 and slept == [1.0, 2.0]
    with pytest.raises(ConnectionResetError):
        patiently(call, max_tries=1)
    assert len(tries) == 4


def test_mistakes_of_the_program_are_neither_tried_again_nor_hidden(slept):
    with pytest.raises(ZeroDivisionError), one_sentence("me/x"):
        patiently(lambda: 1 / 0)
    assert slept == []


def test_a_sentence_of_ours_stays_and_a_cause_is_not_shown():
    with pytest.raises(UserError, match=r"^mine$"), one_sentence("me/x", before="a", after="b"):
        raise UserError("mine")
    sentence = r"^Ah\. The Hub at .* cannot be reached \(ConnectionResetError\); .*; so\.$"
    with pytest.raises(UserError, match=sentence) as found, one_sentence("me/x", before="Ah. ", after="; so"):
        raise ConnectionResetError("hf_secret")
    assert found.value.__suppress_context__ and "hf_secret" not in str(found.value)
