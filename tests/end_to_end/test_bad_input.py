"""Whatever a user gets wrong ends in one sentence that says what, where and how to mend it, and in exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from support.paths import accelerate_config
from support.tiny_pieces import tiny_stack
from vlm_sft import train as train_module
from vlm_sft.base.console import make_console
from vlm_sft.train import main

QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


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


def test_widths_that_do_not_fit(refused, recipe_file, pieces, wide):
    assert refused(recipe_file(stack=tiny_stack(pieces, tower=wide))) == (
        f"error: The vision tower gives features of width 48 but the resampler of {pieces['blip2']!r} reads width 24; "
        f"take both from the same checkpoint, or leave the resampler out and use an mlp projector."
    )


def test_a_pretrained_projector_of_another_width(refused, recipe_file, pieces, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "projector.safetensors"
    save_file({"language_projection.weight": torch.zeros(32, 40), "language_projection.bias": torch.zeros(32)}, path)
    assert refused(recipe_file(stack=tiny_stack(pieces, projector={"type": "linear", "pretrained": str(path)}))) == (
        f"error: stack.projector.pretrained: '{path}': tensor 'linear.weight' has the shape (32, 40), but (32, 16) is "
        f"needed; name a checkpoint that was made for this stack."
    )


def test_a_piece_that_is_not_there(refused, recipe_file, pieces):
    said = refused(recipe_file(stack=tiny_stack(pieces, lm="models/ziya")))
    assert said.startswith(
        "error: stack.language_model.pretrained: 'models/ziya' is no folder here and could not be had"
    )


def test_a_language_model_without_a_tokenizer(refused, recipe_file, pieces, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(pieces["llama"], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert refused(recipe_file(stack=tiny_stack(pieces, lm=str(folder)))) == (
        f"error: stack.language_model.pretrained: the folder '{folder}' has no tokenizer that transformers can read."
    )


def test_a_tokenizer_without_image_and_pad_token_is_no_error(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 1, "max_difference": 0.0})
    main([str(recipe_file()), "sft.max_steps=1"])
    said = capsys.readouterr().err
    for token in ("<image>", "<pad>"):
        assert f"had no {token} token: it was added (no embedding is)." in said


# --------------------------------------------------------------------------------------------------------- processes


def test_the_console_command_trains_and_refuses_alike(recipe_file, refused, command):
    path = recipe_file(tran={})
    assert command("train", path) == refused(path)
    path = recipe_file()
    assert command("train", path, "sft.max_length=4") == refused(path, "sft.max_length=4")


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
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2")),
         "--main_process_port", "0", "-m", "vlm_sft.train", str(path), *overrides],
        capture_output=True, text=True, env=QUIET, timeout=240,
    )  # fmt: skip


def test_processes_that_do_not_find_each_other(refused, recipe_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(recipe_file()) == (
        "error: 2 processes were started, but each would work alone, because there is no GPU here; set "
        "sft.use_cpu=true to work on the CPU together, or start one process."
    )


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_processes_that_would_share_a_row_out(refused, recipe_file, monkeypatch, name):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")  # as `accelerate launch` does of its config file
    said = refused(recipe_file())
    assert said.startswith(f"error: parallelism_config of `accelerate launch`: {name} is 2, but ")
    assert "is not supported, because image tokens and image features would be cut apart; leave it out" in said
    monkeypatch.delenv(f"PARALLELISM_CONFIG_{name.upper()}")
    said = refused(recipe_file(), f"sft.parallelism_config.{name}=4")
    assert "what the processes share out is told to `accelerate launch --config_file`" in said


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
