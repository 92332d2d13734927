"""Rows of ids as one batch, and what it says of itself.

That is counted on the host that makes it, so that the host never waits for a device to count. The model takes it; a
batch without is counted where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..base.names import IGNORED, ROW_HEADS, ROW_LENGTHS, Inputs, Values
from ..model.losses import supervised_positions
from ..model.positions import row_numbers
from .encoding import EncodedChat, pad

LABEL_POSITIONS = "label_positions"  # (P,) places of the supervised labels in the flattened labels
IMAGE_TOKEN_COUNT = "image_token_count"  # how often the image token stands in the ids: an int, on no device
ANSWERS = "decoder_input_ids"  # (B, L) what an encoder–decoder has written before each label


def batched(
    rows: Sequence[EncodedChat],
    pad_id: int,
    side: str = "right",
    multiple_of: int | None = None,
    answer_start: int | None = None,
) -> dict[str, torch.Tensor]:
    """Pads rows to (B, S) `input_ids`, `attention_mask` and `labels`.

    Packs, and rows that share their images, have what `EncodedChat.lengths_of` says in place of the mask. With
    `answer_start` the ids are prompts alone; answers are (B, L) `labels`, of which the first is none, and `ANSWERS`.

    Args:
        rows: Encoded conversations, or packs of them.
        pad_id: Fills up the ids.
        side: `right` for training, `left` for generation; answers begin on the left.
        multiple_of: Rounds S up to a multiple (tensor cores like 8).
        answer_start: The id that every answer of an encoder–decoder begins behind; None for other models.
    """
    ids = [row.input_ids for row in rows]
    if answer_start is not None:
        ids = [row.input_ids[: row.answer_place] for row in rows]
    longest = max(map(len, ids))
    if multiple_of:
        longest = -(-longest // multiple_of) * multiple_of
    lengths = np.array([[len(row)] for row in ids])
    places = np.arange(longest)
    real = places < lengths if side == "right" else places >= longest - lengths
    batch = {"input_ids": pad(ids, longest, pad_id, side), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    if answer_start is not None:
        answers = [[label for label in row.labels if label != IGNORED] for row in rows]
        most = 1 + max(map(len, answers))
        batch["labels"] = pad([[IGNORED, *answer] for answer in answers], most, IGNORED)
        batch[ANSWERS] = pad([[answer_start, *answer[:-1]] for answer in answers], most, answer_start)
        return batch
    batch["labels"] = pad([row.labels for row in rows], longest, IGNORED, side)
    if apart := EncodedChat.lengths_of(rows):
        del batch["attention_mask"]
        batch |= apart
    return batch


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

    A prefix that rows share is no row, and its tokens count once. Of an encoder–decoder, answers count too.
    """
    if ANSWERS in batch:
        return len(batch[ANSWERS]), batch["attention_mask"].sum() + (batch["labels"] != IGNORED).sum()
    lengths = batch.get(ROW_LENGTHS)
    if lengths is None:
        return len(batch["input_ids"]), batch["attention_mask"].sum()
    rows = (lengths > 0).sum()
    if (heads := batch.get(ROW_HEADS)) is not None:
        before = torch.arange(heads.shape[1] - 1, device=heads.device)
        # A prefix and the first row that goes on from it are one row.
        rows = rows - ((heads[:, 1:] == before) & (lengths[:, 1:] > 0)).sum()
    return rows, lengths.sum()


def places_in(batch: Mapping[str, torch.Tensor]) -> int:
    """How many places a batch has for tokens, with padding."""
    return batch["input_ids"].numel() + (batch["labels"].numel() if ANSWERS in batch else 0)


def owners_of(batch: Mapping[str, torch.Tensor], name: str = "input_ids") -> tuple[torch.Tensor, int]:
    """(B, S) a number for the row of each token, packed or not, and below which these numbers lie.

    Rows that share an image are one. `name` says of what, where answers lie apart from prompts.
    """
    sequences, length = batch[name].shape
    numbers = torch.arange(sequences, device=batch[name].device)[:, None].expand(-1, length)
    if (lengths := batch.get(ROW_LENGTHS)) is None:
        return numbers, sequences
    most = lengths.shape[1] + 1  # padding counts as a row of its own
    return numbers * most + row_numbers(lengths, length, batch.get(ROW_HEADS)), sequences * most
