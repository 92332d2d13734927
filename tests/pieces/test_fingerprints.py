"""Where each part came from: what is written down, and what a hand-over refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlm_sft import build_stack
from vlm_sft.base.errors import UserError
from vlm_sft.pieces.fingerprints import compare_pieces, entries_of
from vlm_sft.pieces.part_configs import find_pieces


def test_every_piece_is_written_down_with_its_place(stack_recipe):
    recipe = stack_recipe("blip2", resampler="blip2")
    pieces = build_stack(recipe).pieces
    assert set(pieces) == {"vision_tower", "resampler", "language_model"}, "the projector is the bundle's own"
    for part, piece in pieces.items():
        assert Path(piece["path"]).is_absolute() and Path(piece["path"]).exists(), part
        assert piece["fingerprint"] and piece["revision"] is None and "commit" not in piece
    assert pieces["vision_tower"]["fingerprint"] != pieces["resampler"]["fingerprint"], "of one folder, two parts"


def test_a_copy_is_the_same_and_a_changed_tensor_is_not(stack_recipe, more_pieces, tmp_path):
    first = build_stack(stack_recipe("clip")).pieces
    copy = Path(shutil.copytree(more_pieces["clip"], tmp_path / "copy"))
    compare_pieces(first, build_stack(stack_recipe(str(copy))).pieces, "here")

    state = load_file(copy / "model.safetensors")
    name = next(n for n in state if n.endswith("patch_embedding.weight"))
    save_file({**state, name: state[name] + 1}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^here: the bundle was trained on the vision_tower of .* the same base\.$"):
        compare_pieces(first, build_stack(stack_recipe(str(copy))).pieces, "here")


@pytest.mark.parametrize("tower", ["blip2", "clip"])
def test_pieces_that_were_not_loaded_are_written_down_as_those_that_were(tower, stack_recipe):
    """As a merged bundle does with the parts that it shares with its base."""
    recipe = stack_recipe(tower, resampler="blip2" if tower == "blip2" else None)
    stack = build_stack(recipe)
    assert entries_of(find_pieces(recipe), stack.model) == stack.pieces


@pytest.mark.parametrize(
    ("earlier", "now", "sentence"),
    [
        ({}, {"language_model": {}}, "does not say what it was trained on"),
        ({"resampler": {"fingerprint": "a"}}, {}, "the bundle has a resampler but this stack has none"),
        ({"language_model": {"fingerprint": "a"}}, {"language_model": {"fingerprint": "a"}, "resampler": {"x": 1}},
         "this stack has a resampler but the bundle has none"),
    ],
)  # fmt: skip
def test_what_only_one_side_has(earlier, now, sentence):
    with pytest.raises(UserError, match=sentence):
        compare_pieces(earlier, now, "here")
