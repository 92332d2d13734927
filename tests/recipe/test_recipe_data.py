"""The `data:` of a recipe."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from vlm_sft.data.formats import FORMATS
from vlm_sft.data.mixture import SHARES
from vlm_sft.recipe.recipe_data import Data, Source


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/captions.jsonl", "captions"),
        ("data/a.b.json", "a.b"),
        ("data/photos/", "photos"),
        ("org/data", "data"),
        ("shards/0000*.tar", "0000*"),
    ],
)
def test_a_source_is_called_like_its_path(path, name):
    assert Source(path=path, format="caption").name == name


def test_formats_and_sampling_are_those_that_there_are():
    assert get_args(Source.model_fields["format"].annotation) == tuple(FORMATS)
    assert get_args(Data.model_fields["sampling"].annotation) == tuple(SHARES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"repeat": 0},
        {"repeat": 1.5},
        {"max_rows": 0},
        {"weight": 0.0},
        {"prompts": "x"},
        {"prompts": {"zh": []}},
        {"n": 1},
    ],
)
def test_values_that_a_source_cannot_have(wrong):
    with pytest.raises(ValidationError):
        Source(path="x", format="caption", **wrong)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_shares_of_languages_are_above_zero(share):
    with pytest.raises(ValidationError):
        Data(train=[Source(path="x", format="caption")], languages={"zh": share})
