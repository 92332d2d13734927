"""`vlm-sft cache`: fill, show, check and tidy the features that frozen parts give."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..base.assets import list_recipes
from ..base.console import for_a_program, make_console, tell
from ..base.errors import UserError
from ..base.processes import leave_process_group
from ..train import Json, Overrides, RecipeName, Trust, launcher

cache_app = typer.Typer(help="Features of frozen parts: build, info, verify, prune.", no_args_is_help=True)

Where = Annotated[
    str, typer.Argument(metavar="FOLDER", help="A cache's folder, or a recipe that names one.", show_default=False)
]


@cache_app.command()
def build(
    recipe: RecipeName, overrides: Overrides = None, as_json: Json = False, trust_remote_code: Trust = False
) -> None:
    """Send every picture of a recipe through its frozen parts; for several processes, use: accelerate launch -m
    vlm_sft.cache."""
    from ..recipe.opening import open_recipe

    stage = open_recipe(recipe, overrides, trust_remote_code)
    from ..prepare.fill_cache import fill_cache  # only now, when it is known which libraries it needs

    with for_a_program(as_json) as give:
        give(fill_cache(stage, make_console()))
    leave_process_group()


main = launcher(build, "python -m vlm_sft.cache")


@cache_app.command()
def info(folder: Where, as_json: Json = False) -> None:
    """Print what is kept: from which pieces, how many pictures, how large, and when it was last used."""
    from rich.table import Table

    from ..cache.store import GB
    from ..cache.upkeep import stores_in

    if as_json:
        with for_a_program(as_json) as give:
            give([
                {
                    "store": each.store.folder.name, "pictures": len(each.store), "shape": each.store.shape,
                    "dtype": str(each.store.dtype).removeprefix("torch."), "bytes": each.bytes, "used": each.used,
                    "about": each.about,
                }
                for each in stores_in(_root(folder))
            ])  # fmt: skip
        return
    table = Table("store", "features of", "pictures", "each", "type", "GB", "last used")
    for kept in stores_in(_root(folder)):
        store, pretrained = kept.store, kept.about.get("pretrained")
        parts = pretrained if isinstance(pretrained, dict) else {}
        shape = store.shape or (0, 0)
        table.add_row(
            store.folder.name[:8], "\n".join(f"{part}: {name}" for part, name in parts.items()), f"{len(store):,}",
            f"{shape[0]} x {shape[1]}", str(store.dtype).removeprefix("torch."), f"{kept.bytes / GB:.3g}",
            time.strftime("%Y-%m-%d", time.localtime(kept.used)),
        )  # fmt: skip
    make_console(stderr=False).print(table)


@cache_app.command()
def verify(folder: Where, as_json: Json = False) -> None:
    """Read every entry and compare its checksum; exit code 1 where some are damaged (the next run makes them again)."""
    from ..base.progress import RowProgress
    from ..cache.upkeep import stores_in
    from ..cache.upkeep import verify as check

    found = []
    with for_a_program(as_json) as give:
        for kept in stores_in(_root(folder)):
            total = len(kept.store)
            with RowProgress(make_console(), kept.store.folder.name[:8]) as progress:
                wrong = check(kept.store, progress.counter("read", total, "entries"))
            found.append({"store": kept.store.folder.name, "entries": total, "damaged": wrong})
            tell(f"{kept.store.folder}: {wrong:,} of {total:,} entries are damaged.")
        give(found)
    if any(each["damaged"] for each in found):
        raise SystemExit(1)


@cache_app.command()
def prune(
    folder: Where,
    days: Annotated[float | None, typer.Option(min=0.0, help="Remove what no run opened for so many days.")] = None,
    max_gb: Annotated[float | None, typer.Option(min=0.0, help="Then the longest unused, down to so many GB.")] = None,
    as_json: Json = False,
) -> None:
    """Remove damaged and double entries and what killed runs left, and whole stores as the options say."""
    from ..base.progress import waiting
    from ..cache.upkeep import prune as tidy

    with for_a_program(as_json) as give:
        with waiting(make_console(), f"Looking through {folder}"):
            done = []
            for sentence in tidy(_root(folder), days, max_gb):
                done.append(sentence)
                tell(sentence)
        if not done:
            tell(f"{folder}: there is nothing to remove.")
        give({"done": done})


def _root(given: str) -> Path:
    from ..recipe.schema import load_recipe

    if Path(given).is_dir():
        return Path(given)
    if not given.endswith((".yaml", ".yml")) and given not in list_recipes():
        raise UserError(f"There is no folder {given!r}; name a cache's folder, or a recipe that has a `cache`.")
    recipe = load_recipe(given)
    if recipe.cache is None:
        raise UserError(f"{recipe.where(('cache',))}: the recipe has no `cache`; give the folder itself.")
    return Path(recipe.cache.path)
