"""Finds the files that ship beside the code: recipes, chat templates, benchmarks, text sets, accelerate configs.

In a checkout and in an editable install they are folders next to the package; in a wheel the build puts the same
folders under `vlm_sft/_assets`. Everything else asks here, so that no other module knows the difference.
"""

from __future__ import annotations

from pathlib import Path

from .errors import UserError
from .words import closest

_PACKAGE = Path(__file__).resolve().parent.parent


def assets_root() -> Path:
    """Returns the folder that holds `recipes/`, `chat_templates/`, `evaluation_tasks/` and their like."""
    packaged = _PACKAGE / "_assets"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def list_recipes() -> list[str]:
    """Returns the names of the recipes that ship, sorted; a name is the path below `recipes/` without `.yaml`."""
    return _names("recipes", ".yaml")


def list_templates() -> list[str]:
    """Returns the names of the chat templates that ship, sorted."""
    return _names("chat_templates", ".jinja")


def list_tasks() -> list[str]:
    """Returns the names of the benchmarks that ship, sorted."""
    return _names("evaluation_tasks", ".yaml")


def list_text_sets() -> list[str]:
    """Returns the names of the text sets that ship, by which forgetting is measured, sorted."""
    return _names("text_sets", ".jsonl")


def recipe_path(name: str) -> Path:
    """Returns the file of a recipe that ships.

    Args:
        name: as in `list_recipes()`, for example `quickstart_stage1`.

    Raises:
        UserError: no recipe of that name ships; the message names the closest one.
    """
    return _find("recipes", ".yaml", name, "recipe")


def template_path(name: str) -> Path:
    """Returns the file of a chat template: a name in `chat_templates/`, or a path to a `.jinja` file.

    Args:
        name: as in `list_templates()`, for example `ziya`, or a path.

    Raises:
        UserError: neither exists; the message names the closest template.
    """
    if name.endswith(".jinja") or "/" in name or "\\" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(f'the chat template file "{name}" does not exist{_closest(path.stem, list_templates())}.')
    return _find("chat_templates", ".jinja", name, "chat template")


def task_path(name: str) -> Path:
    """Returns the file of a benchmark that ships.

    Raises:
        UserError: none of that name ships; the message names the closest one.
    """
    return _find("evaluation_tasks", ".yaml", name, "benchmark")


def text_set_path(name: str) -> Path:
    """Returns the file of a text set that ships.

    Raises:
        UserError: none of that name ships; the message names the closest one.
    """
    return _find("text_sets", ".jsonl", name, "text set")


def _names(folder: str, suffix: str) -> list[str]:
    root = assets_root() / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob(f"*{suffix}"))


def _find(folder: str, suffix: str, name: str, kind: str) -> Path:
    if name in (names := _names(folder, suffix)):
        return assets_root() / folder / f"{name}{suffix}"
    raise UserError(f'there is no {kind} "{name}"{_closest(name, names)}.')


def _closest(name: str, names: list[str]) -> str:
    if hint := closest(name, names):
        return f'; the closest that ships is "{hint}"'
    return f"; these ship: {', '.join(names)}" if names else ""
