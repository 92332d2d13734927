"""What lies in a cache's folder: told, checked entry by entry, and tidied."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from ..base.names import Json
from ..base.whole_files import UNFINISHED
from ..base.words import counted
from .records import LOCK, is_written
from .store import ABOUT, FEATURES, GB, INDEX, Store, size_of

AT_ONCE = 64  # entries that are written anew together
DAY = 86_400


@dataclass(frozen=True)
class Kept:
    """One store of a folder.

    Attributes:
        store: Its features.
        bytes: What it takes.
        used: When a run opened it last, in seconds since 1970.
    """

    store: Store
    bytes: int
    used: float

    @property
    def about(self) -> Json:
        """What it was made from, as far as it says it."""
        about = self.store.about
        return about if isinstance(about, dict) else {}


def stores_in(root: str | Path) -> list[Kept]:
    """The stores of a cache's folder, the last used first.

    Raises:
        UserError: There is no such folder, or what lies there is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"cache: the folder {str(root)!r} does not exist: nothing has been kept there yet.")
    folders = [path.parent for path in root.glob(f"*/{ABOUT}")]
    found = [Kept(Store(folder), size_of(folder), (folder / ABOUT).stat().st_mtime) for folder in folders]
    return sorted(found, key=lambda each: -each.used)


def verify(store: Store, tick: Callable[[int], None] = lambda more: None) -> int:
    """Reads every entry and compares its checksum; returns how many are damaged. A run makes those again.

    Args:
        store: What is read.
        tick: Told of each entry.
    """
    damaged = 0
    for key in store.known:
        damaged += store.get(key) is None
        tick(1)
    return damaged


def prune(root: str | Path, days: float | None = None, max_gb: float | None = None) -> Iterator[str]:
    """Removes what is of no use, and yields a sentence for each thing that was done.

    Damaged and double entries and what killed processes left half go always; whole stores that no run opened for so
    many days, and then the longest unused until the folder is no larger than `max_gb`. What a run is writing stays.

    Args:
        root: The cache's folder.
        days: See above; None for no such limit.
        max_gb: See above; None for no such limit.

    Raises:
        UserError: As `stores_in`, or a store is a link to somewhere else.
    """
    kept = stores_in(root)
    for each in kept:
        if each.store.folder.is_symlink():
            raise UserError(
                f"cache: {str(each.store.folder)!r} is a link, and what lies behind it is not removed: remove the link."
            )
    for each in [each for each in kept if days is not None and time.time() - each.used > days * DAY]:
        if sentence := _remove(each, f"no run opened it for {days:g} days"):
            kept.remove(each)
            yield sentence
    for each in kept:
        if sentence := _write_anew(each.store):
            yield sentence
    for each in reversed(kept):  # the longest unused first
        if max_gb is None or size_of(Path(root)) <= max_gb * GB:
            return
        if sentence := _remove(each, f"the folder was larger than {max_gb:g} GB"):
            yield sentence


def _writers(store: Store) -> list[str]:
    endings = (FEATURES, INDEX, LOCK)
    return sorted({path.stem for path in store.folder.iterdir() if path.suffix in endings})


def _remove(kept: Kept, why: str) -> str | None:
    folder = kept.store.folder
    if any(is_written(folder, writer) for writer in _writers(kept.store)):
        return None
    shutil.rmtree(folder)
    return f"{folder}: removed with {counted(len(kept.store), 'picture')} ({kept.bytes / GB:.3g} GB): {why}."


def _write_anew(store: Store) -> str | None:
    """Writes what is whole once more into one shard, where something is not, and removes the others."""
    folder, writers = store.folder, _writers(store)
    if any(is_written(folder, writer) for writer in writers):
        return f"{folder}: left as it is, because a run is writing there."
    there = sum(path.stat().st_size for path in folder.glob(f"*{FEATURES}"))
    damaged = verify(store)
    if not damaged and there == len(store) * store.row_bytes and not list(folder.glob(f"{UNFINISHED}*")):
        return None
    keys, fresh = store.known, Store(folder)
    fresh.forget()
    for start in range(0, len(keys), AT_ONCE):
        for key in keys[start : start + AT_ONCE]:
            features = store.get(key)
            if features is not None:
                fresh.add([key], features[None])
    if fresh.full:
        raise UserError(fresh.full)
    fresh.close()
    for writer in writers:
        for ending in (INDEX, FEATURES, LOCK):  # the index first: it must never speak of rows that are gone
            with suppress(OSError):
                (folder / f"{writer}{ending}").unlink()
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    freed = there - len(fresh) * store.row_bytes
    return (
        f"{folder}: {damaged:,} damaged and removed, {max(0, freed) / GB:.3g} GB freed, "
        f"{counted(len(fresh), 'picture')} left."
    )
