"""Several runs in a launch: `accelerate launch --config_file … tests/support/distributed_driver.py RECIPE [RECIPE …]`.

accelerate enters FSDP only where there are accelerators. This program opens that one door; all behind it, in
accelerate, transformers and torch, runs as on GPUs, on a mesh of gloo processes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from vlm_sft import MultimodalCollator, load_recipe
from vlm_sft.base.console import quiet_libraries
from vlm_sft.base.errors import UserError, exit_on_user_error
from vlm_sft.bundle import parity
from vlm_sft.train import train


def open_the_door_to_fsdp() -> None:
    """Makes accelerate's state say FSDP where it would say MULTI_CPU, when the launcher's file asks for FSDP."""
    enter = AcceleratorState.__init__

    def enter_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        enter(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = enter_fsdp


class FailsOnTheSecondProcess(MultimodalCollator):
    """Reads a row that cannot be read, while the first process goes on and waits for gradients."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch, except where the process is the second and the answer is about dogs."""
        if os.environ["RANK"] == "1" and any("dogs" in str(row["messages"]) for row in rows):
            raise UserError("dogs.png has vanished.")
        return super().__call__(rows)


class NotesIds(MultimodalCollator):
    """Notes which rows its process is given: a line a batch in `$IDS-RANK`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch."""
        with open(f"{os.environ['IDS']}-{os.environ['RANK']}", "a", encoding="utf-8") as file:
            print(*(row["id"] for row in rows), file=file)
        return super().__call__(rows)


def main(recipes: list[str]) -> None:
    """Trains one recipe after the other; only the last bundle is compared in a fresh process, which takes seconds."""
    open_the_door_to_fsdp()
    quiet_libraries()
    check = parity.check_parity
    for path in recipes:
        skip = path != recipes[-1]
        parity.check_parity = (lambda *args: {"positions": 0, "max_difference": 0.0}) if skip else check
        train(load_recipe(path))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
