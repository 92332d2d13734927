"""What one of several processes does for the others, what all of them do together, and what keeps two runs apart."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError
from .names import RUN_LOCK, Json, Values
from .whole_files import open_regular, read_text

if TYPE_CHECKING:
    from filelock import FileLock

Found = TypeVar("Found")
# What accelerate's parallelism_config may share out beside whole rows.
SPLITTING = {"cp_size": "context parallelism", "sp_size": "sequence parallelism", "tp_size": "tensor parallelism"}
BEAT = 10.0  # seconds between two touches
BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart, where containers have host names of their own


def let_threads_sleep() -> None:
    """Threads of OpenMP that wait for the next piece of work sleep, unless the user has said otherwise.

    They would spin, which on a busy machine takes the cores from those that work. OpenMP reads this once, when torch is
    loaded: to be called by the commands before, never on import.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def refuse_split_rows(sizes: Values, where: str) -> None:
    """Refuses what shares one row, or one layer, out over processes: a row's pictures would stay whole on each of them.

    Args:
        sizes: How many processes share, by the names that accelerate has for it (`cp_size`); as numbers or text.
        where: Who says so, for the sentence.

    Raises:
        UserError: One is not 1.
    """
    for name, what in SPLITTING.items():
        if (size := str(sizes.get(name) or 1)) != "1":
            raise UserError(
                f"{where}: {name} is {size}, but {what} is not supported, because image tokens and image features "
                f"would be cut apart; leave it out: for long rows take FSDP2 (accelerate_configs/fsdp2.yaml) with "
                f"sft.activation_checkpointing: true, fewer frames or smaller images."
            )


def find_processes() -> None:
    """Lets the processes of a launch find each other: to be called before anything asks for their number.

    Without being told that there is nothing but CPUs, accelerate takes each of them for one alone.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def refuse_strangers(found: int) -> None:
    """Refuses processes of one launch that did not find each other, so that each would do the work of all.

    Args:
        found: How many work together.

    Raises:
        UserError: The launcher started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found:
        raise UserError(
            f"{started} processes were started, but each would work alone, because there is no GPU here; set "
            f"sft.use_cpu=true to work on the CPU together, or start one process."
        )


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
    if errors := [each for each in outcomes if isinstance(each, UserError)]:
        raise errors[0]
    return [each for each in outcomes if not isinstance(each, UserError)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_process_group() -> None:
    """Torch warns of processes that end without saying so."""
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()


def cores_for_each() -> int:
    """Cores that a process may use so that all processes of its machine together have no more than there are."""
    from accelerate import PartialState
    from accelerate.utils import get_int_from_env

    # What torchrun and the MPIs set; where neither did, all processes may be on this machine.
    said = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    local = get_int_from_env(said, PartialState().num_processes)
    return max(1, cores() // max(1, local))


@contextmanager
def hold_folder(
    folder: str | Path, say: Callable[[str], None] = lambda line: None, key: str = "sft.output_dir"
) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if it is not there and removed again if nothing was written.

    The lock is the operating system's, which takes it back from a process that dies. Where machines share a disk it may
    not reach from one to the other, so the holder also touches the file every few seconds: what another machine left is
    looked at for a while, and taken over where nobody touches it.

    A folder that cannot be written is left alone; `settle_resume` says so.

    Args:
        folder: The run's `output_dir`.
        say: Told that another machine's run is being looked for.
        key: What the folder is called in the message.

    Raises:
        UserError: Another run is going on in it.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    file = folder / RUN_LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(file, key)
        _look_for_others(file, lock is not None, say, key)
        file.write_text(json.dumps(_self()) + "\n", encoding="utf-8")
    except OSError:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_beat, args=(file, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):
            file.unlink()  # before the lock is given back: afterwards it may be the next one's
        if lock is not None:
            lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _lock(file: Path, key: str) -> FileLock | None:
    """The lock, held; None where the disk knows none."""
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(file, key) from None
    except (OSError, NotImplementedError):
        if not os.access(file.parent, os.W_OK):
            raise
        return None
    return lock


def _look_for_others(file: Path, locked: bool, say: Callable[[str], None], key: str) -> None:
    """Raises a UserError where the run that left the file is still going on, out of the lock's reach."""
    holder = _holder(file)
    if not holder or (locked and holder.get("machine") == _self()["machine"]):
        return
    say(f"{file.parent} was left by {_words(holder)}; looking for {3 * BEAT:.0f} s whether that run still goes on.")
    before = file.stat().st_mtime_ns
    end = time.monotonic() + 3 * BEAT
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        with open_regular(file) as opened:  # because a network's disk asks its server only then
            if os.fstat(opened.fileno()).st_mtime_ns != before:
                raise _in_use(file, key)


def _in_use(file: Path, key: str) -> UserError:
    return UserError(
        f"{key} {str(file.parent)!r} is in use: another run, {_words(_holder(file))}, writes to it; wait for "
        f"its end, stop it, or choose another folder."
    )


def _words(holder: Json) -> str:
    if not holder:
        return "which is just beginning"
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"


def _self() -> Json:
    host = platform.node()
    machine = read_text(BOOT).strip() if BOOT.is_file() else host
    return {"process": os.getpid(), "host": host, "machine": machine, "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(file: Path) -> Json:
    """Who wrote the file; nothing where nobody has finished writing it."""
    try:
        found = json.loads(read_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beat(file: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(file)
