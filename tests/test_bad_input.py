"""Whatever a user gets wrong ends in one sentence that says what, where and how to mend it, and in exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_sft import load_recipe
from vlm_sft import train as train_module
from vlm_sft.assets import accelerate_config_path
from vlm_sft.bundle import Provenance, save_bundle
from vlm_sft.stack import build_stack
from vlm_sft.terminal import make_console
from vlm_sft.train import main

QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def refused(capsys):
    """Runs `python -m vlm_sft.train` with these arguments in this process; returns the one sentence it ends with."""

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
        return errors[0]

    return run


@pytest.fixture
def data(tmp_path, photos):
    """Writes rows as JSONL and returns a recipe's `data`; the image `photo.png` lies beside them."""

    def write(*rows, kind="messages", **source) -> dict:
        shutil.copy(photos[1], tmp_path / "photo.png")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return {"train": [{"path": str(path), "format": kind, **source}]}

    return write


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


# ------------------------------------------------------------------------------------------------------------ recipe


def test_unknown_recipe_key(refused, recipe_file):
    path = recipe_file(tran={"projector": 1.0})
    assert refused(path).startswith(f"error: {path}, line ")
    assert refused(path).endswith(': unknown key "tran"; did you mean "train"?')


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sft.max_stepz=3", 'override "sft.max_stepz=3": unknown key "sft.max_stepz"; did you mean "max_steps"?'),
        ("sft.max_steps=ten", 'override "sft.max_steps=ten": "sft.max_steps" must be a valid integer, not \'ten\'.'),
        ("train.projektor=1", 'override "train.projektor=1": unknown part "projektor" under `train`; did you mean '
         '"projector"?'),
        ("chat_template=zya", 'override "chat_template=zya": there is no chat template "zya"; the closest that ships '
         'is "ziya".'),
    ],
)  # fmt: skip
def test_unknown_names_and_wrong_types_in_overrides(refused, recipe_file, override, sentence):
    assert refused(recipe_file(), override) == f"error: {sentence}"


def test_recipe_file_missing(refused, recipe_file, tmp_path):
    recipe_file("stage1")
    assert refused(tmp_path / "stage2.yaml") == (
        f"error: the recipe {tmp_path}/stage2.yaml does not exist; did you mean {tmp_path}/stage1.yaml?"
    )
    assert refused("quickstart_stage9").startswith(
        'error: the recipe quickstart_stage9 does not exist; "quickstart_sta'
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stack:\n\tprojector: {type: mlp}\n", "line 2 is not YAML: it holds a tab; use spaces, two for each level."),
        ("chat_template： plain\ntrain: {projector: 1}\n", "it holds the full-width ：; write `: `."),
        ("lora: {r: 16，lora_alpha: 3}\n", "line 1 is not YAML: it holds the full-width ，; write `, `."),
        ("train: {projector: 1\nchat_template: plain\n",
         "line 2 is not YAML: expected ',' or '}', but got ':'; the bracket of line 1 may not be closed."),
        ("system: a\nsystem: b\n", 'line 2 is not YAML: the key "system" is written twice.'),
        ("# 配方\n".encode("gbk"), "is not UTF-8 text (byte 2); save it as UTF-8, for instance with `iconv -f GB18030 "
         "-t UTF-8` if it was written as GB18030."),
        ("system: ${oc.env:VLM_SFT_NOT_SET}\n", '"system" cannot be filled in: the environment variable '
         "VLM_SFT_NOT_SET is not set; set it, or write a default: ${oc.env:VLM_SFT_NOT_SET,…}."),
        ("system: ${sft.outputdir}\n", '"system" cannot be filled in: the recipe has no key sft.outputdir; name one '
         "that it has, or an environment variable: ${oc.env:…}."),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(refused, tmp_path, text, sentence):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(path)
    assert said.startswith(f"error: {path}") and said.endswith(sentence), said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sft.per_device_train_batch_size=0", "must be above zero, not 0."),
        ("sft.max_steps=0", "must be above zero, not 0; left out, `sft.num_train_epochs` says how long."),
        ("sft.max_length=-5", "must be above zero, not -5."),
        ("sft.dataloader_num_workers=-1", "must be zero or above, not -1."),
        ("sft.adam_beta1=2", "must be zero or above and below one, not 2."),
        ("lora={r: 4, lora_dropout: 3}", "must be zero or above and below one, not 3."),
        ("sft.fsdp=full_shard", "as in accelerate_configs/; remove it."),
        ("sft.deepspeed=ds.json", "as in accelerate_configs/; remove it."),
        ("sft.report_to=wandbb", "trackio, wandb, codecarbon, clearml, dagshub, flyte, dvclive, swanlab, kubeflow are "
         "supported."),
        ("sft.report_to=mlflow", "names mlflow, which is not installed; `pip install mlflow`, or leave it out "
         "(sft.report_to=none)."),
        ("sft.use_liger_kernel=true", "is not installed; `pip install liger-kernel`, or leave it out."),
        ("sft.lr_scheduler_type=cosine_with_min_lr", "the schedule cosine_with_min_lr cannot be made with "
         "`sft.lr_scheduler_kwargs` left out: One of min_lr or min_lr_rate should be set through the "
         "`lr_scheduler_kwargs`"),
        ("stack.language_model.revision=v9", "is a folder here and has no revisions; remove "
         "stack.language_model.revision, or rename the folder to have the Hub's."),
    ],
)  # fmt: skip
def test_settings_that_the_libraries_would_fail_on_later(refused, recipe_file, override, sentence):
    said = refused(recipe_file(), override)
    assert said.startswith(f'error: override "{override}": ') and said.endswith(sentence), said


