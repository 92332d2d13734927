"""One box: the same in every scale, and refused by row, key and size where it lies outside of its picture."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.base.errors import RowError
from vlm_sft.rows.box import SCALES, either, problem_of, to_unit
from vlm_sft.rows.messages import box_part

WHERE = "f.jsonl, line 3"
SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


@settings(max_examples=100, deadline=None)
@given(size=SIZES, box=st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.501, 1)] * 2))
def test_every_scale_says_the_same_box(size, box):
    side = max(size)
    said = {
        "unit": list(box),
        "thousand": [number * 1000 for number in box],
        "pixels": [number * size[i % 2] for i, number in enumerate(box)],
        "padded": [((side - size[i % 2]) // 2 + number * size[i % 2]) / side for i, number in enumerate(box)],
    }
    assert set(said) == set(SCALES)
    for scale, values in said.items():
        assert problem_of(values, scale) is None
        assert to_unit(box_part(values, scale, 0, "k"), size, WHERE) == pytest.approx(box, abs=1e-9)


def test_a_box_outside_its_picture_names_row_key_and_size():
    with pytest.raises(RowError) as error:
        to_unit(box_part([10, 10, 101, 40], "pixels", 0, "objects.bbox[3]"), (100, 50), "row s/7")
    assert str(error.value).startswith(
        'row s/7: "objects.bbox[3]" is [10, 10, 101, 40] (pixels), outside of its picture'
    )
    assert "100 x 50 pixels" in str(error.value)
    assert to_unit(box_part([10, 10, 100.4, 40], "pixels", 0, "k"), (100, 50), "")[2] == 1.0


@pytest.mark.parametrize("scale", SCALES)
def test_numbers_that_can_be_no_box_are_said_in_every_scale(scale):
    assert problem_of([0.1, 0.2, 0.3, 0.4], scale) is None and problem_of([0, 1], scale) is None
    for box, words in (
        ([0.3, 0, 0.3, 1], "no width or height"),
        ([0, 0, 1], "3 numbers"),
        ([-1, 0, 1, 1], "outside of its"),
    ):
        what, mend = problem_of(box, scale)
        assert words in what and mend
    assert either(SCALES) == "pixels, unit, thousand or padded"
