"""`vlm-sft recipes`: what ships can be found, read and taken along."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vlm_sft.base.assets import list_recipes, recipe_path
from vlm_sft.cli import main as cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlm-sft", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_list_prints_every_recipe_and_its_title(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    assert all(len(line.split()) > 3 for line in lines)


def test_show_prints_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "recipes", "show", "ziya_stage2") == 0
    assert capsys.readouterr().out == recipe_path("ziya_stage2").read_text(encoding="utf-8")


def test_copy_brings_schema_and_bundled_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "recipes", "copy", "quickstart_stage1", "my_recipes") == 0
    assert capsys.readouterr().out.splitlines() == ["my_recipes/quickstart_stage1.yaml", "examples/digitscenes"]
    copied = Path("my_recipes/quickstart_stage1.yaml").read_text(encoding="utf-8")
    assert copied == recipe_path("quickstart_stage1").read_text(encoding="utf-8")
    assert Path("my_recipes/recipe.schema.json").is_file()
    assert Path("examples/digitscenes/digitscenes.py").is_file()
    assert not list(Path("examples").rglob("__pycache__"))


def test_copy_to_a_file_and_never_over_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = tmp_path / "mine.yaml"
    assert call(monkeypatch, "recipes", "copy", "ziya_stage1", str(goal)) == 0
    capsys.readouterr()
    assert call(monkeypatch, "recipes", "copy", "ziya_stage1", str(goal)) == 2
    assert capsys.readouterr().err == f"error: {goal} exists already; name another destination or remove it.\n"


def test_a_list_in_a_terminal_breaks_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert call(monkeypatch, "recipes", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and any(line.startswith(" " * 20) for line in lines)


def test_list_as_json_names_every_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vlm-sft", "recipes", "list", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == list_recipes()
    assert all(each["title"] and Path(each["path"]).is_file() for each in found)
