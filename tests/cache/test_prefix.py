"""A run with a cache is the run without it: the same losses bit for bit, and neither tower nor resampler is loaded.

Where the features of a picture are not always the same, the cache is off, and a sentence says why.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import SiglipImageProcessorPil, ViTMAEConfig, ViTMAEModel

from support.bundles import log, weights
from support.tiny_families import tiny
from support.tiny_pieces import VISION, tiny_stack
from vlm_sft import MultimodalCollator, load_recipe
from vlm_sft.cache.prefix import find_prefix
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.kinds import compose
from vlm_sft.train import train
from vlm_sft.training.build_trainer import build_collator, open_prefix

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


def test_a_later_stage_finds_what_an_earlier_one_kept_and_a_resampler_that_reads_is_left_out(
    recipe_file, pieces, instructblip, tmp_path, loaded
):
    both, kept = {"pretrained": instructblip}, {"path": str(tmp_path / "kept")}
    stack = {**tiny_stack(pieces), "vision_tower": both, "resampler": {"type": "instruct_qformer", **both}}
    first = train(load_recipe(recipe_file("first", stack=stack, cache=kept)))
    later = {"stack": stack, "init_from": str(first), "lora": {"r": 2}, "chat_template": "ziya"}
    without = losses(recipe_file("without", **later), "sft.max_steps=4")
    loaded.clear()
    assert losses(recipe_file("second", **later, cache=kept), "sft.max_steps=4") == without
    assert loaded.count("vision_tower") == 1, "once, to prove the bundle"
    said, *_, state = sentences(load_recipe(recipe_file("asked", stack=stack, cache=kept)))
    assert state == "on" and "the resampler reads the instruction, so the tower's features are kept" in said


def opened(recipe, **changes):
    """What a run says of its cache before it begins, and its prefix."""
    composed, said = compose(recipe), []
    collator = build_collator(recipe, composed.processor, build_sft_config(recipe))
    for name, value in changes.items():
        setattr(collator, name, value)
    prefix = open_prefix(recipe, composed, collator, None, said.append)
    return said, prefix


def sentences(recipe, **changes):
    """What a run says of its cache before it begins, and whether it has one."""
    said, prefix = opened(recipe, **changes)
    return [*said, "on" if prefix is not None else "off"]


@pytest.fixture(scope="session")
def mae(tmp_path_factory):
    """An encoder that leaves most patches out at random, in evaluation too, unless it is told not to."""
    folder = tmp_path_factory.mktemp("mae")
    torch.manual_seed(0)
    ViTMAEModel(ViTMAEConfig(**VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tower", ["mae", "siglip", "dino", "clip"])
def test_what_is_kept_is_what_the_stack_gives(recipe_file, more_pieces, mae, tmp_path, tower):
    stack = tiny_stack({**more_pieces, "mae": mae}, tower=tower, resampler=None, projector={"type": "mlp"})
    recipe = load_recipe(recipe_file(stack=stack, cache={"path": str(tmp_path / "kept")}))
    _, prefix = opened(recipe)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert prefix is not None
    found = prefix.compute(pixels)
    assert found.shape[1:] == prefix.shape and found.equal(prefix.compute(pixels))
    with torch.no_grad():
        wanted = build_stack(recipe).model.eval().model.encode_images(pixels)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)


class Flips(MultimodalCollator):
    """Changes a row's pictures where they are decoded."""

    def decode(self, image, where):
        picture = super().decode(image, where)
        return picture.transpose(0)


class FlipsSamples(MultimodalCollator):
    """Changes them behind that."""

    def sample(self, row, with_images=True):
        sample = super().sample(row, with_images)
        sample.images = [image.transpose(0) for image in sample.images]
        return sample


class FlipsLast(MultimodalCollator):
    """Changes them in a method that only looks private."""

    def _picture(self, image, where):
        return super()._picture(image, where).transpose(0)


class OwnProcessor(MultimodalCollator):
    """Brings an image processor that draws."""

    def __init__(self, processor, **options):
        kind = type("Draws", (type(processor.image_processor),), {"__module__": "mine"})
        processor.image_processor.__class__ = kind
        super().__init__(processor, **options)


class Hooked(MultimodalCollator):
    """Puts a function of its own in an image processor's place."""

    def __init__(self, processor, **options):
        processor.image_processor.preprocess = lambda *args, **kwargs: None
        super().__init__(processor, **options)


