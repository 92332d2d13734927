"""Which rows come together, by their length: of similar length (`group_by_length`), or packed (`sft.packing`).

Both leave little of a batch to padding. A pack is some rows that stand behind each other in one sequence, none of which
sees another; what a data loader hands on for it is `{PACK: rows}`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset as Stored
from datasets import IterableDataset
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..base.errors import RowError, UserError
from ..base.names import GROUPED, Inputs, Row
from ..rows.filling import pack
from ..rows.merging import apart, merged
from ..rows.messages import IN_EXTRAS, SHARED, unpacked
from .encoding import rendered_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from .collator import MultimodalCollator

PACK = "pack"
PROBED = 8  # rows of which the two shortest, with images where there are some, show whether the model keeps them apart
WINDOW = 64  # packs that a stream is read ahead for: of these, the last may be half empty
LengthsOf = Callable[[list[Row]], list[int]]


def numbered(items: Sequence[Row]) -> Iterator[tuple[int | None, Row]]:
    """Each row of packs with the number of its pack, and each row alone with None."""
    for number, item in enumerate(items):
        yield from ((number, row) for row in item[PACK]) if PACK in item else [(None, item)]


class ByLength(Sampler[int]):
    """Numbers of rows, each once an epoch, in an order in which those of one step are of similar length.

    transformers' own order, drawn anew each epoch from the seed and the epoch alone: so it is the same in all
    processes, and a run that goes on meets the rows that it would have met.

    Args:
        lengths: Tokens of each row.
        rows_a_step: Rows of one step of all processes.
        seed: Decides the order.
    """

    def __init__(self, lengths: Sequence[int], rows_a_step: int, seed: int) -> None:
        self.lengths, self.rows_a_step, self.seed, self.epoch = lengths, rows_a_step, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next (called by accelerate)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.rows_a_step, generator=chance))


class Packs(Sampler[list[int]]):
    """Packs of the numbers of rows, each row once an epoch.

    Which lengths make a pack is settled once, so every epoch has as many packs; which of the rows of a length it gets,
    and the order of the packs, are drawn anew each epoch from the seed and the epoch alone.

    Args:
        lengths: Tokens of each row.
        room: Tokens of a pack.
        seed: Decides the order; None keeps that of the rows, as far as packs can.
    """

    def __init__(self, lengths: Sequence[int], room: int, seed: int | None) -> None:
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.packs = [np.sort(rows) for rows in pack(lengths, room)]
        self.packs.sort(key=lambda rows: rows[0])

    def __len__(self) -> int:
        return len(self.packs)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next (called by accelerate)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            yield from (rows.tolist() for rows in self.packs)
            return
        chance = np.random.default_rng([self.seed % 2**32, self.epoch])
        drawn = np.empty(len(self.lengths), dtype=np.int64)  # for each place, the row that comes there
        drawn[np.argsort(self.lengths, kind="stable")] = np.lexsort((chance.random(len(drawn)), self.lengths))
        for number in chance.permutation(len(self.packs)):
            yield chance.permutation(drawn[self.packs[number]]).tolist()


class PackedRows(Dataset[dict[str, list[Row]]]):
    """Rows by packs of their numbers.

    Args:
        rows: The rows.
        packs: How many packs they make.
    """

    def __init__(self, rows: Stored, packs: int) -> None:
        self.rows, self.packs = rows, packs

    def __len__(self) -> int:
        return self.packs

    def __getitem__(self, numbers: list[int]) -> dict[str, list[Row]]:
        return {PACK: [self.rows[number] for number in numbers]}


def pack_stream(rows: IterableDataset, lengths_of: LengthsOf, room: int, mean_length: float) -> IterableDataset:
    """A stream of packs of a stream's rows: as many as fill `WINDOW` packs are held and packed together.

    Args:
        rows: The stream.
        lengths_of: Tokens of each of some rows.
        room: Tokens of a pack.
        mean_length: Of a row, for how many are held.
    """
    held = max(WINDOW, round(WINDOW * room / max(mean_length, 1.0)))
    columns = list(rows.features or ())
    function = partial(_pack_window, lengths_of=lengths_of, room=room)
    return rows.map(function, batched=True, batch_size=held, remove_columns=columns)


def _pack_window(columns: Mapping[str, list[object]], lengths_of: LengthsOf, room: int) -> dict[str, list[list[Row]]]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    packs = [sorted(numbers) for numbers in pack(lengths_of(rows), room)]
    return {PACK: [[rows[number] for number in numbers] for numbers in sorted(packs)]}


class GroupsByLength:
    """A `Trainer` of transformers whose rows have no ids that it could count: their lengths are given, or measured.

    Attributes:
        lengths: Tokens of each training row; None: they are measured when they are needed.
        eval_lengths: The same of the evaluation rows.
        mean_length: Tokens of a row of a stream, about.
        packing: Whether training rows are packed.
        eval_packing: Whether evaluation rows are.
    """

    lengths: Sequence[int] | None = None
    eval_lengths: Sequence[int] | None = None
    mean_length = 256.0
    packing = eval_packing = False
    args: SFTConfig
    data_collator: Any  # ours, maybe with something wrapped around it
    train_dataset: Stored | IterableDataset
    model: PreTrainedModel
    _prepare_inputs: Callable[[Inputs], Inputs]
    compute_loss_context_manager: Callable[[], AbstractContextManager[None]]

    def take_packing(self, args: SFTConfig) -> SFTConfig:
        """Takes packing over from a configuration; the one that is returned has none, as TRL packs text alone."""
        self.packing = bool(args.packing)
        self.eval_packing = self.packing if args.eval_packing is None else bool(args.eval_packing)
        args = copy.copy(args)
        args.packing = args.eval_packing = False
        return args

    def _get_dataloader(
        self, dataset: Stored | IterableDataset, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader[Inputs]:
        own = super()._get_dataloader  # type: ignore[misc]
        if not (self.packing if is_training else self.eval_packing):
            return own(dataset, *args, is_training=is_training, **kwargs)
        if isinstance(dataset, IterableDataset):
            packed = pack_stream(dataset, partial(_lengths, self._own_collator()), self._room(), self.mean_length)
            return own(packed, *args, is_training=is_training, **kwargs)
        packs = self._packs(dataset, is_training)
        kwargs["sampler_fn"] = lambda rows: packs
        return own(PackedRows(dataset, len(packs)), *args, is_training=is_training, **kwargs)

    def _packs(self, rows: Stored, is_training: bool) -> Packs:
        if not is_training:
            known = self.eval_lengths
            return Packs(known if known and len(known) == len(rows) else self._measured(rows), self._room(), None)
        self.lengths = self._measured(rows) if self.lengths is None else self.lengths
        assert len(self.lengths) == len(rows), "the lengths are of other rows"
        in_order = self.args.train_sampling_strategy == "sequential"
        return Packs(self.lengths, self._room(), None if in_order else self._seed())

    def describe_packing(self) -> str | None:
        """One sentence on what packing does to the padding of the training rows; None where they are not packed."""
        if not self.packing or isinstance(self.train_dataset, IterableDataset):
            return None
        packs, room, batch = len(self._packs(self.train_dataset, True)), self._room(), self.args.train_batch_size
        lengths = np.random.default_rng(0).permutation(np.asarray(self.lengths))
        padded = sum(
            batch_of.max() * len(batch_of) for batch_of in np.split(lengths, range(batch, len(lengths), batch))
        )
        return (
            f"Packed: {len(lengths):,} rows make {packs:,} packs of at most {room:,} tokens, of which "
            f"{1 - lengths.sum() / (packs * room):.1%} stay empty; without packing, padding would be "
            f"{1 - lengths.sum() / padded:.1%} of batches of {batch}."
        )

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compares two rows in one pack, or behind one image, with the same rows apart, in the model to be trained.

        Raises:
            UserError: Their losses differ: something in the model lets a row see the one before it.
        """
        if (row := _first_shared(self.train_dataset)) is not None:
            rows = apart(row)[:2]
            difference, allowed = self._differ(rows, [merged(rows, independent=True)])
            if difference > allowed:
                name = self.model.config.get_text_config().model_type
                raise UserError(
                    f"independent: in this model ({name}) a question sees the one before it: the losses of the rows "
                    f"{rows[0]['id']} and {rows[1]['id']} differ by {difference:.2g} a token from those of "
                    f"each alone (allowed {allowed:.2g}); remove `independent`."
                )
        if not (self.packing or self.eval_packing):
            return
        collator, first = self._own_collator(), list(itertools.islice(self.train_dataset, PROBED))
        measured = zip(_lengths(collator, first), first, strict=True)
        good = [(not row["images"], length, row) for length, row in measured if length]
        rows = [row for *_, row in sorted(good, key=lambda each: each[:2])[:2]]
        if len(rows) < 2:
            return
        # Two packs where a batch has more than one: flash attention takes many rows of one sequence alone.
        sizes = [self.args.train_batch_size] * self.packing + [self.args.eval_batch_size] * self.eval_packing
        packs = min(2, max(sizes))
        difference, allowed = self._differ(rows * packs, [{PACK: rows}] * packs)
        if difference > allowed:
            config = self.model.config.get_text_config()
            name, flash = config.model_type, "flash" in str(config._attn_implementation)
            raise UserError(
                f"sft.packing: in this model ({name}) a row of a pack sees the one before it: the losses of the rows "
                f"{rows[0]['id']} and {rows[1]['id']} differ by {difference:.2g} a token from those of each alone "
                f"(allowed {allowed:.2g}); set {'batch sizes of 1, or ' * (flash and packs > 1)}sft.packing=false."
            )

    def _differ(self, alone: list[Row], together: list[Row]) -> tuple[float, float]:
        """By how much the losses of tokens differ, as the root of their mean square, and by how much they may."""
        model, was_training = self.model, self.model.training
        model.eval()
        try:
            wanted, found = map(self._losses_of, (alone, together))
        finally:
            model.train(was_training)
        # In half precision losses are rounded in proportion: before a projector has learnt, 0.06 of 7 a token is noise.
        half = self.args.bf16 or self.args.fp16 or model.dtype != torch.float32
        allowed = max(0.05, 0.02 * float(wanted.mean())) if half else 1e-3
        return float((found - wanted).double().square().mean().sqrt()), allowed

    def _losses_of(self, items: list[Row]) -> torch.Tensor:
        inputs = self._prepare_inputs(self._own_collator()(items))
        inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        with self.compute_loss_context_manager():
            return self.model(**inputs, supervised_only=True, use_cache=False).token_losses

    def _room(self) -> int:
        room = self._own_collator().max_length or self.args.max_length
        if room is None:
            raise UserError("Packing fills packs up to a length: give the collator or SFTConfig a `max_length`.")
        return room

    def _measured(self, rows: Stored) -> list[int]:
        return _lengths(self._own_collator(), rows)

    def _own_collator(self) -> MultimodalCollator:
        return getattr(self.data_collator, "collator", self.data_collator)  # ours, without what is wrapped around it

    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def num_examples(self, dataloader: DataLoader[Inputs]) -> int:
        """Rows, not packs of them."""
        rows = getattr(dataloader.dataset, "rows", None)
        return super().num_examples(dataloader) if rows is None else len(rows)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Stored | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != GROUPED:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.lengths = self._measured(rows) if self.lengths is None else self.lengths
        assert len(self.lengths) == len(rows), "the lengths are of other rows"
        args = self.args
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return ByLength(self.lengths, rows_a_step, self._seed())

    def _get_eval_sampler(self, eval_dataset: Stored | None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != GROUPED or eval_dataset is None:
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return SequentialSampler(eval_dataset)


def _lengths(collator: MultimodalCollator, rows: Iterable[Row]) -> list[int]:
    lengths = []
    for row in rendered_ahead(collator, rows):
        try:
            lengths.append(len(collator.sample(row, with_images=False).chat.input_ids))
        except RowError:  # its batch will say what is wrong with it, or leave it out
            lengths.append(0)
    return lengths


def _first_shared(rows: Stored | IterableDataset) -> Row | None:
    """The first row of a dataset in which questions share an image and none sees another."""
    if not isinstance(rows, Stored) or IN_EXTRAS not in rows.column_names:
        return None
    marked = pc.match_substring(rows.data.column(IN_EXTRAS), f'"{SHARED}": true')
    place = pc.index(marked, True).as_py()
    return None if place < 0 else unpacked(rows.data.slice(place, 1).to_pylist()[0])
