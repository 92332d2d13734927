"""A run with a cache is the run without it: the same losses bit for bit, and neither tower nor resampler is loaded."""

from __future__ import annotations

import itertools
import json

import pytest

from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.train import train

FAKE_PARITY = {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4, "equal": True}
NUMBERS = itertools.count()
LLAVA = {"tower": "clip", "resampler": None, "projector": {"type": "mlp"},
         "vision": {"feature_layer": -2, "feature_select": "patch"}}  # fmt: skip


@pytest.fixture(autouse=True)
def no_parity(monkeypatch, request):
    if "parity" not in request.keywords:
        monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: FAKE_PARITY)


def losses(recipe, *overrides):
    """Of each step and evaluation of a run; a row at a time, because tiny kernels add in another order for several."""
    out = f"sft.output_dir={recipe.parent / 'runs' / str(next(NUMBERS))}"
    folder = train(load_recipe(recipe, ["sft.per_device_train_batch_size=1", out, *overrides]))
    log = json.loads((folder / "metrics.json").read_text())
    return [{key: row[key] for key in row if "loss" in key or "image_use" in key} for row in log]


@pytest.fixture
def loaded(monkeypatch):
    """The parts that were loaded."""
    import vlm_sft.cache.prefix as prefix
    import vlm_sft.stack.kinds as kinds

    seen = []
    for module in (prefix, kinds):
        for name in ("load_vision_tower", "load_resampler"):
            real = getattr(module, name)

            def count(*args, real=real, name=name):
                seen.append(name.removeprefix("load_"))
                return real(*args)

            monkeypatch.setattr(module, name, count)
    return seen


@pytest.mark.parametrize("stack", [{}, LLAVA], ids=["qformer", "llava"])
def test_losses_are_equal_bit_for_bit_and_a_full_cache_loads_no_tower(
    recipe_file, pieces, caption_file, tmp_path, loaded, capsys, stack
):
    source = {"path": caption_file, "format": "caption"}
    recipe = recipe_file(stack=tiny_stack(pieces, **stack), data={"train": [source], "eval": [source]})
    steps = ("sft.max_steps=8", "sft.eval_strategy=steps", "sft.eval_steps=4", "sft.per_device_eval_batch_size=1")
    without = losses(recipe, *steps)
    kept = f"cache.path={tmp_path / 'kept'}"
    assert losses(recipe, kept, *steps) == without
    assert "holds what" in capsys.readouterr().err
    loaded.clear()
    assert losses(recipe, kept, *steps) == without
    assert loaded == (["vision_tower", "resampler"] if not stack else ["vision_tower"]), "once, to prove the bundle"
    assert any("eval_image_use" in row for row in without)


def test_packed_rows_take_their_features_out_of_the_cache(recipe_file, pieces, caption_file, tmp_path, loaded):
    recipe = recipe_file(
        stack=tiny_stack(pieces, **LLAVA), data={"train": [{"path": caption_file, "format": "caption"}]}
    )
    packed = ("sft.packing=true", "sft.max_steps=4")
    without = losses(recipe, *packed)
    kept = f"cache.path={tmp_path / 'kept'}"
    filling = losses(recipe, kept, *packed)
    loaded.clear()
    full = losses(recipe, kept, *packed)
    assert loaded == ["vision_tower"], "once, to prove the bundle"
    for row in zip(without, filling, full, strict=True):
        # Several images of a pack pass a tiny tower at once without a cache, which adds in another order.
        assert row[1] == row[0] | {key: pytest.approx(value, rel=1e-5) for key, value in row[0].items()}
        assert row[2] == row[1]
