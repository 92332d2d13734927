"""What a recipe can say of its parts and its data is what there is to build and to read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from support.recipe_texts import TEXT, problem, write
from vlm_sft.base.names import PARTS
from vlm_sft.data.mixture import SHARES
from vlm_sft.model.connectors import PROJECTORS, RESAMPLERS
from vlm_sft.recipe.schema import load_recipe
from vlm_sft.recipe.sections import PROJECTOR_KINDS, Data, Resampler, Source, Stack
from vlm_sft.rows.formats import FORMATS


def test_a_stack_has_the_four_parts_in_the_order_an_image_passes_them() -> None:
    assert tuple(Stack.model_fields) == PARTS


@pytest.mark.parametrize(
    ("named", "built"),
    [(PROJECTOR_KINDS, PROJECTORS), (get_args(Resampler.model_fields["type"].annotation), RESAMPLERS)],
)
def test_every_kind_that_can_be_built_can_be_named(named: Iterable[str], built: dict) -> None:
    assert set(named) == set(built)


@pytest.mark.parametrize("kind", PROJECTOR_KINDS)
def test_options_of_a_projector_are_what_its_class_takes(kind: str) -> None:
    options = PROJECTOR_KINDS[kind](type=kind).options
    taken = set(inspect.signature(PROJECTORS[kind]).parameters) - {"in_features", "out_features"}
    assert set(options) == taken


@pytest.mark.parametrize("kind", PROJECTOR_KINDS)
def test_a_recipe_of_an_older_bundle_states_the_options_of_every_kind(tmp_path: Path, kind: str) -> None:
    older = {"depth": 2, "activation": "gelu", "scale_factor": 2}
    path = write(tmp_path, TEXT)
    plain = load_recipe(path, [f"stack.projector={{type: {kind}}}"])
    said = load_recipe(path, [f"stack.projector={json.dumps({'type': kind, **older})}"])
    assert said.resolved() == plain.resolved() and said.stack.projector == plain.stack.projector
    assert load_recipe(write(tmp_path, said.to_yaml())).resolved() == plain.resolved()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stack.vision_tower.image_size=0",
            '.image_size" must be greater than or equal to 1, not 0.',
        ),
        ("stack.vision_tower.feature_select=all", "\"stack.vision_tower.feature_select\" must be 'full' or 'patch'"),
        ("stack.vision_tower.revison=x", 'unknown key "stack.vision_tower.revison"; did you mean "revision"?'),
        (
            "stack.language_model.dtype=bf16",
            "must be 'float32', 'bfloat16' or 'float16', not 'bf16'.",
        ),
        (
            "stack.language_model.trust_remote_code=1",
            '.trust_remote_code" must be a valid boolean',
        ),
        ("stack.projector={type: mlp, depth: 65}", '"stack.projector.depth" must be less than or equal to 64, not 65.'),
        ("stack.projector={type: mlp, depht: 3}", 'unknown key "stack.projector.depht"; did you mean "depth"?'),
        (
            "stack.projector={type: mlp, xyz: 3}",
            "these are valid here: revision, trust_remote_code, type, init,",
        ),
        (
            "stack.projector={type: mpl}",
            "'mlp_norm', 'pixel_shuffle' or 'pixel_shuffle_mlp', not 'mpl'.",
        ),
        ("stack.projector={type: 2}", "or 'pixel_shuffle_mlp', not '2'."),
        ("stack.projector={depth: 2}", 'the key "stack.projector.type" is missing.'),
        ("stack.projector=mlp", '"stack.projector" must be a valid dictionary'),
        ("stack.vision_towr={}", 'unknown key "stack.vision_towr"; did you mean "vision_tower"?'),
        ("model={pretrained: x, processr: {}}", 'unknown key "model.processr"; did you mean "processor"?'),
    ],
)
def test_what_a_part_cannot_be(tmp_path: Path, override: str, message: str) -> None:
    assert message in problem(write(tmp_path, TEXT), override)


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
