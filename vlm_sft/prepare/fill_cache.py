"""`vlm-sft cache build` and `accelerate launch -m vlm_sft.cache`: all pictures of a recipe through its frozen parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from ..base.console import say
from ..base.errors import RowError, UserError
from ..base.interrupts import workers_end_with_errors
from ..base.names import ImageEntry, Inputs, Json
from ..base.processes import refuse_strangers
from ..base.progress import RowProgress, waiting
from ..bundle.handover import settle_adapter
from ..cache.keys import digest
from ..cache.prefix import Prefix
from ..cache.store import GB
from ..reading.image_refs import SIZES, TIME
from ..recipe.libraries import build_sft_config, validate_libraries
from ..rows.messages import unpacked
from ..stack.kinds import compose
from ..training.build_trainer import build_collator, open_prefix
from ..training.run_rows import load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console

    from ..batch.collator import MultimodalCollator
    from ..recipe.schema import Recipe


def fill_cache(recipe: Recipe, console: Console) -> Json:
    """Keeps what the frozen parts of a recipe give for each picture of its rows; what is there already stays.

    Every process takes a share. It may be killed at any moment and started again.

    Returns:
        `store` (its folder), `pictures` and `bytes` that it holds now, and how many were `computed` by this process.

    Raises:
        UserError: No cache, or it would be wrong; a bad picture; no more room; processes that did not find each other.
    """
    validate_libraries(recipe)
    where = recipe.where(("cache",))
    if recipe.cache is None:
        raise UserError(f"{where}: there is no `cache` to fill; add cache.path=FOLDER.")
    if recipe.data.streaming:
        raise UserError(
            f"{where}: the rows of a stream (`data.streaming`) are not known before; it fills while training."
        )
    args = build_sft_config(recipe)
    refuse_strangers(args.world_size)
    recipe = settle_adapter(recipe)
    composed = compose(recipe)
    collator = build_collator(recipe, composed.processor, args)
    rows = load_rows(recipe, collator, args, console)
    said: list[str] = []
    with waiting(console, "Loading the frozen parts"):
        prefix = open_prefix(recipe, composed, collator, None, said.append)
    if prefix is None:
        raise UserError(said[-1])
    prefix.say = partial(say, console)
    pictures = _Pictures([rows.train, *([rows.eval] if rows.eval is not None else [])])
    share = range(
        len(pictures) * args.process_index // args.world_size,
        len(pictures) * (args.process_index + 1) // args.world_size,
    )
    loader: DataLoader[Any] = DataLoader(
        torch.utils.data.Subset(pictures, share),
        batch_size=args.per_device_train_batch_size,
        collate_fn=partial(_batch, prefix, collator),
        num_workers=args.dataloader_num_workers,
    )
    done = 0
    with RowProgress(console, "cache") as progress, workers_end_with_errors():
        for batch, count in loader:
            prefix.complete({n: each.to(args.device) if hasattr(each, "to") else each for n, each in batch.items()})
            if prefix.store.full:
                raise UserError(prefix.store.full)
            done += count
            progress.tell("looked at", done, len(share), "pictures")
    PartialState().wait_for_everyone()
    prefix.store.refresh()
    held = len(prefix.store)
    say(
        console,
        f"{prefix.store.folder}: {held:,} pictures, {held * prefix.store.row_bytes / GB:.3g} GB; {prefix.computed:,} "
        f"computed now{' by this process' if args.world_size > 1 else ''}.",
    )
    size = held * prefix.store.row_bytes
    return {"store": str(prefix.store.folder), "pictures": held, "bytes": size, "computed": prefix.computed}


class _Pictures:
    """Every picture of some sets of rows, each once."""

    def __init__(self, sets: Sequence[Dataset]) -> None:
        self.sets = sets
        places: dict[tuple[Any, ...], tuple[int, int, int]] = {}
        for number, rows in enumerate(sets):
            for index, row in enumerate(rows):
                for place, image in enumerate(unpacked(row)["images"]):
                    encoded = image.get("bytes")
                    known = image.get("path") if encoded is None else digest(encoded)
                    asked = tuple(image.get(name) for name in (*SIZES, TIME))
                    places.setdefault((known, encoded is None, *asked), (number, index, place))
        self.places = list(places.values())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[ImageEntry, str]:
        number, row_number, place = self.places[index]
        row = unpacked(self.sets[number][row_number])
        return row["images"][place], f"row {row['id']}"


def _batch(
    prefix: Prefix, collator: MultimodalCollator, pictures: Sequence[tuple[ImageEntry, str]]
) -> tuple[Inputs, int]:
    """What `Prefix.complete` takes of pictures, and how many they are; the recipe may let wrong ones be left out."""
    found = []
    for image, where in pictures:
        try:
            found.append(prefix.kept.picture(image, partial(collator.decode, image, where)))
        except RowError:
            if not collator.drop_rejected:
                raise
    return prefix.kept.image_inputs(collator.processor, found, [""] * len(found)), len(pictures)