def test_chat_template_without_generation_markers(refused, recipe_file, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    said = refused(recipe_file(chat_template=str(template)))
    assert said.startswith(
        f"error: the chat template {template} has no generation markers; wrap what the assistant says"
    )


# -------------------------------------------------------------------------------------------------------------- rows


def broken_image(path: Path, kind: str) -> None:
    if kind == "truncated":
        Image.effect_noise((200, 200), 50).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html>404</html>")


IMAGES = {
    "missing": "row rows/9: the image bad.png was not found in the folder {folder}: correct the path in the data or "
    "the source's `images` folder.",
    "zero bytes": "row rows/9: the image {path} is empty (0 bytes): download it again or remove the row.",
    "truncated": "row rows/9: the image {path} is truncated or damaged (image file is truncated): download it again or "
    "remove the row.",
    "a web page": "row rows/9: the image {path} is not an image (it looks like HTML: a web page was saved in its "
    "place).",
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", IMAGES)
def test_broken_image(refused, recipe_file, data, tmp_path, kind, workers):
    broken_image(tmp_path / "bad.png", kind)
    rows = [{"image": "photo.png", "caption": "a"}] * 8 + [{"image": "bad.png", "caption": "b"}]
    # What only decoding shows comes out of a data-loader worker, which torch wraps in a traceback.
    path = recipe_file(data=data(*rows, kind="caption"))
    said = refused(path, f"sft.dataloader_num_workers={workers}", "sft.max_steps=3")
    assert said == f"error: {IMAGES[kind].format(path=tmp_path / 'bad.png', folder=tmp_path)}"


def test_broken_image_of_an_evaluation(refused, recipe_file, data, tmp_path, caption_file):
    broken_image(tmp_path / "bad.png", "truncated")
    evaluated = data({"image": "bad.png", "caption": "b"}, kind="caption")["train"]
    path = recipe_file(data={"train": [{"path": caption_file, "format": "caption"}], "eval": evaluated})
    assert refused(path).startswith(f"error: row rows/1: the image {tmp_path}/bad.png is truncated or damaged")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("llava", {"image": "photo.png", "conversations": [{"from": "human", "value": "<image>\n<image>两只？"},
                                                           {"from": "gpt", "value": "是"}]}),
        ("messages", chat([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}], "a",
                          images=["photo.png"])),
        ("vqa", {"image": "photo.png", "question": "<image> and <image>?", "answer": "a"}),
    ],
)  # fmt: skip
def test_more_marks_than_images(refused, recipe_file, data, tmp_path, kind, row):
    good = {"messages": chat("q", "a"), "llava": {**row, "image": ["photo.png"] * 2}, "vqa": {**row, "question": "q"}}
    said = refused(recipe_file(data=data(good[kind], row, kind=kind)))
    assert said.startswith(f"error: {tmp_path}/rows.jsonl, line 2: 2 image marks (")
    assert said.endswith("but 1 image: give every mark its image, in order.")


