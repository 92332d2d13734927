"""The map stays readable: few and small files in each room, a test for each module, nothing heavy at the start."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "vlm_sft"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
HEAVY = ["accelerate", "bitsandbytes", "datasets", "matplotlib", "numpy", "pandas", "peft", "pyarrow", "tokenizers"]
HEAVY += ["torch", "transformers", "trl"]
# What has a class or a protocol wherever it is handed on.
TYPED = set(
    "batch checkpoint collator config image image_processor language_model messages model piece pieces "
    "processor recipe record records row rows spec stack template tokenizer trainer".split()
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(lines(path)) <= 350
    functions = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "returns"))
    assert [f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions if f.end_lineno - f.lineno >= 60] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_models_rows_and_recipes_have_their_types(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    given = [node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.arg in TYPED]
    kept = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in TYPED]
    anything = [node for node in (*given, *kept) if node.annotation and ast.unparse(node.annotation) == "Any"]
    assert [f"line {node.lineno}: {ast.unparse(node)}" for node in anything] == []


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_rooms_hold_few_files(room: Path) -> None:
    files = [path for path in room.iterdir() if path.is_file()]
    assert len(files) <= 12 and not [path for path in room.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_every_room_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    named = [room.strip() for layer in layers for room in layer.split("|")]
    assert sorted(named) == sorted([*map(name_of, ROOMS), "train", "evaluate"])


@pytest.mark.parametrize("module", ["vlm_sft", "vlm_sft.cli.main", "vlm_sft.train", "vlm_sft.recipe"])
def test_a_fresh_python_imports_nothing_heavy(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps(sorted(set(sys.modules) & set({HEAVY}))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


def test_python_finds_what_is_heavy() -> None:
    program = "import json, sys, datasets; print(json.dumps('datasets' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "true\n"
