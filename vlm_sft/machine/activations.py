"""Whether a run keeps its activations or computes them once more, where its recipe leaves that to the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.processes import on_first_process
from ..preflight.dry_run import CHECKPOINTING, settle_checkpointing
from ..preflight.launch import read_launch
from .machine import this_machine

if TYPE_CHECKING:
    from trl import SFTConfig

    from ..recipe.schema import Recipe


def settle_activations(recipe: Recipe, args: SFTConfig, say: Callable[[str], None]) -> None:
    """Sets whether activations are kept where a recipe leaves it open: the first process counts what a step takes.

    Args:
        recipe: A validated recipe, its adapter settled.
        args: Its `sft:`, in which it is set.
        say: Told what was decided.
    """

    def decide() -> tuple[bool, str | None]:
        room = this_machine(Path()).room
        if args.device.type == "cpu":
            room //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # who share the memory
        settled, said = settle_checkpointing(recipe, read_launch(), room)
        return bool(settled.sft.get(CHECKPOINTING[0])), said

    again, said = on_first_process(decide)
    if said:
        args.activation_checkpointing = args.gradient_checkpointing = again
        say(said)
