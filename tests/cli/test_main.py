"""The console command: what it prints, what it hands on, how it fails."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import vlm_sft
from support.paths import accelerate_config
from support.recipe_texts import TEXT, write
from vlm_sft import train
from vlm_sft.cli import main as cli
from vlm_sft.forgetting.texts import Wish


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlm-sft", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Stands in for the modules behind the commands and notes what they are called with."""
    noted: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def recorder(name: str) -> Any:
        return lambda *args, **kwargs: noted.append((name, args, kwargs))

    modules = {
        "inference.chat": "chat",
        "inference.answer_file": "generate",
        "evaluation.evaluate": "run",
    }
    for module, function in modules.items():
        stand_in: Any = types.ModuleType(f"vlm_sft.{module}")
        setattr(stand_in, function, recorder(f"{module}.{function}"))
        monkeypatch.setitem(sys.modules, f"vlm_sft.{module}", stand_in)
    return noted


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["recipes", "list"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; sys.argv[0] = 'vlm-sft'\n"
        "from vlm_sft.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = ('torch', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib', 'numpy')\n"
        "    print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for command in ("train", "chat", "generate", "evaluate", "recipes"):
        assert f"\n  {command} " in printed


def test_python_m_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-sft", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vlm_sft", run_name="__main__")
    assert not ended.value.code and vlm_sft.__version__ in capsys.readouterr().out


def test_train_hands_on_recipe_overrides_and_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By both names, and with flags between the overrides."""
    noted: list[Any] = []
    monkeypatch.setattr(
        "vlm_sft.preflight.dry_run.dry_run", lambda recipe, launch, console: noted.append((recipe, launch))
    )
    monkeypatch.setattr("vlm_sft.train.train", lambda recipe, resume: noted.append((recipe, resume)))
    path = str(write(tmp_path, TEXT))
    assert call(monkeypatch, "train", path, "sft.max_steps=3", "--dry-run", "system=你好") == 0
    train.main([path, "sft.max_steps=3", "--dry-run", "system=你好"])
    for recipe, launch in noted:
        assert (recipe.sft["max_steps"], recipe.system, str(launch)) == (3, "你好", "one process")
    noted.clear()
    ddp = str(accelerate_config("ddp"))
    assert call(monkeypatch, "train", path, "--dry-run", "--accelerate-config", ddp) == 0
    train.main([path, "--accelerate-config", ddp, "--dry-run"])
    assert [str(launch) for _, launch in noted] == ["8 processes, DDP"] * 2
    noted.clear()
    assert call(monkeypatch, "train", path, "--resume", "sft.max_steps=3") == 0
    train.main([path, "--resume", "sft.max_steps=3"])
    train.main([path])
    assert [(recipe.sft.get("max_steps"), resume) for recipe, resume in noted] == [(3, True), (3, True), (None, False)]


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--nope"], ["--resume"]])
def test_the_program_for_launchers_tells_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2 and "Usage: python -m vlm_sft.train" in capsys.readouterr().err


def test_chat(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    arguments = ["outputs/x", "--image", "a.png", "--image", "b.png", "这是什么？", "--set", "max_new_tokens=64"]
    assert call(monkeypatch, "chat", *arguments, "--set", "temperature=1e-1") == 0
    assert call(monkeypatch, "chat", "outputs/x") == 0
    options = {"max_new_tokens": 64, "temperature": 0.1}
    asked = {"images": ["a.png", "b.png"], "question": "这是什么？", "options": options}
    talked = {"images": [], "question": None, "options": {}}
    assert calls == [
        ("inference.chat.chat", ("outputs/x",), {**given, "videos": [], "trust_remote_code": False, "boxes": None})
        for given in (asked, talked)
    ]


def test_generate(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    assert (
        call(monkeypatch, "generate", "me/b", "q.jsonl", "-o", "a.jsonl", "--batch-size", "2", "--images", "pics") == 0
    )
    wanted = {"input": "q.jsonl", "output": "a.jsonl", "batch_size": 2, "images": "pics", "image_folders": ()}
    wanted |= {"options": {}, "trust_remote_code": False, "boxes": None}
    assert calls == [("inference.answer_file.generate", ("me/b",), wanted)]


def test_evaluate(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    assert call(monkeypatch, "evaluate", "me/b", "--split", "eval", "--max-rows", "5", "--trust-remote-code") == 0
    wanted = {"split": "eval", "batch_size": 32, "output": None, "max_rows": 5, "recipe": None}
    wanted |= {"trust_remote_code": True, "against": None, "forgetting": Wish()}
    assert calls == [("evaluation.evaluate.run", ("me/b",), wanted)]


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["generate", "me/b", "q.jsonl"], ["train", "x", "--nope"]]
)
def test_wrong_usage_is_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["chat", "me/b", "--boxes", "metres"],
            "error: --boxes must be one of pixels, unit, thousand, padded, not metres.",
        ),
        (["chat", "me/b", "--set", "x"], "error: --set x is not understood; write KEY=VALUE, like"),
        (["recipes", "show", "zia_stage1"], 'error: there is no recipe "zia_stage1"; the closest that ships is "ziya_'),
    ],
)
def test_user_error_is_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[Any],
    arguments: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_train_program_fails_in_one_line_without_traceback(tmp_path: Path) -> None:
    for program in (["-m", "vlm_sft.train"], ["-m", "vlm_sft", "train"]):
        done = subprocess.run(
            [sys.executable, *program, str(tmp_path / "none.yaml")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: the recipe {tmp_path}/none.yaml does not exist; these ship: ")
        assert done.stderr.count("\n") == 1


def test_the_help_tells_every_command_in_full_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "--help") == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]
