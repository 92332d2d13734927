"""What a batch says of itself: counted on the host that makes it, so that the host never waits for a device to count.

The model takes both; a batch without them is counted where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..base.names import ROW_HEADS, ROW_LENGTHS, Inputs, Values
from ..model.losses import supervised_positions
from ..model.positions import row_numbers

LABEL_POSITIONS = "label_positions"  # (P,) places of the supervised labels in the flattened labels
IMAGE_TOKEN_COUNT = "image_token_count"  # how often the image token stands in the ids: an int, on no device


def counts_of(batch: Values, image_token_id: int | None) -> Inputs:
    """`label_positions` and `image_token_count` of a batch, as far as it has what they are counted in.

    Args:
        batch: (B, S) `labels` and `input_ids`, on the host.
        image_token_id: Id that stands for image features; None where the model does not ask.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    found: Inputs = {}
    if isinstance(labels, torch.Tensor) and labels.ndim == 2:
        found[LABEL_POSITIONS] = supervised_positions(labels)
    if isinstance(ids, torch.Tensor) and image_token_id is not None:
        found[IMAGE_TOKEN_COUNT] = int((ids == image_token_id).sum())
    return found


def rows_and_tokens(batch: Mapping[str, torch.Tensor]) -> tuple[int | torch.Tensor, torch.Tensor]:
    """How many rows a batch has, packed or not, and how many tokens they have, without padding.

    A prefix that rows share is no row, and its tokens count once.
    """
    lengths = batch.get(ROW_LENGTHS)
    if lengths is None:
        return len(batch["input_ids"]), batch["attention_mask"].sum()
    rows = (lengths > 0).sum()
    if (heads := batch.get(ROW_HEADS)) is not None:
        before = torch.arange(heads.shape[1] - 1, device=heads.device)
        rows = rows - ((heads[:, 1:] == before) & (lengths[:, 1:] > 0)).sum()  # the first that goes on from each prefix
    return rows, lengths.sum()


def owners_of(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(B, S) a number for the row of each token, packed or not, and below which these numbers lie.

    Rows that share an image are one.
    """
    sequences, length = batch["input_ids"].shape
    numbers = torch.arange(sequences, device=batch["input_ids"].device)[:, None].expand(-1, length)
    if (lengths := batch.get(ROW_LENGTHS)) is None:
        return numbers, sequences
    most = lengths.shape[1] + 1  # with what is padding
    return numbers * most + row_numbers(lengths, length, batch.get(ROW_HEADS)), sequences * most
