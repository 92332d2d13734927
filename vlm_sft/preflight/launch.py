"""How many processes train together and what they share out, as `accelerate launch` or its config file says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import UserError
from ..base.names import Values
from ..base.processes import refuse_split_rows
from ..base.whole_files import read_text
from ..base.words import reason_of

# What is shared out at each stage of ZeRO (arXiv 1910.02054); FSDP does what stage 3 does, or stage 2.
SHARED = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}


@dataclass(frozen=True)
class Launch:
    """The processes of a run.

    Attributes:
        processes: How many, on all machines together.
        kind: `single`, `DDP`, `DeepSpeed` or `FSDP`.
        stage: What is shared out: a key of `SHARED`.
        offloads: What lies in the memory of the host: `optimizer`, `weights`.
    """

    processes: int = 1
    kind: str = "single"
    stage: int = 0
    offloads: tuple[str, ...] = ()

    def share(self, what: str, size: int) -> int:
        """Bytes of `weights`, `gradients` or `optimizer` on one device, of so many altogether."""
        if what in self.offloads:
            return 0
        return -(-size // self.processes) if what in SHARED[self.stage] else size

    def __str__(self) -> str:
        """`8 processes, DeepSpeed ZeRO-2`."""
        if self.kind == "single":
            return "one process"
        how = {"DeepSpeed": f"DeepSpeed ZeRO-{self.stage}", "FSDP": f"FSDP, sharing as ZeRO-{self.stage}"}
        host = f", {' and '.join(self.offloads)} offloaded to the host" if self.offloads else ""
        count = "one process" if self.processes == 1 else f"{self.processes} processes"
        return f"{count}, {how.get(self.kind, self.kind)}{host}"


def read_launch(config_file: str | None = None, environment: Mapping[str, str] = os.environ) -> Launch:
    """What a config file of accelerate says, or without one the variables that `accelerate launch` sets.

    Raises:
        UserError: The file cannot be read, is none of accelerate, or names a way that is not supported.
    """
    if config_file is not None:
        return _from_file(Path(config_file))
    processes = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        places = [environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")]
        return _deepspeed(processes, int(stage), places)
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        names = {"fsdp_reshard_after_forward", "fsdp_sharding_strategy", "fsdp_offload_params"}
        return _fsdp(processes, {name: environment[name.upper()] for name in names if name.upper() in environment})
    return Launch(processes, "DDP" if processes > 1 else "single")


def _from_file(path: Path) -> Launch:
    try:
        config = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--accelerate-config {path}: it cannot be read ({reason_of(error)}).") from error
    if not isinstance(config, dict) or "distributed_type" not in config:
        what = "it has no distributed_type; `accelerate config` writes such files."
        raise UserError(f"--accelerate-config {path}: {what}")
    if isinstance(split := config.get("parallelism_config"), dict):
        sizes = {name.removeprefix("parallelism_config_"): size for name, size in split.items()}
        refuse_split_rows(sizes, f"--accelerate-config {path}: parallelism_config")
    kind = str(config["distributed_type"]).upper()
    processes = config.get("num_processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise UserError(f"--accelerate-config {path}: num_processes must be a number above zero, not {processes!r}.")
    options = config.get(f"{kind.lower()}_config") or {}
    if not isinstance(options, dict):
        raise UserError(f"--accelerate-config {path}: {kind.lower()}_config must be a mapping, not {options!r}.")
    if kind == "DEEPSPEED":
        if file := options.get("deepspeed_config_file"):
            raise UserError(
                f"--accelerate-config {path}: it leaves ZeRO to {file}, which is not read here; state zero_stage and "
                f"the offload devices under deepspeed_config instead."
            )
        places = [options.get(f"offload_{what}_device") for what in ("optimizer", "param")]
        stage = options.get("zero_stage", 2)
        if str(stage) not in map(str, SHARED):
            raise UserError(f"--accelerate-config {path}: zero_stage must be 0, 1, 2 or 3, not {stage!r}.")
        return _deepspeed(processes, int(stage), places)
    if kind == "FSDP":
        return _fsdp(processes, options)
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU"):
        raise UserError(
            f"--accelerate-config {path}: distributed_type {kind} is not estimated; NO, MULTI_GPU, MULTI_CPU, "
            f"DEEPSPEED and FSDP are."
        )
    return Launch(processes, "DDP" if processes > 1 else "single")


def _deepspeed(processes: int, stage: int, places: list[Any]) -> Launch:
    offloads = tuple(w for w, place in zip(("optimizer", "weights"), places, strict=True) if place in ("cpu", "nvme"))
    return Launch(processes, "DeepSpeed", stage, offloads)


def _fsdp(processes: int, options: Values) -> Launch:
    """`reshard_after_forward` (FSDP2) is a boolean, or FSDP1's name of the same; unset, all is shared out."""
    how = str(options.get("fsdp_reshard_after_forward", options.get("fsdp_sharding_strategy", "true"))).lower()
    stage = 2 if how in ("false", "shard_grad_op", "2") else 3
    stage = 0 if how in ("no_shard", "3") else stage
    offloads = ("optimizer", "weights") if str(options.get("fsdp_offload_params", "")).lower() == "true" else ()
    return Launch(processes, "FSDP", stage, offloads)
