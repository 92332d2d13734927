"""Rows of similar length in one batch, so that little of it is padding: `group_by_length` in a recipe's `sft`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..base.errors import RowError
from ..base.names import GROUPED
from .collator import MultimodalCollator


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


class GroupsByLength:
    """A `Trainer` of transformers whose rows have no ids that it could count: their lengths are given, or measured.

    Attributes:
        lengths: Tokens of each training row; None: they are measured when they are needed.
    """

    lengths: Sequence[int] | None = None
    args: Any
    data_collator: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != GROUPED:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.lengths is None:
            collator = getattr(self.data_collator, "collator", self.data_collator)  # without what is wrapped around it
            self.lengths = [_length(collator, row) for row in rows]
        assert len(self.lengths) == len(rows), "the lengths are of other rows"
        args = self.args
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return ByLength(self.lengths, rows_a_step, args.seed if args.data_seed is None else args.data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != GROUPED or eval_dataset is None:
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return SequentialSampler(eval_dataset)


def _length(collator: MultimodalCollator, row: dict[str, Any]) -> int:
    try:
        return len(collator.encode(row, with_images=False).chat.input_ids)
    except RowError:  # which its batch will say, or leave out
        return 0
