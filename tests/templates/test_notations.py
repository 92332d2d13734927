"""The table of notations: every one writes a box that is read back to within half a step, words and all."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.base.errors import UserError
from vlm_sft.families.table import FAMILIES
from vlm_sft.recipe.sections import BoxNotation
from vlm_sft.templates.notations import (
    GRID,
    GRID_SIDE,
    NOTATIONS,
    RESIZED,
    UNIT,
    joined,
    missing_token,
    notation_of,
    written_box,
    written_group,
)

SIZE = (200, 100)
DOG = [0.1, 0.1, 0.6, 0.6]
BOXES = st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.502, 1)] * 2)


def text(parts: list[dict]) -> str:
    return "".join(part["text"] for part in parts)


def group(name: str, ref: str | None, *boxes: list[float]) -> list[dict]:
    notation = NOTATIONS[name]
    written = [written_box(notation, box, SIZE, GRID_SIDE) for box in boxes]
    return written_group(notation, ref, written, [len(box) == 2 for box in boxes])


ONE = {
    "qwen2_5_vl": '{"bbox_2d": [20, 10, 120, 60], "label": "狗"}',
    "qwen3_vl": '{"bbox_2d": [100, 100, 600, 600], "label": "狗"}',
    "internvl": "<ref>狗</ref><box>[[100, 100, 600, 600]]</box>",
    "qwen_vl": "<ref>狗</ref><box>(100,100),(600,600)</box>",
    "qwen2_vl": "<|object_ref_start|>狗<|object_ref_end|><|box_start|>(100,100),(600,600)<|box_end|>",
    "kosmos2": "<phrase>狗</phrase><object><patch_index_0099><patch_index_0627></object>",
    "paligemma": "<loc0102><loc0102><loc0614><loc0614> 狗",
    "shikra": "狗[0.100,0.100,0.600,0.600]",
    "llava": "狗 [0.10, 0.10, 0.60, 0.60]",
}
TWO = {
    "qwen2_5_vl": '{"bbox_2d": [20, 10, 120, 60], "label": "狗"}, {"bbox_2d": [0, 0, 200, 100], "label": "狗"}',
    "qwen3_vl": '{"bbox_2d": [100, 100, 600, 600], "label": "狗"}, {"bbox_2d": [0, 0, 1000, 1000], "label": "狗"}',
    "internvl": "<ref>狗</ref><box>[[100, 100, 600, 600], [0, 0, 1000, 1000]]</box>",
    "qwen_vl": "<ref>狗</ref><box>(100,100),(600,600)</box><box>(0,0),(1000,1000)</box>",
    "qwen2_vl": "<|object_ref_start|>狗<|object_ref_end|><|box_start|>(100,100),(600,600)<|box_end|>"
    "<|box_start|>(0,0),(1000,1000)<|box_end|>",
    "kosmos2": "<phrase>狗</phrase><object><patch_index_0099><patch_index_0627></delimiter_of_multi_objects/>"
    "<patch_index_0000><patch_index_1023></object>",
    "paligemma": "<loc0102><loc0102><loc0614><loc0614> 狗 ; <loc0000><loc0000><loc1023><loc1023> 狗",
    "shikra": "狗[0.100,0.100,0.600,0.600;0.000,0.000,1.000,1.000]",
    "llava": "狗 [0.10, 0.10, 0.60, 0.60], [0.00, 0.00, 1.00, 1.00]",
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_words_and_their_boxes_are_written_as_the_family_has_them(name):
    assert text(group(name, "狗", DOG)) == ONE[name]
    assert text(group(name, "狗", DOG, [0, 0, 1, 1])) == TWO[name]


def test_a_box_alone_is_written_without_words_and_words_alone_without_a_box():
    assert text(group("qwen2_5_vl", None, DOG)) == "[20, 10, 120, 60]"
    assert text(group("qwen2_5_vl", "狗")) == "狗"
    assert text(group("internvl", "狗")) == "<ref>狗</ref>"
    assert text(group("kosmos2", None, DOG)) == "<object><patch_index_0099><patch_index_0627></object>"
    assert text(group("qwen2_5_vl", 'a "b"\n', [0.5, 0.5])) == '{"point_2d": [100, 50], "label": "a \\"b\\"\\n"}'


@pytest.mark.parametrize("name", NOTATIONS)
def test_what_people_wrote_is_no_text_of_ours(name):
    ref = "{x1} {boxes} </s> {{"
    parts = group(name, ref, DOG)
    whole = joined(parts)
    assert len(whole) == 1 and ref in whole[0]["text"]
    (start,) = (found.start() for found in re.finditer(re.escape(ref), whole[0]["text"]))
    assert all(end <= start or start + len(ref) <= begin for begin, end in whole[0]["written"])
    assert sum(end - begin for begin, end in whole[0]["written"]) == len(whole[0]["text"]) - len(ref)


@pytest.mark.parametrize("name", NOTATIONS)
@settings(max_examples=40, deadline=None)
@given(box=BOXES, size=st.tuples(st.integers(56, 3000), st.integers(56, 3000)))
def test_a_box_is_read_back_to_half_a_step(name, box, size):
    from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

    notation = NOTATIONS[name]
    said = written_box(notation, box, size, GRID_SIDE)
    found = [float(number) for number in re.findall(r"\d+\.\d+|\d+", re.sub("patch_index|_2d", "", said))]
    if notation.steps == GRID:
        assert tuple(found) == coordinate_to_patch_index(box, GRID_SIDE)
        return
    if name == "paligemma":
        found = [found[1], found[0], found[3], found[2]]
    decimals = len(re.findall(r"\.(\d+)", said)[0]) if notation.steps == UNIT else 0
    steps = {RESIZED: size, UNIT: (10**decimals,) * 2}.get(notation.steps, (notation.steps,) * 2)
    for i, (number, back) in enumerate(zip(box, found, strict=True)):
        unit = back if notation.steps == UNIT else back / steps[i % 2]
        step = 1 if notation.last and number * notation.steps > notation.last else 0.5
        assert abs(unit - number) * steps[i % 2] <= step + 1e-6


def test_names_are_those_of_recipes_and_families():
    assert set(get_args(BoxNotation)) == set(NOTATIONS) >= {family.boxes for family in FAMILIES.values()}
    with pytest.raises(UserError, match="box_notation is 'coco': it must be one of qwen2_5_vl, qwen3_vl"):
        notation_of("coco")


def test_tokens_that_a_tokenizer_lacks_are_named():
    assert missing_token(NOTATIONS["paligemma"], {"<loc0000>"}, GRID_SIDE) == "<loc1023>"
    assert missing_token(NOTATIONS["kosmos2"], {"<patch_index_0000>": 1, "<patch_index_0003>": 2}, 2) is None
    assert missing_token(NOTATIONS["shikra"], (), GRID_SIDE) is None
