"""What one of several processes does for the others."""

from __future__ import annotations

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


def on_first_process(work: Callable[[], Any]) -> Any:
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
