"""What a stack and an existing VLM are both asked."""

from __future__ import annotations

import inspect

import pytest

from vlm_sft.families.build_family import FamilyKind
from vlm_sft.families.kind import Kind
from vlm_sft.stack.kinds import StackKind

ASKED = [name for name in {**Kind.__annotations__, **vars(Kind)} if not name.startswith("_")]


@pytest.mark.parametrize("kind", [StackKind, FamilyKind])
def test_both_kinds_answer_everything_in_the_same_words(kind):
    assert {"base", "covers", "settled", "compose", "load", "held"} <= set(ASKED)
    for name in ASKED:
        asked, answer = getattr(Kind, name, None), getattr(kind, name)
        if callable(asked):
            assert [*inspect.signature(answer).parameters] == [*inspect.signature(asked).parameters], name
