"""bitsandbytes stays out of a process that uses none of it, whichever command it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT
from support.recipe_texts import TEXT, write
from vlm_sft.recipe.left_out import leave_out_bitsandbytes
from vlm_sft.recipe.schema import load_recipe

COMMANDS = {
    "chat": ["chat", "bundle", "What is this? 这是什么？"],
    "generate": ["generate", "bundle", "rows.jsonl", "-o", "answers.jsonl"],
    "evaluate": ["evaluate", "bundle"],
    "export": ["export", "bundle", "native"],
    "debug-batch": ["debug-batch", "run", "--checkpoint", "bundle"],
    "train": ["train", "recipe.yaml"],
    "preflight": ["preflight", "recipe.yaml"],
    "the fresh process of parity": ["vlm_sft.bundle.parity", "bundle", "probe.safetensors", "cpu"],
    "the fresh process of an export": ["vlm_sft.export.check", "native", "probe"],
}
# Runs each command in a fork, up to its first import of torch: what is left out by then stays out.
PROGRAM = """
import json, os, runpy, sys
import transformers.utils, vlm_sft.cli.main

class UntilTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, json.dumps([command, sys.modules.get("bitsandbytes", "there") is None]).encode() + b"\\n")
            os._exit(0)

sys.meta_path.insert(0, UntilTorch())
for command, arguments in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        sys.argv[1:] = arguments
        if arguments[0].startswith("vlm_sft."):
            runpy.run_module("vlm_sft.recipe.left_out", run_name="__main__", alter_sys=True)
        vlm_sft.cli.main.main()
        os._exit(1)
    os.wait()
"""


@pytest.fixture
def left_out(tmp_path, monkeypatch):
    """Whether a recipe leaves bitsandbytes out, by its overrides and the configuration of its language model."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # so that it is put back as it was

    def ask(*overrides: str, config: dict | None = None, before: bool = True) -> bool:
        monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
        if before:
            monkeypatch.delitem(sys.modules, "torch", raising=False)
        piece = tmp_path / "piece"
        piece.mkdir(exist_ok=True)
        (piece / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
        parts = [f"stack.{part}.pretrained={piece}" for part in ("vision_tower", "language_model")]
        leave_out_bitsandbytes(load_recipe(write(tmp_path, TEXT), [*parts, *overrides]))
        return "bitsandbytes" in sys.modules

    return ask


def test_bitsandbytes_is_left_out_where_nothing_uses_it(left_out) -> None:
    assert left_out() and left_out("sft.optim=adamw_torch_fused")
    for optimizer in ("paged_adamw_32bit", "adamw_8bit", "rmsprop_bnb", "ademamix"):
        assert not left_out(f"sft.optim={optimizer}")
    assert not left_out("quantization={load_in_4bit: true}", "lora={r: 2}")


def test_bitsandbytes_stays_in_a_process_that_has_torch_already(left_out) -> None:
    assert "torch" in sys.modules and not left_out(before=False)
    assert not left_out(config={"quantization_config": {"quant_method": "bitsandbytes"}})
    assert not left_out("stack.language_model.pretrained=someone/not-here-yet")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run with its recipe, its bundle and an export, which one is in: all paths start there."""
    copy = tmp_path / "b1a5cad"
    shutil.copytree(ROOT / "tests" / "goldens" / "b1a5cad", copy)
    (copy / "run" / "watch.jsonl").write_text('{"step": 1}\n')
    shutil.copytree(copy / "pieces" / "llama", copy / "native")
    monkeypatch.chdir(copy)
    return copy


def left_out_by(commands: dict[str, list[str]]) -> dict[str, bool]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True)
    return dict(map(json.loads, done.stdout.splitlines()))


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**yaml.safe_load(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def test_each_command_leaves_it_out(folder) -> None:
    assert left_out_by(COMMANDS) == dict.fromkeys(COMMANDS, True)


def test_a_piece_of_few_bits_keeps_it(folder) -> None:
    """Where it lay in training, not where its name says."""
    pieces = json.loads((folder / "bundle" / "bundle.json").read_text())["pieces"]
    (folder / "pieces" / "llama").rename(folder / "moved")
    pieces["language_model"]["path"] = str(folder / "moved")
    change(folder / "bundle" / "bundle.json", pieces=pieces)
    asked = {name: COMMANDS[name] for name in ("chat", "the fresh process of parity")}
    assert left_out_by(asked) == dict.fromkeys(asked, True)
    change(folder / "moved" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert left_out_by(asked) == dict.fromkeys(asked, False)


def test_a_bundle_of_few_bits_keeps_it(folder) -> None:
    change(folder / "bundle" / "recipe.yaml", quantization={"load_in_8bit": True})
    kept = ("chat", "generate", "evaluate", "export", "debug-batch", "the fresh process of parity")
    found = left_out_by(COMMANDS)
    assert [name for name in found if not found[name]] == list(kept)


def test_a_bundle_that_is_not_whole_is_said_where_it_is_loaded(folder) -> None:
    broken = ("[1]", "{", '{"pieces": [1]}', '{"pieces": {"language_model": {}}}')
    for number, text in enumerate(broken):
        shutil.copytree(folder / "bundle", folder / str(number))
        (folder / str(number) / "bundle.json").write_text(text)
    asked = {text: ["chat", str(number), "What?"] for number, text in enumerate(broken)}
    assert left_out_by(asked) == dict.fromkeys(broken, False)


def test_pushing_a_bundle_takes_no_torch() -> None:
    program = "import sys, vlm_sft.bundle.hub; print([name in sys.modules for name in ('torch', 'peft')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[False, False]\n"
