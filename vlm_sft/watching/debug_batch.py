"""`vlm-sft debug-batch`: the rows of a step that went wrong, one by one, through the checkpoint before it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from ..base.console import make_console
from ..base.errors import UserError
from ..base.names import IGNORED, Json, Row
from ..base.progress import waiting
from ..batch.collator import MultimodalCollator
from ..batch.counts import rows_and_tokens
from ..bundle.load import load, recipe_of
from ..bundle.manifest import read_manifest
from ..bundle.run_folder import checkpoints, find_records, flaw_of, read_lines, step_of
from ..data.dataset import load_source
from ..pieces.piece import specs_of
from ..recipe.schema import Recipe
from ..rows.messages import unpacked
from ..stack.kinds import kind_of


def run(folder: str, step: int | None = None, checkpoint: str | None = None, trust_remote_code: bool = False) -> Json:
    """Prints, for each row of a recorded step: loss, tokens, images, and whether all of it is finite.

    Args:
        folder: The run's `output_dir`, with `watch.jsonl`.
        step: Which step; default the last one recorded.
        checkpoint: A bundle to look with; default the run's newest whole one before the step.
        trust_remote_code: As for `vlm_sft.load`.

    Returns:
        The same for a program: `step`, `why`, `loss`, `bundle`, and `rows`, each with the columns of the table.

    Raises:
        UserError: Nothing was recorded, there is no checkpoint, or a row is no longer in the data.
    """
    record = find_record(Path(folder), step)
    bundle = Path(checkpoint) if checkpoint else checkpoint_before(Path(folder), record["step"])
    with waiting(make_console(), f"Loading {bundle}"):
        model, processor = load(bundle, trust_remote_code=trust_remote_code)
    recipe = recipe_of(bundle, read_manifest(bundle))
    rows = find_rows(recipe, [name for ids in record["rows"] for name in ids])
    collator = kind_of(specs_of(recipe)).collator(processor, max_length=recipe.sft.get("max_length"))
    loss = record["loss"]
    console = make_console(stderr=False, soft_wrap=True)
    console.print(f"Step {record['step']:,} ({record['why']}): loss {loss:g} in training. Looked at with {bundle}.")
    table = Table("row", "loss", "tokens", "in the loss", "images (width × height, mean, spread)", "finite")
    looked = [examine(model, collator, row) for row in rows]
    for each in looked:
        table.add_row(*each)
    console.print(table)
    columns = ("row", "loss", "tokens", "in_the_loss", "images", "finite")
    found = [dict(zip(columns, each, strict=True)) for each in looked]
    return {"step": record["step"], "why": record["why"], "loss": loss, "bundle": str(bundle), "rows": found}


def find_record(folder: Path, step: int | None) -> Json:
    """The record of a step in `watch.jsonl`, or the last one."""
    path = find_records(folder)
    records = [record for record in read_lines(path) if _is_whole(record)]
    found = [record for record in records if step is None or record["step"] == step]
    if not found:
        steps = ", ".join(str(record["step"]) for record in records)
        raise UserError(f"{str(path)!r} has no record of step {step}; it has: {steps or 'none'}.")
    return found[-1]


def _is_whole(record: Json) -> bool:
    """Whether a line of `watch.jsonl` holds all that is looked at."""
    rows = record.get("rows")
    named = isinstance(rows, list) and all(
        isinstance(ids, list) and all(isinstance(n, str) for n in ids) for ids in rows
    )
    return named and isinstance(record.get("loss"), int | float) and isinstance(record.get("why"), str)


def checkpoint_before(folder: Path, step: int) -> Path:
    """The newest whole checkpoint of a run before a step."""
    for checkpoint in reversed(checkpoints(folder)):
        if step_of(checkpoint) < step and flaw_of(checkpoint) is None:
            return checkpoint
    raise UserError(
        f"{str(folder)!r} has no whole checkpoint before step {step}; name a bundle to look with: --checkpoint."
    )


def find_rows(recipe: Recipe, ids: list[str]) -> list[Row]:
    """The training rows with these ids, read anew from the recipe's sources, in this order."""
    seed = recipe.sft.get("data_seed") or recipe.sft.get("seed", 42)
    found: dict[str, Row] = {}
    # Each source by itself: which rows a mixture draws depends on those that were rejected.
    for source in recipe.data.train:
        rows = load_source(source, seed=seed, reject=lambda error: None)
        places = {name: place for place, name in enumerate(rows["id"])}
        found |= {name: rows[places[name]] for name in ids if name in places}
    if missing := [name for name in ids if name not in found]:
        raise UserError(f"The row {missing[0]!r} is no longer in data.train; the data has changed since the run.")
    return [found[name] for name in ids]


def examine(model: nn.Module, collator: MultimodalCollator, row: Row) -> tuple[str, ...]:
    """One row of the table: what comes out when the row goes through the model alone."""
    try:
        batch = collator([row])
    except UserError as error:
        return str(row["id"]), "-", "-", "-", str(error), "no"
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        loss = float(model(**inputs, use_cache=False).loss)
    pixels = inputs.get("pixel_values")
    sizes = [collator.decode(image, f"row {row['id']}").size for image in unpacked(row)["images"]]
    values = "" if pixels is None else f", {float(pixels.mean()):.2f}, {float(pixels.std()):.2f}"
    finite = math.isfinite(loss) and (pixels is None or bool(pixels.isfinite().all()))
    return (
        str(row["id"]),
        f"{loss:.4g}",
        str(int(rows_and_tokens(inputs)[1])),
        str(int((inputs["labels"] != IGNORED).sum()) if "labels" in inputs else "-"),
        (", ".join(f"{width} × {height}" for width, height in sizes) or "none") + values,
        "yes" if finite else "no",
    )
