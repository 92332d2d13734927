"""`--dry-run`: the resolved recipe, the plan and the memory of a device, without a weight being read."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from support.paths import accelerate_config
from support.tiny_families import processor_of, tiny
from vlm_sft import load_recipe
from vlm_sft.preflight.dry_run import FullStep, full_step, settle_checkpointing
from vlm_sft.preflight.launch import Launch
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.train import main


def test_what_does_not_fit_the_gpu_here_is_said_as_preflight_says_it(recipe_file, monkeypatch, capsys):
    for room, said in ((80 * 2**30, False), (2**20, True)):
        monkeypatch.setattr("vlm_sft.preflight.dry_run.memory_here", lambda room=room: room)
        main([str(recipe_file()), "--dry-run"])
        shown = " ".join(capsys.readouterr().out.split())
        assert ("`vlm-sft fit RECIPE` says which settings fit" in shown) is said


def test_dry_run_reads_no_weight(recipe_file, monkeypatch, capsys):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr("vlm_sft.pieces.load_parts.load_language_model", lambda *args: pytest.fail("weights were read"))
    path = recipe_file(chat_template="ziya", lora={"r": 2}, train={"projector": 1e-3})
    main([str(path), "sft.max_steps=7", "--dry-run"])
    shown = capsys.readouterr().out
    assert "max_steps: 7" in shown and "r: 2" in shown, "the resolved recipe"
    for words in ("vision_tower", "frozen", "0.001", "An image becomes 4 tokens.", "No weight was read."):
        assert words in shown
    model = 16 * 32 + 32
    assert f"{model:,}" in shown, "the projector's parameters"
    assert not os.path.exists(load_recipe(path).sft["output_dir"])


def test_dry_run_says_which_piece_cannot_be_had(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ziya_stage1", "--dry-run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: stack.vision_tower.pretrained: 'Salesforce/blip2-opt-2.7b' is no folder here and")


def test_it_shows_quantised_weights_as_what_they_are(recipe_file, capsys):
    main([str(recipe_file(chat_template="ziya", lora={"r": 2}, quantization={"load_in_4bit": True})), "--dry-run"])
    shown = capsys.readouterr().out
    assert "nf4" in shown[shown.index("What is frozen") : shown.index("Memory of a device")]


def test_it_says_what_a_device_of_many_takes(recipe_file, capsys):
    path = str(recipe_file(chat_template="ziya", lora={"r": 2}))
    main([path, "--dry-run"])
    alone = capsys.readouterr().out
    assert "Memory of a device (one process)" in alone and "A step: 4 rows of 128 tokens, an image in each" in alone
    main([path, "--dry-run", "--accelerate-config", str(accelerate_config("cpu_2"))])
    assert "Memory of a device (2 processes, DDP)" in capsys.readouterr().out


def test_an_optimizer_that_is_not_known_is_named(recipe_file, capsys):
    main([str(recipe_file()), "sft.optim=ademamix", "--dry-run"])
    assert "What sft.optim=ademamix keeps is not known here; it is counted as AdamW." in capsys.readouterr().out


def test_memory_is_counted_without_the_cache_and_it_says_so(recipe_file, tmp_path, capsys):
    path = str(recipe_file())
    sentence = "This is without the cache"
    main([path, "--dry-run"])
    assert sentence not in capsys.readouterr().out
    main([path, f"cache.path={tmp_path / 'kept'}", "--dry-run"])
    assert sentence in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_the_shapes_are_those_of_the_recipe(recipe_file):
    recipe = load_recipe(recipe_file(), ["sft.max_length=null"])
    processor = build_empty_stack(recipe).processor
    step = full_step(build_sft_config(recipe), processor)
    assert step == FullStep(4, 2048, (64, 64), any_size=True)
    batch = FullStep(3, 20, (64, 64), any_size=True).batch(processor)
    places = batch["input_ids"] == processor.image_token_id
    assert batch["pixel_values"].shape == (3, 3, 28, 28) and places.sum(1).tolist() == [4, 4, 4]
    assert batch["attention_mask"].sum(1).tolist() == [20, 20, 19], "unequal rows need a mask"
    scored = batch["labels"] != -100
    assert scored.sum(1).tolist() == [15, 15, 14] and not (scored & places).any(), "all but the image and what begins"


def test_a_step_of_packs_has_as_many_rows_with_an_image_as_fit(recipe_file, capsys):
    recipe = load_recipe(recipe_file(), ["sft.packing=true", "sft.max_length=40"])
    processor = build_empty_stack(recipe).processor
    step = full_step(build_sft_config(recipe), processor)
    assert step == FullStep(4, 40, (64, 64), any_size=True, packed=5)
    batch = step.batch(processor)
    places = batch["input_ids"] == processor.image_token_id
    assert batch["pixel_values"].shape == (20, 3, 28, 28) and places.sum(1).tolist() == [20] * 4
    assert batch["row_lengths"].sum(1).tolist() == [40, 40, 40, 39] and batch["row_lengths"].shape == (4, 5)
    main([str(recipe.path), "sft.packing=true", "sft.max_length=40", "--dry-run"])
    said = capsys.readouterr().out
    assert "A step: 4 packs of 40 tokens, of as many as 5 rows with an image in each." in said
    assert "peak of the passes" in said


def test_a_step_of_questions_that_share_their_image_says_so(recipe_file, caption_file, capsys):
    source = {"path": caption_file, "format": "caption", "merge_by_image": True, "independent": True}
    main([str(recipe_file(data={"train": [source]})), "--dry-run"])
    shown = capsys.readouterr().out
    assert "A step: 4 rows of 128 tokens, an image in each, which all questions of a row share;" in shown


KEPT, AGAIN = "Activations are kept", "Activations are made again in the backward pass"


@pytest.mark.parametrize(
    ("room", "words", "given"),
    [(2**40, KEPT, []), (2**14, AGAIN, []), (None, "Counted with activations made again", []),
     (2**40, None, ["sft.activation_checkpointing=true"]), (2**14, None, ["sft.gradient_checkpointing=false"])],
)  # fmt: skip
def test_activations_are_kept_where_a_device_has_the_room(open_recipe, monkeypatch, capsys, room, words, given):
    monkeypatch.setattr("vlm_sft.preflight.dry_run.memory_here", lambda: room)
    main([open_recipe, *given, "--dry-run"])
    shown = " ".join(capsys.readouterr().out.split())
    says = "the recipe does not say sft.activation_checkpointing"
    assert f"{words}: {says}" in shown if words else says not in shown


def test_rows_of_any_length_may_take_any_memory(open_recipe):
    recipe, said = settle_checkpointing(load_recipe(open_recipe, ["sft.max_length=null"]), Launch(), 2**40)
    assert recipe.sft["activation_checkpointing"] and "without sft.max_length a row may be of any length" in said


def test_what_cannot_be_counted_is_made_again(open_recipe, monkeypatch):
    def fail(*args):
        raise RuntimeError("a fake tensor has no data")

    monkeypatch.setattr("vlm_sft.preflight.dry_run.weigh", fail)
    recipe, said = settle_checkpointing(load_recipe(open_recipe), Launch(), 2**40)
    assert recipe.sft["activation_checkpointing"] and "cannot be counted (a fake tensor has no data)" in said


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_a_step_of_an_existing_model_is_counted_too(name, recipe_file, capsys):
    changes = {"stack": None, "chat_template": None, "model": {"pretrained": str(tiny(name))}, "lora": {"r": 2}}
    main([str(recipe_file(**changes)), "sft.max_length=300", "sft.gradient_accumulation_steps=2", "--dry-run"])
    shown = capsys.readouterr().out
    assert "A step: 4 rows of 300 tokens, an image of 1280×960 pixels in each" in shown
    assert "larger images take more." in shown and "peak of the passes" in shown


def test_the_largest_image_that_fits_is_counted():
    processor = processor_of("qwen2_5_vl")
    sizes = {}
    for length in (2048, 60, 20):
        args = SimpleNamespace(max_length=length, per_device_train_batch_size=1, packing=False)
        sizes[length] = full_step(args, processor).size
        assert processor.count_image_tokens(sizes[length]) < length
    assert sizes[2048] == (1280, 960)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sft.max_length=3", "--dry-run"], "sft.max_length is 3, but an image makes a row of 5 tokens; raise it."),
        (["--dry-run", "--accelerate-config", "no.yaml"], "--accelerate-config no.yaml: it cannot be read"),
        (["--accelerate-config", "no.yaml"], "--accelerate-config belongs to --dry-run; to train, use: accelerate"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, recipe_file, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(recipe_file()), *arguments])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
