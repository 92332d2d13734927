"""The rows of a run: read, looked over and measured before any weight is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from trl import SFTConfig

    from .collator import MultimodalCollator
    from .recipe import Recipe

CHUNK = 256  # rows measured at a time
WORTH_WORKERS = 4 * CHUNK  # starting workers takes longer than measuring fewer rows
SECONDS_BETWEEN_LINES = 5.0


def load_rows(
    recipe: Recipe, collator: MultimodalCollator, args: SFTConfig, console: Console
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Training rows, evaluation rows and the notes on them that go into the bundle.

    Every image file is looked for and every row is measured before the first step, so that a long run does not end on
    a row that could have been named at once. Every process reads the rows, the first one alone looks them over; what
    it finds wrong is raised in all.

    Args:
        recipe: The recipe, for its `data`.
        collator: Measures the rows; see `measure_rows`.
        args: For its seeds, the number of processes and of data-loader workers.
        console: Told how many rows there are and how long.

    Raises:
        UserError: A source or a row cannot be trained on, or there are fewer rows than processes.
    """
    from .data import load_mixture

    data, seed = recipe.data, args.data_seed or args.seed
    sets = {"train": load_mixture(data.train, data.sampling, languages=data.languages, seed=seed)}
    if recipe.data.eval:
        sets["eval"] = load_mixture(recipe.data.eval, "proportional", seed=args.seed)
    count = len(sets["train"])
    if count < args.world_size:
        raise UserError(
            f"data.train has {count} {'row' if count == 1 else 'rows'} but accelerate started {args.world_size} "
            f"processes, so some would have nothing to do; use --num_processes {count} or fewer."
        )
    notes = on_first_process(partial(_look_over, sets, collator, args.dataloader_num_workers, console))
    return sets["train"], sets.get("eval"), notes


def _look_over(
    sets: dict[str, Dataset], collator: MultimodalCollator, workers: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Checks images and measures rows of each set, saying how far it is; returns the notes."""
    from .data import check_images

    notes = {}
    for name, rows in sets.items():
        check_images(rows)
        # The spinner stands on a terminal; elsewhere there are lines.
        with console.status(f"{name}: measuring {len(rows):,} rows") as status:
            said = time.monotonic()

            def tick(done: int, status: Any = status, name: str = name, total: int = len(rows)) -> None:
                nonlocal said
                line = f"{name}: measured {done:,} of {total:,} rows"
                if console.is_terminal:
                    status.update(line)
                elif time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    console.print(line, highlight=False)
                    said = time.monotonic()

            notes[f"{name}_rows"] = measure_rows(rows, collator, workers, tick)
        console.print(f"{name}: {describe_rows(notes[f'{name}_rows'])}", highlight=False)
    return notes


def measure_rows(
    rows: Dataset, collator: MultimodalCollator, workers: int = 0, tick: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Renders and tokenises every row without opening an image; a row that cannot be trained on is an error.

    Args:
        rows: Rows `{"messages", "images", "source", "id"}`.
        collator: Its `encode` is asked.
        workers: Processes that share the work; 0 for this one alone.
        tick: Told now and then how many rows are done.

    Returns:
        `rows`, `longest` and `mean_length` in tokens, `rows_shortened` and `turns_lost` to fit `max_length`.

    Raises:
        UserError: What `collator.encode` raises.
    """
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        rows,
        batch_size=CHUNK,
        collate_fn=partial(_measure, collator),
        num_workers=workers if len(rows) > WORTH_WORKERS else 0,
        generator=torch.Generator(),  # the global one must not depend on whether rows were measured
    )
    lengths: list[int] = []
    losses: list[int] = []
    for part in loader:
        lengths += [length for length, _ in part]
        losses += [lost for _, lost in part]
        tick(len(lengths))
    return {
        "rows": len(lengths),
        "longest": max(lengths, default=0),
        "mean_length": round(sum(lengths) / max(len(lengths), 1), 1),
        "rows_shortened": sum(lost > 0 for lost in losses),
        "turns_lost": sum(losses),
    }


def _measure(collator: MultimodalCollator, rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(tokens, turns lost) of each row."""
    samples = (collator.encode(row, with_images=False) for row in rows)
    return [(len(sample.chat.input_ids), sample.turns_lost) for sample in samples]


def describe_rows(counts: dict[str, Any]) -> str:
    """One sentence on the rows of a set."""
    rows = "1 row" if counts["rows"] == 1 else f"{counts['rows']:,} rows"
    lost = f"; {counts['rows_shortened']:,} rows lost {counts['turns_lost']:,} turns to fit max_length"
    return (
        f"{rows}, {counts['mean_length']:g} tokens in the mean, {counts['longest']:,} at most"
        f"{lost if counts['turns_lost'] else ''}."
    )


def on_first_process(work: Callable[[], Any]) -> Any:
    """Does something on the first process alone and gives its result to all.

    Raises:
        UserError: In every process, where the first one raised it: none is left waiting for the others.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except UserError as error:
            if state.num_processes == 1:
                raise
            outcome = [UserError(str(error))]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
