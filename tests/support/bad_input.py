"""The sentence with which the console command ends on wrong input."""

from __future__ import annotations

import sys

import pytest


def command(monkeypatch, capsys, *arguments) -> str:
    """Runs the console command in this process; returns the one error that it ends with."""
    from vlm_sft.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["vlm-sft", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and [line for line in said if line.startswith("error")] == said[-1:], said
    return said[-1]
