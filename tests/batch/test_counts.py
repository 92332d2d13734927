"""What a batch says of itself is what the model would have counted."""

from __future__ import annotations

import torch

from vlm_sft.batch.counts import counts_of


def test_positions_and_image_tokens_are_counted_where_there_is_something_to_count():
    ids = torch.tensor([[7, 7, 3, 4], [7, 5, 6, 0]])
    labels = torch.tensor([[9, -100, 3, 4], [-100, 5, -100, -100]])
    found = counts_of({"input_ids": ids, "labels": labels, "pixel_values": None}, image_token_id=7)
    # The first label of a row has no output before it.
    assert found["label_positions"].tolist() == [2, 3, 5] and found["image_token_count"] == 3
    assert type(found["image_token_count"]) is int, "a tensor would travel to the device"
    assert counts_of({"input_ids": ids}, image_token_id=None) == {}
    assert counts_of({"labels": torch.zeros(3), "inputs_embeds": torch.zeros(1, 3, 2)}, image_token_id=7) == {}
