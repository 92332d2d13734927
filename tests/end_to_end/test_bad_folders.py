"""A folder that cannot be written, read or gone on from is named, and what to give in its place."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import main


def test_output_folder_not_empty_without_resume(refused, recipe_file):
    path = recipe_file()
    folder = Path(load_recipe(path).sft["output_dir"])
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert refused(path) == (
        f"error: sft.output_dir '{folder}' is not empty; choose another, remove it, or go on with the run in it: "
        f"--resume."
    )
    assert refused(path, "sft.resume_from_checkpoint=true") == (
        f"error: sft.resume_from_checkpoint is set, but '{folder}' has no checkpoint; leave it out to start, "
        f"or use --resume, which does both."
    )
    assert refused(path, "sft.resume_from_checkpoint=nowhere") == (
        "error: sft.resume_from_checkpoint: there is no folder 'nowhere'."
    )
    assert refused(path, f"sft.output_dir={folder}/notes.txt") == (
        f"error: sft.output_dir '{folder}/notes.txt' is a file; choose another."
    )


def test_an_output_folder_that_cannot_be_made(refused, recipe_file):
    assert refused(recipe_file(), "sft.output_dir=/proc/nothing/out") == (
        "error: sft.output_dir '/proc/nothing/out' cannot be written: '/proc' takes no folder (No such file or "
        "directory); choose another, or change its permissions."
    )


@pytest.fixture
def bundle(recipe_file, tmp_path, pieces) -> Path:
    """An untrained bundle on a language model of its own."""
    own = tmp_path / "llama"
    shutil.copytree(pieces["llama"], own)
    recipe = load_recipe(recipe_file("first", stack=tiny_stack(pieces, lm=str(own))))
    stack = build_stack(recipe)
    save_bundle(tmp_path / "first", stack.model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
    return tmp_path / "first"


def test_bundle_of_another_base_to_start_from(refused, recipe_file, pieces, bundle):
    said = refused(recipe_file("second", init_from=str(bundle), stack=tiny_stack(pieces, lm=pieces["opt"])))
    assert said.startswith(f"error: init_from '{bundle}': the bundle was trained on the language_model of '")
    assert f"but '{pieces['opt']}' gives" in said and said.endswith("use the same base.")


def test_bundle_of_a_base_that_changed(bundle, tmp_path, command):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "llama" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    line = command("chat", bundle, "hello")
    assert line.startswith(f"error: {bundle}: the bundle was trained on the language_model of '{tmp_path}/llama'")


def test_a_run_does_not_go_on_with_another_recipe_or_base(refused, recipe_file, pieces, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 1, "max_difference": 0.0})
    own = tmp_path / "llama"
    shutil.copytree(pieces["llama"], own)
    path = recipe_file(stack=tiny_stack(pieces, lm=str(own)))
    main([str(path), "sft.max_steps=1", "sft.save_strategy=steps", "sft.save_steps=1"])
    checkpoint = Path(load_recipe(path).sft["output_dir"]) / "checkpoint-1"
    assert refused(path, "--resume", "train.projector=1") == (
        f"error: override \"train.projector=1\": the run of '{checkpoint}' was begun with train.projector: 0.01, which "
        f"cannot become 1 on the way; use the recipe of that run, or start anew in another sft.output_dir."
    )
    weights = own / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    said = refused(path, "--resume")
    assert said.startswith(f"error: {checkpoint}: the bundle was trained on the language_model of '{own}'")


def test_folders_that_are_no_bundle(refused, recipe_file, tmp_path, command):
    sentence = f"error: '{tmp_path}/other' is no bundle: it has no bundle.json; give the output_dir of a finished run."
    (tmp_path / "other").mkdir()
    assert refused(recipe_file(init_from=str(tmp_path / "other"))) == sentence
    assert command("evaluate", tmp_path / "other") == sentence


VERBS = {"chat": ["hello"], "generate": ["questions.jsonl", "-o", "answers.jsonl"], "evaluate": [], "export": ["out"],
         "push": ["me/mine"]}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_a_folder_is_that_is_no_bundle(verb, tmp_path, monkeypatch, command):
    """And says it without torch, which takes seconds to import."""
    mine = tmp_path / "mine"
    for folder in ("mine/stage1", "half/checkpoint-3", "exported"):
        (tmp_path / folder).mkdir(parents=True)
    (mine / "stage1" / "bundle.json").write_text("{}")
    (tmp_path / "half" / "checkpoint-3" / "checkpoint.json").write_text('{"files": {}}')
    (tmp_path / "exported" / "export.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    finished = "give the output_dir of a finished run."
    # The first that a verb imports or calls when it starts.
    monkeypatch.setitem(sys.modules, "vlm_sft.evaluation.evaluate", None)
    monkeypatch.setattr("vlm_sft.cli.bundles.quiet_libraries", None)
    for given, what in {
        "notes.txt": f"it is a file; {finished}",
        "mine": f"it has no bundle.json; give one of those in it: '{mine}/stage1'.",
        "mine/stage2": f"there is no such folder; did you mean '{mine}/stage1'?",
        "nothing/here": f"there is no such folder; {finished}",
        "half": f"its run did not end; give a checkpoint, '{tmp_path}/half/checkpoint-3', or go on with the run: "
        "--resume.",
        "exported": "it is an export, which transformers loads by itself; give the bundle that it was made from.",
    }.items():
        said = command(verb, tmp_path / given, *VERBS[verb])
        assert said == f"error: '{tmp_path}/{given}' is no bundle: {what}"


def test_debug_batch_says_what_to_give(tmp_path, command):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    for given, what in {
        "run": "has no watch.jsonl: no step of this run went wrong, so there is none to show.",
        "nothing": "is no run: there is no such folder; give the sft.output_dir of one.",
        "run/checkpoint-3": "is no run: it has neither watch.jsonl nor a checkpoint; give the sft.output_dir of one.",
    }.items():
        said = command("debug-batch", tmp_path / given)
        assert said == f"error: '{tmp_path}/{given}' {what}"


def test_small_slips_on_the_command_line(bundle, tmp_path, monkeypatch, command):
    assert command("chat", bundle, "hello", "--set", "max_new_tokens") == (
        "error: --set max_new_tokens is not understood; write KEY=VALUE, like --set max_new_tokens=64."
    )
    monkeypatch.chdir(tmp_path)
    assert command("chat", bundle, "hello", "--image", "cat.jpg") == (
        "error: the image cat.jpg was not found in the folder .: correct the path."
    )
    (tmp_path / "notes.txt").write_text("mine")
    assert command("recipes", "copy", "quickstart_stage1", "notes.txt") == (
        "error: the folder notes.txt cannot be made (File exists); name another."
    )
