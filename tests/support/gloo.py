"""Real processes that find each other over gloo, forked so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState

from vlm_sft.base.errors import UserError


def in_processes(work: Callable[[int], Any], folder: Path, count: int = 2, seconds: float = 120.0) -> list[Any]:
    """What `work` returns in each of so many processes of one launch; of a user's mistake the sentence.

    Args:
        work: Number of the process → something that can be pickled.
        folder: An empty one, where the processes find each other.
        count: How many there are.
        seconds: When a process that has said nothing is given up.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(work, folder / "meet", rank, count, pipe), daemon=False)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        return [pipe.recv() if pipe.poll(seconds) else "nothing was said" for pipe, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(work: Callable[[int], Any], meet: Path, rank: int, count: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=count)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    try:
        outcome = work(rank)
    except UserError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = repr(error)
    pipe.send(outcome)
    torch.distributed.destroy_process_group()