EMPTY = {
    "messages": chat("q", "  "),
    "llava": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
    "vqa": {"image": "photo.png", "question": "q", "answer": " "},
    "caption": {"image": "photo.png", "caption": ""},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_answer_empty(refused, recipe_file, data, tmp_path, kind):
    said = refused(recipe_file(data=data(EMPTY[kind], kind=kind)))
    assert said.startswith(f"error: {tmp_path}/rows.jsonl, line 1: ")
    wanted = {
        "vqa": '"answer" is empty: write an answer or remove the row.',
        "caption": '"caption" is empty: write a caption or remove the row.',
    }
    assert said.endswith(wanted.get(kind, "message 1 is an empty answer; drop the turn or give the answer some text."))


def test_no_answer_at_all(refused, recipe_file, data, tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    assert refused(recipe_file(data=data(chat("q", "a"), row))) == (
        f"error: {tmp_path}/rows.jsonl, line 2: there is no answer to learn from: add an assistant's message or remove "
        f"the row."
    )


def test_no_supervised_token(refused, recipe_file, data, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}{{ image_token }}{% else %}"
        "{% if m.role == 'assistant' and p.text != 'skip' %}{% generation %}{{ p.text }}{% endgeneration %}"
        "{% else %}{{ p.text }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    )
    path = recipe_file(chat_template=str(template), data=data(chat("q", "a"), chat("q", "skip")))
    assert refused(path) == (
        "error: row rows/2: no token would be in the loss; give the row an answer from the assistant."
    )


def test_a_row_longer_than_max_length(refused, recipe_file):
    said = refused(recipe_file(), "sft.max_length=4")
    assert said.startswith(
        'error: 8 of 8 rows of the source "captions" cannot be used, more than data.max_rejected (0)'
    )
    assert "the first: row captions/1: its first turn alone has " in said and "sft.max_length is 4" in said


# ------------------------------------------------------------------------------------------------------------- stack


@pytest.fixture
def wide(pieces, tmp_path) -> str:
    """A copy of the BLIP-2 checkpoint that says its vision tower is twice as wide."""
    folder = tmp_path / "wide"
    shutil.copytree(pieces["blip2"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def stack_of(pieces, tower=None, resampler=None, lm=None, **projector):
    return {
        "vision_tower": {"pretrained": tower or pieces["blip2"]},
        "resampler": {"type": "qformer", "pretrained": resampler or pieces["blip2"]},
        "projector": {"type": "linear", **projector},
        "language_model": {"pretrained": lm or pieces["llama"]},
    }


def test_widths_that_do_not_fit(refused, recipe_file, pieces, wide):
    assert refused(recipe_file(stack=stack_of(pieces, tower=wide))) == (
        f"error: The vision tower gives features of width 48 but the resampler of {pieces['blip2']!r} reads width 24; "
        f"take both from the same checkpoint, or leave the resampler out and use an mlp projector."
    )


def test_a_pretrained_projector_of_another_width(refused, recipe_file, pieces, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "projector.safetensors"
    save_file({"language_projection.weight": torch.zeros(32, 40), "language_projection.bias": torch.zeros(32)}, path)
    assert refused(recipe_file(stack=stack_of(pieces, pretrained=str(path)))) == (
        f"error: stack.projector.pretrained: '{path}': tensor 'linear.weight' has the shape (32, 40), but (32, 16) is "
        f"needed; name a checkpoint that was made for this stack."
    )


def test_a_piece_that_is_not_there(refused, recipe_file, pieces):
    said = refused(recipe_file(stack=stack_of(pieces, lm="models/ziya")))
    assert said.startswith(
        "error: stack.language_model.pretrained: 'models/ziya' is no folder here and could not be had"
    )


def test_a_language_model_without_a_tokenizer(refused, recipe_file, pieces, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(pieces["llama"], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert refused(recipe_file(stack=stack_of(pieces, lm=str(folder)))) == (
        f"error: stack.language_model.pretrained: the folder '{folder}' has no tokenizer that transformers can read."
    )


def test_a_tokenizer_without_image_and_pad_token_is_no_error(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("vlm_sft.parity.check_parity", lambda *args: {"positions": 1, "max_difference": 0.0})
    main([str(recipe_file()), "sft.max_steps=1"])
    said = capsys.readouterr().err
    for token in ("<image>", "<pad>"):
        assert f"had no {token} token: it was added (no embedding is)." in said


# ----------------------------------------------------------------------------------------------------------- folders


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
    recipe = load_recipe(recipe_file("first", stack=stack_of(pieces, lm=str(own))))
    stack = build_stack(recipe)
    save_bundle(tmp_path / "first", stack.model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
    return tmp_path / "first"


def test_bundle_of_another_base_to_start_from(refused, recipe_file, pieces, bundle):
    said = refused(recipe_file("second", init_from=str(bundle), stack=stack_of(pieces, lm=pieces["opt"])))
    assert said.startswith(f"error: init_from '{bundle}': the bundle was trained on the language_model of '")
    assert f"but '{pieces['opt']}' gives" in said and said.endswith("use the same base.")


def test_bundle_of_a_base_that_changed(bundle, tmp_path, capsys, monkeypatch):
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "llama" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    line = command(monkeypatch, capsys, "chat", bundle, "hello")
    assert line.startswith(f"error: {bundle}: the bundle was trained on the language_model of '{tmp_path}/llama'")


def test_a_run_does_not_go_on_with_another_recipe_or_base(refused, recipe_file, pieces, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("vlm_sft.parity.check_parity", lambda *args: {"positions": 1, "max_difference": 0.0})
    own = tmp_path / "llama"
    shutil.copytree(pieces["llama"], own)
    path = recipe_file(stack=stack_of(pieces, lm=str(own)))
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


def test_folders_that_are_no_bundle(refused, recipe_file, tmp_path, capsys, monkeypatch):
    sentence = f"error: '{tmp_path}/other' is no bundle: it has no bundle.json; give the output_dir of a finished run."
    (tmp_path / "other").mkdir()
    assert refused(recipe_file(init_from=str(tmp_path / "other"))) == sentence
    assert command(monkeypatch, capsys, "evaluate", tmp_path / "other") == sentence


VERBS = {"chat": ["hello"], "generate": ["questions.jsonl", "-o", "answers.jsonl"], "evaluate": [], "export": ["out"],
         "push": ["me/mine"]}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_a_folder_is_that_is_no_bundle(verb, tmp_path, monkeypatch, capsys):
    """And says it without torch, which takes seconds to import."""
    mine = tmp_path / "mine"
    for folder in ("mine/stage1", "half/checkpoint-3", "exported"):
        (tmp_path / folder).mkdir(parents=True)
    (mine / "stage1" / "bundle.json").write_text("{}")
    (tmp_path / "half" / "checkpoint-3" / "checkpoint.json").write_text('{"files": {}}')
    (tmp_path / "exported" / "export.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    finished = "give the output_dir of a finished run."
    monkeypatch.setitem(sys.modules, "vlm_sft.quiet", None)  # the first that a verb imports when it starts
    for given, what in {
        "notes.txt": f"it is a file; {finished}",
        "mine": f"it has no bundle.json; give one of those in it: '{mine}/stage1'.",
        "mine/stage2": f"there is no such folder; did you mean '{mine}/stage1'?",
        "nothing/here": f"there is no such folder; {finished}",
        "half": f"its run did not end; give a checkpoint, '{tmp_path}/half/checkpoint-3', or go on with the run: "
        "--resume.",
        "exported": "it is an export, which transformers loads by itself; give the bundle that it was made from.",
    }.items():
        said = command(monkeypatch, capsys, verb, tmp_path / given, *VERBS[verb])
        assert said == f"error: '{tmp_path}/{given}' is no bundle: {what}"


def test_debug_batch_says_what_to_give(tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    for given, what in {
        "run": "has no watch.jsonl: no step of this run went wrong, so there is none to show.",
        "nothing": "is no run: there is no such folder; give the sft.output_dir of one.",
        "run/checkpoint-3": "is no run: it has neither watch.jsonl nor a checkpoint; give the sft.output_dir of one.",
    }.items():
        said = command(monkeypatch, capsys, "debug-batch", tmp_path / given)
        assert said == f"error: '{tmp_path}/{given}' {what}"


def test_small_slips_on_the_command_line(bundle, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, "chat", bundle, "hello", "--set", "max_new_tokens") == (
        "error: --set max_new_tokens is not understood; write KEY=VALUE, like --set max_new_tokens=64."
    )
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, capsys, "chat", bundle, "hello", "--image", "cat.jpg") == (
        "error: the image cat.jpg was not found in the folder .: correct the path."
    )
    (tmp_path / "notes.txt").write_text("mine")
    assert command(monkeypatch, capsys, "recipes", "copy", "quickstart_stage1", "notes.txt") == (
        "error: the folder notes.txt cannot be made (File exists); name another."
    )


def command(monkeypatch, capsys, *arguments) -> str:
    """Runs the console command in this process; returns the one error that it ends with."""
    from vlm_sft import cli

    monkeypatch.setattr(sys, "argv", ["vlm-sft", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and [line for line in said if line.startswith("error")] == said[-1:], said
    return said[-1]


def test_the_console_command_trains_and_refuses_alike(recipe_file, refused, capsys, monkeypatch):
    path = recipe_file(tran={})
    assert command(monkeypatch, capsys, "train", path) == refused(path)
    path = recipe_file()
    assert command(monkeypatch, capsys, "train", path, "sft.max_length=4") == refused(path, "sft.max_length=4")


# --------------------------------------------------------------------------------------------------------- processes


def test_other_processes_say_which_they_are(recipe_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(train_module, "train", lambda recipe, resume: make_console().print("hello"))
    main([str(recipe_file())])
    assert capsys.readouterr().err == "", "only the first process speaks"
    with pytest.raises(SystemExit):
        main([str(recipe_file()), "nothing=1"])
    assert capsys.readouterr().err.startswith('error (process 3): override "nothing=1": unknown key')


def said_once(output: str, sentence: str) -> bool:
    """Whether one process says it, whichever finds it first, and no other."""
    return len(re.findall(r"^error(?: \(process 1\))?: " + re.escape(sentence), output, re.MULTILINE)) == 1


def launch_two(path, *overrides):
    """`accelerate launch` with the two processes of a config that ships."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config_path("cpu_2")),
         "--main_process_port", "0", "-m", "vlm_sft.train", str(path), *overrides],
        capture_output=True, text=True, env=QUIET, timeout=240,
    )  # fmt: skip


def test_processes_that_do_not_find_each_other(refused, recipe_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(recipe_file()) == (
        "error: 2 processes were started, but each would train alone, because there is no GPU here; set "
        "sft.use_cpu=true to train on the CPU together, or start one process."
    )


@pytest.mark.slow
def test_more_processes_than_rows(recipe_file, data):
    done = launch_two(
        recipe_file(data=data({"image": "photo.png", "caption": "a"}, kind="caption")), "sft.use_cpu=true"
    )
    assert done.returncode != 0
    sentence = (
        "data.train has 1 row but accelerate started 2 processes, so some would have nothing to do; use "
        "--num_processes 1 or fewer.\n"
    )
    assert said_once(done.stderr, sentence)
    assert "vlm_sft/" not in done.stderr, "the traceback at the end is the launcher's, none is ours"


@pytest.mark.slow
def test_what_the_first_process_finds_ends_all(recipe_file, data):
    rows = [{"image": "photo.png", "caption": "a"}] * 4 + [{"image": "bad.png", "caption": "b"}]
    done = launch_two(recipe_file(data=data(*rows, kind="caption")), "sft.use_cpu=true")
    assert done.returncode != 0
    assert said_once(done.stderr, "row rows/5: the image bad.png was not found") and "vlm_sft/" not in done.stderr
