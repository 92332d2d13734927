"""What one of several processes does for the others, and what all of them do together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import UserError

Found = TypeVar("Found")


def one_process_first(work: Callable[[], Found]) -> Found:
    """Does something in every process: on each machine in one first, so that the others find what it left there.

    Raises:
        UserError: As `work`, in every process.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return work()
    if not state.is_local_main_process:
        state.wait_for_everyone()
        return work()
    try:
        done = work()
    except UserError:
        state.wait_for_everyone()  # the others meet the same error
        raise
    state.wait_for_everyone()
    return done


def on_first_process(work: Callable[[], Found]) -> Found:
    """Does something on the first process alone and gives its result to all.

    Raises:
        UserError: In every process, where the first one raised it: none is left waiting for the others.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except UserError as error:
            if state.num_processes == 1:
                raise
            outcome = [UserError(str(error))]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def share_work(work: Callable[[int, int], Found]) -> list[Found]:
    """Does a share of something in each process and gives every one of them what all have found.

    Args:
        work: Number of the process, and how many there are → what its share gives; it is pickled for the others.

    Returns:
        What each share gave, in the order of the processes.

    Raises:
        UserError: In every process, of the first one that raised it: none is left waiting for the others.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return [work(0, 1)]
    outcome: Found | UserError
    try:
        outcome = work(state.process_index, state.num_processes)
    except UserError as error:
        outcome = UserError(str(error))
    outcomes: list[Found | UserError] = gather_object([outcome])
    found = []
    for each in outcomes:
        if isinstance(each, UserError):
            raise each
        found.append(each)
    return found


def cores_for_each() -> int:
    """Cores that a process may use so that all processes of its machine together have no more than there are."""
    from accelerate import PartialState
    from accelerate.utils import get_int_from_env

    # What torchrun and the MPIs say; without a word of theirs all processes may be on this machine.
    said = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    local = get_int_from_env(said, PartialState().num_processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, local))
