"""`vlm-sft data caption`: pictures → captions → the rows that fit."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from ..base.console import tell
from ..base.errors import UserError
from ..base.names import Json
from ..base.processes import find_processes, leave_process_group, on_first_process
from ..data.ledger import ledger_table
from ..prepare.convert import images_folder
from ..prepare.filtering import draw_histogram, threshold_of_share
from ..prepare.scorer import decides
from .capfilt import Wish, make_captions
from .captioner import PROMPTS
from .drawn import check_count
from .kept import Counts, Finished, manifest_of, write_manifest, write_rows
from .wanted import WantedPictures


def caption(
    found: WantedPictures,
    out: str,
    wish: Wish,
    console: Console,
    threshold: float | None = None,
    keep: float | None = None,
    max_rejected: float = 0.0,
) -> Json:
    """Makes captions, scores them and writes those that are kept; a rerun goes on.

    Args:
        found: The pictures.
        out: File of rows to write, a `.jsonl`.
        wish: How captions are made.
        console: Where to say how far it is.
        threshold: Smallest score that is kept; None, and `keep` too: where the matcher itself takes a pair for a right
            one, if it does.
        keep: Or the share of captions that is kept.
        max_rejected: Largest share of pictures that may be left out.

    Returns:
        `out`, `histogram` and `threshold` (None where there is none), and what the manifest says of `pictures` and
        `captions`, where rows were written.

    Raises:
        UserError: Options, pictures, models or files are wrong.
    """
    find_processes()
    path = _checked(out, wish, threshold, keep)
    parts = make_captions(found, wish, path.with_name(f"{path.name}.parts"), console)
    done = on_first_process(lambda: _finish(Finished(found, parts, max_rejected), path, wish, console, threshold, keep))
    leave_process_group()
    return done


def _checked(out: str, wish: Wish, threshold: float | None, keep: float | None) -> Path:
    path = Path(os.path.expanduser(out))
    if path.suffix != ".jsonl":
        raise UserError(f"OUT is {out}, but rows of captions are written as .jsonl: give a name that ends with it.")
    for there in (path, images_folder(path)):
        if there.exists():
            raise UserError(f"{there} exists already: give another OUT or remove it.")
    if wish.matcher is None and (threshold, keep) != (None, None):
        raise UserError("--threshold and --keep choose by a matcher's scores: name one (--matcher), or leave them out.")
    if threshold is not None and keep is not None:
        raise UserError("--threshold and --keep say the same in two ways: give one of them.")
    if wish.prompts and wish.languages:
        raise UserError("--prompt says what is asked, and in which language: leave out --language.")
    if blank := [prompt for prompt in wish.prompts if not prompt.strip()]:
        raise UserError(f"--prompt {blank[0]!r} is empty: write one, or leave it out.")
    if strange := [language for language in wish.languages if language not in PROMPTS]:
        raise UserError(f"--language must be one of {', '.join(PROMPTS)}, not {strange[0]}; for others, --prompt asks.")
    if len({*wish.prompts}) < len(wish.prompts) or len({*wish.languages}) < len(wish.languages):
        raise UserError("The same --prompt or --language is given twice: for several captions of one give --captions.")
    check_count(wish.options, wish.count)
    return path


def _finish(
    finished: Finished, path: Path, wish: Wish, console: Console, threshold: float | None, keep: float | None
) -> Json:
    if not finished.ledger.source(finished.name).read:
        raise UserError(f"{finished.found.src} holds no pictures: name a folder of pictures, or rows with an `image`.")
    finished.ledger.check(console, "Pictures", limit="--max-rejected")
    if finished.ledger.source(finished.name).lost:
        console.print(ledger_table({"pictures": finished.ledger}))
    scores, histogram = finished.scores(), None
    if wish.matcher is not None and scores:
        threshold = decides(wish.matcher, "--matcher") if (threshold, keep) == (None, None) else threshold
        threshold = threshold_of_share(scores, keep) if keep is not None else threshold
        title = f"{wish.captioner}: {wish.matcher}"
        histogram = str(draw_histogram(scores, f"{path}.histogram.png", threshold, title=title))
        tell(f"Histogram: {histogram}")
        if threshold is None:
            tell("Nothing was filtered: choose by the histogram, then run again with --threshold or --keep.")
            return {"out": None, "histogram": histogram, "threshold": None}
    counts = write_rows(finished, path, wish, threshold)
    said = write_manifest(path, wish, finished, counts, threshold)
    tell(_in_words(path, counts, threshold))
    tell(f"Manifest: {manifest_of(path)}\nA recipe reads them as: {_as_source(path, counts)}")
    done = {"out": str(path), "histogram": histogram, "threshold": threshold}
    return {**done, "pictures": said["pictures"], "captions": said["captions"]}


def _in_words(path: Path, counts: Counts, threshold: float | None) -> str:
    dropped = ", ".join(f"{number:,} {why}" for why, number in counts.dropped.most_common())
    limit = "" if threshold is None else f", threshold {threshold:.4g}"
    return (
        f"{path}: {counts.kept:,} of {counts.made + counts.given:,} captions of {counts.pictures:,} pictures are kept"
        f"{limit}{'; dropped: ' if dropped else ''}{dropped}."
    )


def _as_source(path: Path, counts: Counts) -> str:
    """The source of a recipe that reads OUT."""
    folders = f", image_folders: [{os.path.commonpath(counts.folders)}]" if counts.folders else ""
    prompts = ", prompts: {en: [Describe this picture.], zh: [描述这张图片。]}" if counts.languages["zh"] else ""
    return f"{{path: {path}, format: caption{folders}{prompts}}}"
