"""The folder that a run writes to: how a checkpoint appears in it, which are whole, and from which one to go on.

A checkpoint is written into `.unfinished-checkpoint-N` beside its place, gets a list of its files last
(`checkpoint.json`), is flushed to the disk and then renamed. So a name without the dot is never half a checkpoint,
whenever the run is killed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import (
    CHECKPOINT_FILES,
    EXPORT_REPORT,
    HISTORY,
    MANIFEST,
    RUN_FACTS,
    RUN_LOCK,
    RUN_PAGE,
    SAMPLES,
    STRANGE_STEPS,
    Json,
)
from ..base.whole_files import UNFINISHED, IrregularError, read_bytes, read_text
from ..base.words import closest

if TYPE_CHECKING:
    from transformers import TrainingArguments

PREFIX = "checkpoint-"
_NAME = re.compile(rf"{PREFIX}(\d+)")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run by step, the newest last, whole or not."""
    folder = Path(folder)
    found = [path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """`checkpoint-120` → 120."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found, checkpoint
    return int(found[1])


def flaw_of(checkpoint: Path) -> str | None:
    """Says why a folder is no whole checkpoint; None when it is one.

    Files are compared by name and size, so that a copy that was cut off is found too.
    """
    try:
        files = json.loads(read_text(checkpoint / CHECKPOINT_FILES))["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return f"it has no list of its files ({CHECKPOINT_FILES})"
    for name, size in files:
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes, not {size}"
    return None


def newest(folder: str | Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    Args:
        folder: The run's `output_dir`.
        say: Told of each newer one that is passed over, and why.
    """
    for checkpoint in reversed(checkpoints(folder)):
        flaw = flaw_of(checkpoint)
        if flaw is None:
            return checkpoint
        say(f"{checkpoint} is passed over: {flaw}.")
    return None


def find_manifest(folder: str | Path) -> Path:
    """The file that makes a folder a bundle.

    Raises:
        UserError: The folder is none; the sentence says what it is instead and what to give.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no bundle: {_what_else(Path(folder))}")
    return path


def _what_else(folder: Path) -> str:
    finished = "give the output_dir of a finished run."
    if not folder.exists():
        near = nearest_bundle(folder)
        return f"there is no such folder; {f'did you mean {near!r}?' if near else finished}"
    if not folder.is_dir():
        return f"it is a file; {finished}"
    if (folder / EXPORT_REPORT).is_file():
        return "it is an export, which transformers loads by itself; give the bundle that it was made from."
    if checkpoint := newest(folder):
        return f"its run did not end; give a checkpoint, {str(checkpoint)!r}, or go on with the run: --resume."
    if others := _bundles_in(folder):
        named = ", ".join(repr(str(other)) for other in others[:5])
        return f"it has no {MANIFEST}; give one of those in it: {named}{', …' if len(others) > 5 else ''}."
    return f"it has no {MANIFEST}; {finished}"


def nearest_bundle(folder: str | Path) -> str | None:
    """The bundle beside a path that is not there whose name is most like it, or None."""
    parent = Path(folder).parent
    name = closest(Path(folder).name, [bundle.name for bundle in _bundles_in(parent)])
    return str(parent / name) if name else None


def _bundles_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def find_records(folder: str | Path) -> Path:
    """The file in which a run wrote down the steps that went wrong.

    Raises:
        UserError: Nothing was written down, or the folder is no run's.
    """
    path = Path(folder) / STRANGE_STEPS
    if path.is_file():
        return path
    if (Path(folder) / MANIFEST).is_file() or checkpoints(folder):
        raise UserError(
            f"{str(folder)!r} has no {STRANGE_STEPS}: no step of this run went wrong, so there is none to show."
        )
    lacks = f"it has neither {STRANGE_STEPS} nor a checkpoint" if Path(folder).is_dir() else "there is no such folder"
    lacks = "it is a file" if Path(folder).is_file() else lacks
    raise UserError(f"{str(folder)!r} is no run: {lacks}; give the sft.output_dir of one.")


def publish(unfinished: Path, final: Path) -> None:
    """Gives a written checkpoint its name, once all of it lies on the disk.

    Args:
        unfinished: The folder that was written; it is gone afterwards.
        final: Its name from now on. What stands there is replaced.
    """
    files = sorted(path for path in unfinished.rglob("*") if path.is_file() and path.name != CHECKPOINT_FILES)
    contents = {"files": {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files}}
    (unfinished / CHECKPOINT_FILES).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    for path in (*unfinished.rglob("*"), unfinished):
        _flush(path)
    remove(final)
    os.rename(unfinished, final)
    _flush(final.parent)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, if it is there; it loses its name first, so that half of it is never taken for a whole."""
    doomed = checkpoint.with_name(f"{UNFINISHED}removed-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if checkpoint.exists():
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def rotate(folder: str | Path, limit: int | None, keep: Collection[Path]) -> None:
    """Deletes the oldest checkpoints until `limit` whole ones are left (`sft.save_total_limit`).

    Args:
        folder: The run's `output_dir`.
        limit: How many to leave; None or 0 for all.
        keep: Never deleted: the one just written, and the best. They count.
    """
    if not limit:
        return
    spared = {path.resolve() for path in keep}
    found = [path for path in checkpoints(folder) if flaw_of(path) is None]
    removable = [path for path in found if path.resolve() not in spared]
    for path in removable[: max(len(found) - max(limit, 1), 0)]:
        remove(path)


def sweep(folder: str | Path) -> None:
    """Deletes what killed saves left behind."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle_resume(
    args: TrainingArguments, *, resume: bool = False, say: Callable[[str], None] = lambda line: None
) -> None:
    """Refuses to write over an earlier run, and puts into `args.resume_from_checkpoint` where to go on, or None.

    Args:
        args: For `output_dir` and `resume_from_checkpoint`: a path, or true for the newest checkpoint.
        resume: `--resume`: go on from the newest checkpoint if there is one, else start.
        say: Told of checkpoints that are passed over, and where the run goes on.

    Raises:
        UserError: The folder cannot be written, is not empty and nothing is resumed, or there is nothing to resume.
    """
    folder = Path(args.output_dir)
    if os.path.exists(folder) and not folder.is_dir():  # pathlib's raises where a folder above may not be read
        raise UserError(f"sft.output_dir {str(folder)!r} is a file; choose another.")
    _check_writable(folder)
    wanted = args.resume_from_checkpoint
    latest = wanted in (True, "true", "True")
    found = newest(folder, say) if latest or resume else None
    if found is not None:
        args.resume_from_checkpoint = str(found)
        say(f"Going on from {found}.")
    elif latest and not resume:
        raise UserError(
            f"sft.resume_from_checkpoint is set, but {str(folder)!r} has no checkpoint; leave it out to start, or use "
            f"--resume, which does both."
        )
    elif wanted and not latest:
        if not Path(wanted).is_dir():
            raise UserError(f"sft.resume_from_checkpoint: there is no folder {str(wanted)!r}.")
        if flaw := flaw_of(Path(wanted)):
            raise UserError(f"sft.resume_from_checkpoint: {str(wanted)!r} is no whole checkpoint: {flaw}.")
    else:
        args.resume_from_checkpoint = None
        _check_empty(folder, resume)


def _check_writable(folder: Path) -> None:
    """Better now than at the first save, hours later."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    reason = "is read-only for this user"
    if os.access(existing, os.W_OK | os.X_OK):
        try:
            tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=existing).cleanup()
            return
        except OSError as error:
            reason = f"takes no folder ({error.strerror})"
    raise UserError(
        f"sft.output_dir {str(folder)!r} cannot be written: {str(existing)!r} {reason}; choose another, or change its "
        f"permissions."
    )


def _check_empty(folder: Path, resume: bool) -> None:
    """A folder with nothing but what a run leaves that ended before its first save may be used."""
    if not folder.is_dir():
        return
    finished = (folder / MANIFEST).is_file()
    if resume and finished:
        raise UserError(
            f"sft.output_dir {str(folder)!r} holds a finished run without checkpoints, so there is nothing to go on "
            f"from: its bundle can be used as it is; choose another folder, or remove it to train again."
        )
    harmless = ("runs", RUN_LOCK, SAMPLES, HISTORY, RUN_FACTS, RUN_PAGE)
    full = any(path.name not in harmless and not path.name.startswith(UNFINISHED) for path in folder.iterdir())
    if full and not resume:
        raise UserError(
            f"sft.output_dir {str(folder)!r} is not empty; choose another, remove it, or go on with the run in it: "
            f"--resume."
        )


# What a run wrote down of itself, as whoever shows it reads it: the folder may be a stranger's. What is none of ours is
# left out: the half of a line that a kill left, another type, a number beyond all counts.
DIGITS = 15  # of a whole number that is counted with; a longer one is a float, and no step


def read_value(path: Path) -> Any:
    """What a JSON file holds; None where it is not there, or is no JSON."""
    try:
        return _parsed(read_bytes(path))
    except (OSError, IrregularError):
        return None


def read_object(path: Path) -> Json:
    """The same, where it is an object; else an empty one."""
    found = read_value(path)
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[Json]:
    """Lines of a history, of samples or of strange steps, each with its `step`, in order."""
    try:
        lines = read_bytes(path).split(b"\n")
    except (OSError, IrregularError):
        return []
    return with_steps(map(_parsed, lines))


def with_steps(values: Any) -> list[Json]:
    """The objects among some values that have a `step`."""
    return [each for each in values if isinstance(each, dict) and is_step(each.get("step"))]


def is_step(value: object) -> bool:
    """Whether a value can be a number of steps."""
    return isinstance(value, int) and value >= 0


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(
            bounded(text), parse_int=_whole, parse_constant=lambda name: {"NaN": math.nan}.get(name, math.inf)
        )
    except (ValueError, RecursionError):
        return None


def _whole(text: str) -> int | float:
    return int(text) if len(text) <= DIGITS else float(text)
