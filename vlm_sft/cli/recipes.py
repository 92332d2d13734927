"""`vlm-sft recipes`: the recipes that ship, listed, shown and copied."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from ..base.console import for_a_program, tell
from ..base.errors import UserError
from ..base.whole_files import read_text
from ..train import Json

recipes_app = typer.Typer(help="The recipes that ship: list, show, copy.", no_args_is_help=True, rich_markup_mode=None)


@recipes_app.command("list")
def list_(as_json: Json = False) -> None:
    """Print the names of the recipes that ship, and what each is."""
    from ..base.assets import list_recipes, recipe_path

    names = list_recipes()
    if as_json:
        with for_a_program(as_json) as give:
            give([{"name": name, "title": _title(name), "path": str(recipe_path(name))} for name in names])
        return
    indent = max(map(len, names)) + 2
    # A pipe gets one line a recipe, a terminal lines that are not broken within a word.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    for name in names:
        line = f"{name:<{indent}}{_title(name)}"
        tell(textwrap.fill(line, max(width, indent + 20), subsequent_indent=" " * indent))


def _title(name: str) -> str:
    """What a recipe is: its first comment but that for the editor."""
    from ..base.assets import recipe_path

    comments = (line for line in read_text(recipe_path(name)).splitlines() if line.startswith("# "))
    return next((line.removeprefix("# ") for line in comments if "$schema" not in line), "")


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `recipes list` prints it.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Print a recipe."""
    from ..base.assets import recipe_path

    with for_a_program(as_json) as give:
        text = read_text(recipe_path(name))
        tell(text, end="")
        give({"name": name, "path": str(recipe_path(name)), "text": text})


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `recipes list` prints it.", show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="Folder, or file ending in .yaml.")] = ".",
    as_json: Json = False,
) -> None:
    """Copy a recipe to change it, with its schema and the bundled pieces that it names."""
    from ..base.assets import assets_root, recipe_path
    from ..recipe.schema import load_recipe

    source, goal = recipe_path(name), Path(destination)
    if goal.suffix != ".yaml":
        goal = goal / f"{source.stem}.yaml"
    if goal.exists():
        raise UserError(f"{goal} exists already; name another destination or remove it.")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {goal.parent} cannot be made ({error.strerror}); name another.") from error
    shutil.copyfile(source, goal)
    made = [goal]
    schema = goal.parent / "recipe.schema.json"
    if not schema.exists():
        shutil.copyfile(assets_root() / "recipes" / schema.name, schema)
    # Relative paths in a recipe start from the working directory, so the pieces go there, not beside the recipe.
    for folder in sorted(_bundled_examples(load_recipe(source).resolved())):
        if not folder.exists():
            shutil.copytree(assets_root() / folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
            made.append(folder)
    with for_a_program(as_json) as give:
        for path in made:
            tell(f"{path}")
        give({"made": [str(path) for path in made]})


def _bundled_examples(value: object) -> set[Path]:
    """The folders `examples/<name>` that ship and that some string of a recipe points into."""
    from ..base.assets import assets_root

    if isinstance(value, dict):
        return set().union(*map(_bundled_examples, value.values()))
    if isinstance(value, list):
        return set().union(*map(_bundled_examples, value))
    if isinstance(value, str) and value.startswith("examples/"):
        folder = Path(*Path(value).parts[:2])
        return {folder} if (assets_root() / folder).is_dir() else set()
    return set()
