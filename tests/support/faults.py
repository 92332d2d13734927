"""A collator that brings a run to its end in one of the ways in which runs end badly."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest import mock

import torch

from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.model.modeling import VLMForConditionalGeneration


class Fails(MultimodalCollator):
    """Makes batches, until the row about dogs comes.

    Args:
        how: `collator` and `memory` raise where the batch is made, `kill` kills its process there, and `model` and
            `device` raise in the forward pass.
        rank: The one process that fails; None for all.
    """

    def __init__(self, *args: Any, how: str, rank: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kills = how == "kill"
        here = rank is None or os.environ.get("RANK", "0") == str(rank)
        in_batch = {"collator": LookupError("a hole in the dictionary"), "memory": MemoryError()}
        in_model = {"model": IndexError("a hole in the model"), "device": torch.OutOfMemoryError("CUDA out of memory")}
        self.error = in_batch.get(how) if here else None
        if here and how in in_model:
            mock.patch.object(VLMForConditionalGeneration, "forward", side_effect=in_model[how]).start()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        if any("dogs" in str(row["messages"]) for row in rows):
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.error is not None:
                raise self.error
        return super().__call__(rows)