class OtherWords(MultimodalCollator):
    """Changes text alone."""

    def render(self, messages):
        return super().render(messages)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Flips, "Flips has its own `decode`, which may change pictures (augmentation)"),
     (FlipsSamples, "FlipsSamples has its own `sample`"), (FlipsLast, "FlipsLast has its own `_picture`"),
     (OwnProcessor, "OwnProcessor has an image processor of its own, Draws"),
     (Hooked, "the image processor has its own `preprocess`"), (OtherWords, None), (None, None)],
)  # fmt: skip
def test_pictures_that_may_come_otherwise_each_time_are_not_kept(recipe_file, tmp_path, kind, why):
    own = {"collator": f"{__name__}:{kind.__name__}"} if kind else {}
    *said, state = sentences(load_recipe(recipe_file(**own, cache={"path": str(tmp_path / "kept")})))
    if why is None:
        assert state == "on" and "holds what vision_tower and resampler give for 0 pictures" in said[-1]
    else:
        assert state == "off" and "the cache is off: " + why in said[-1] and "recipe.yaml, line" in said[-1]


def test_a_method_that_was_put_on_a_collator_counts_as_its_own(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(cache={"path": str(tmp_path / "kept")}))
    said = sentences(recipe, decode=lambda image, where: None)
    assert said[-1] == "off" and "has its own `decode`" in said[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"train": {"vision_tower": 1e-4}}, "the vision tower is trained"),
     ({"lora": {"r": 2, "target_modules": r".*vision_tower.*\.(fc1|fc2)"}}, "the vision tower has LoRA")],
    ids=["trained", "lora"],
)  # fmt: skip
def test_a_tower_that_changes_is_not_kept(recipe_file, tmp_path, changes, why):
    recipe = load_recipe(recipe_file(cache={"path": str(tmp_path / "kept")}, **changes))
    assert why in sentences(recipe)[0] and sentences(recipe)[1:] == ["off"]


@pytest.mark.parametrize("part", ["vision_tower", "resampler"])
def test_what_an_earlier_stage_trained_is_not_that_of_its_piece(recipe_file, tmp_path, part):
    first = train(load_recipe(recipe_file("first", train={part: 1e-3}), ["sft.max_steps=1"]))
    kept = {"path": str(tmp_path / "kept")}
    said = sentences(load_recipe(recipe_file("second", init_from=str(first), cache=kept)))
    if part == "vision_tower":
        assert said[-1] == "off" and "what an earlier stage trained in it" in said[0]
    else:
        assert said[-1] == "on" and "holds what vision_tower give" in said[0], "the resampler is left out"


def test_a_tower_with_code_of_its_own_is_not_kept(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(cache={"path": str(tmp_path / "kept")}))
    composed = compose(recipe)
    pieces = {**composed.pieces, "vision_tower": SimpleNamespace(trusts_code=True)}
    collator = build_collator(recipe, composed.processor, build_sft_config(recipe))
    parts, why = find_prefix(recipe, composed._replace(pieces=pieces), collator)
    assert parts == () and "the vision tower brings code of its own, which may look at more than the picture" in why


def test_an_existing_vlm_is_not_cut(recipe_file, tmp_path):
    recipe = recipe_file(model={"pretrained": str(tiny("llava"))}, cache={"path": str(tmp_path / "kept")})
    text = yaml.safe_load(recipe.read_text())
    text.pop("stack"), text.pop("chat_template")
    recipe.write_text(yaml.safe_dump(text))
    said = sentences(load_recipe(recipe))
    assert said[-1] == "off" and "an existing VLM (`model`) is not cut into parts" in said[0]


@pytest.mark.slow
def test_a_run_goes_on_exactly_whether_the_cache_is_there_or_not(recipe_file, tmp_path):
    saves = ("sft.max_steps=4", "sft.save_strategy=steps", "sft.save_steps=2", "sft.per_device_train_batch_size=1")
    recipe, kept = recipe_file(lora={"r": 2}, chat_template="ziya"), f"cache.path={tmp_path / 'kept'}"
    whole = train(load_recipe(recipe, [f"sft.output_dir={tmp_path / 'whole'}", kept, *saves]))
    begun = f"sft.resume_from_checkpoint={whole / 'checkpoint-2'}"
    for name, more in (("same", [kept]), ("anew", [f"cache.path={tmp_path / 'empty'}"]), ("without", [])):
        folder = train(load_recipe(recipe, [f"sft.output_dir={tmp_path / name}", begun, *more, *saves]))
        one, other = weights(folder), weights(whole)
        assert all(other[key].equal(one[key]) for key in other) and one.keys() == other.keys()
        steps, wanted = ([row for row in log(made) if "loss" in row] for made in (folder, whole))
        assert steps == wanted and len(steps) == 4, name
