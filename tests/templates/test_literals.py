"""Role markers come from the templates that ship, and honest answers hold none."""

from __future__ import annotations

import pytest

from vlm_sft.base.assets import list_templates
from vlm_sft.templates.literals import find_markers, literals, role_markers

HONEST = [
    "The answer: two cats. Question: none.", "a red 3 at the top left", "他说：“这是一只猫。”", "C# and F#",
    "## Title\n### Part 2\n- item", "if x < 3 and y > 4: return [a, b]", "NASA, USA and the UN.",
    "The human: a tall one.", "Time 12:30, ratio 3:4",
]  # fmt: skip


@pytest.mark.parametrize(
    "said",
    ["<human>:", "<bot>:", "USER:", "ASSISTANT:", "<|im_start|>user", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>",
     "###Human", "###Assistant", "### Human"],
)  # fmt: skip
def test_markers_of_any_template_are_found(said):
    found = find_markers([("row", f"two dogs {said} hello"), ("other", "two dogs")], role_markers("plain"))
    assert found and all(rows == ["row"] for rows in found.values())


def test_honest_answers_hold_none():
    answers = [(text, text) for text in HONEST]
    assert find_markers(answers, role_markers("ziya")) == {}


def test_words_count_where_the_recipe_s_own_template_says_them():
    answer = [("row", "two. Question: how many cats? Short answer: two")]
    assert find_markers(answer, role_markers("vicuna_v1")) == {}
    assert set(find_markers(answer, role_markers("blip2_vqa"))) >= {"Question:"}


def test_a_word_that_ends_like_a_marker_is_none():
    assert find_markers([("row", "SUPERUSER: root")], role_markers("vicuna_v1")) == {}


@pytest.mark.parametrize("name", list_templates())
def test_every_template_can_be_read(name):
    assert "\ue000" not in "".join(literals(name))
    assert all(marker.strip() == marker and marker for marker in role_markers(name))
