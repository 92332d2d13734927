"""Shells complete commands, options and recipes, without anything heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def ask(shell: str, words: str, folder=None) -> list[str]:
    """What a shell is told for words, of which the last is not complete."""
    count = len(words.split(" "))
    environment = {
        **os.environ, "_VLM_SFT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(count - 1),
        "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    program = "import sys; sys.argv = ['vlm-sft']; from vlm_sft.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=folder)
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_recipes_are_proposed(shell, tmp_path):
    assert "preflight" in " ".join(ask(shell, "vlm-sft pre"))
    (tmp_path / "quick_mine.yaml").write_text("")
    found = " ".join(ask(shell, "vlm-sft train quick", tmp_path))
    assert "quickstart_stage1" in found and "quick_mine.yaml" in found and "ziya" not in found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_shown(shell):
    program = (
        "import sys; sys.argv = ['vlm-sft', '--show-completion', SHELL]; from vlm_sft.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program.replace("SHELL", repr(shell))], capture_output=True, text=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "vlm-sft" in done.stdout and f"complete_{shell}" in done.stdout
