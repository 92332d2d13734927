"""What `vlm-sft fit` prints and writes."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.assets import assets_root
from ..base.console import for_a_program, make_console, plain_table, say, tell
from ..base.errors import UserError
from ..base.progress import waiting
from ..base.words import duration, gib
from ..reading.files import about_rows
from ..reading.locations import text_files
from .fit import Fit, Gpu, Setting, fit, keys_of, parse_gpu
from .machine import EFFICIENCY, flops_of
from .recipe_edit import set_keys

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipe.schema import Recipe


def run(recipe: Recipe, gpu: str | None, count: int, *, write: bool = False, as_json: bool = False) -> None:
    """Prints the settings that fit, and writes the fastest into the recipe where it is asked to.

    Args:
        recipe: A validated recipe.
        gpu: Its memory or its name; None: the one here.
        count: How many train together.
        write: Sets the keys in the recipe's file.
        as_json: Prints JSON on standard output.

    Raises:
        UserError: Nothing fits, no GPU is named and none is here, or the recipe cannot be written.
    """
    from ..recipe.libraries import validate_libraries

    path = _to_write(recipe) if write else None
    goal = parse_gpu(gpu, count) if gpu is not None else _here(count)
    validate_libraries(recipe)
    console = make_console()
    with waiting(console, "Counting the memory of steps"):
        found = fit(recipe, goal, lambda doing: say(console, f"Counting {doing}."))
    first, rows = found.settings[0], _rows(recipe)
    keys = {".".join(key): value for key, value in keys_of(first, found.now).items()}
    if as_json:
        now, settings = asdict(found.now), [asdict(each) for each in found.settings]
        with for_a_program(as_json) as give:
            give({"gpu_bytes": goal.size, "count": count, "now": now, "fits_now": found.sentence is None,
                  "settings": settings, "keys": keys, "rows": rows})  # fmt: skip
    else:
        tell(f"As it is: {gib(found.now.memory)}. {found.sentence or 'It fits.'}")
        make_console(stderr=False).print(_table(found, goal, rows, recipe))
        tell(found.step)
        if keys and path is None:
            tell("For the first: " + " ".join(f"{key}={_value(value)}" for key, value in keys.items()))
        if first.sharded:
            tell("FSDP2: accelerate launch --config_file accelerate_configs/fsdp2.yaml -m vlm_sft.train RECIPE")
    if path is not None:
        set_keys(path, keys_of(first, found.now))
        say(console, f"{path}: {', '.join(keys) or 'nothing to change'}{' set' if keys else ''}.")


def _value(value: object) -> str:
    """A value of an override."""
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{key}: {_value(each)}" for key, each in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_write(recipe: Recipe) -> Path:
    path = recipe.path
    assert path is not None, "it was read from a file"
    if path.resolve().is_relative_to(assets_root().resolve() / "recipes"):
        raise UserError(
            f"{path.stem} ships with vlm_sft and is not written to; copy it: vlm-sft recipes copy {path.stem}"
        )
    return path


def _here(count: int) -> Gpu:
    import torch

    if not torch.cuda.is_available():
        raise UserError("There is no GPU here; say which one it is for, such as --gpu 24GB or --gpu A100.")
    found = torch.cuda.get_device_properties(0)
    return Gpu(int(found.total_memory), count, flops_of(str(found.name)))


def _rows(recipe: Recipe) -> int | None:
    """About how many rows are trained on; None where files do not tell."""
    total = 0
    for source in recipe.data.train:
        try:
            files = text_files(source.path)
            counts = [about_rows(path) for path in files or ()]
        except (UserError, OSError):
            return None
        if not counts or None in counts:
            return None
        known = sum(each for each in counts if each is not None)
        total += source.repeat * min(known, source.max_rows or known)
    return total


def _table(found: Fit, gpu: Gpu, rows: int | None, recipe: Recipe) -> Table:
    epochs = float(recipe.sft.get("num_train_epochs", 3))
    steps = int(recipe.sft.get("max_steps", -1))
    title = f"What fits {gib(gpu.size)}" + (f" on {gpu.count} GPUs" if gpu.count > 1 else "")
    caption = (
        f"Time: operations of rows that are all full, at {EFFICIENCY:.0%} of {gpu.flops / 1e12:g} TFLOPS; rows half "
        f"as long take half of it."
    )
    table = plain_table(title, caption)
    for column in ("rows", "checkpointing", "weights", "tokens", "memory", "1,000 rows", "all"):
        table.add_column(column, justify="left" if column in ("checkpointing", "weights") else "right", no_wrap=True)

    def whole(each: Setting) -> str:
        seen = (
            steps * each.batch * each.accumulation * gpu.count if steps > 0 else None if rows is None else rows * epochs
        )
        return "" if seen is None else duration(math.ceil(each.seconds * seen / 1000))

    for each in found.settings:
        weights = ("4 bits" if each.four_bits else "as now") + (", FSDP2" if each.sharded else "")
        size = f"{each.length:,}" + (f", {each.pixels:,} px" if each.pixels else "")
        table.add_row(f"{each.batch} x {each.accumulation}", "yes" if each.checkpointing else "no", weights, size,
                      gib(each.memory), duration(each.seconds), whole(each))  # fmt: skip
    return table
