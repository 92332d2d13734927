"""`vlm-sft data`: sources converted, counted and filtered, before any training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.console import for_a_program, make_console, say, tell
from ..base.errors import UserError
from ..train import Json
from .arguments import ImageFolders, Options, settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..prepare.filtering import Score

data_app = typer.Typer(help="Look at data and prepare it: convert, stats, filter, caption.", no_args_is_help=True)

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="File, folder or Hub id with --format; or a recipe: its data.train.", show_default=False
    ),
]
Kind = Annotated[str | None, typer.Option("--format", help="What SRC holds, as a recipe's `format`.")]
Images = Annotated[str | None, typer.Option(help="Folder that relative image paths start from.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", metavar="OURS=THEIRS", help="Name of a column; may be repeated.")
]
Rejected = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of wrong rows that may be left out.")]


@data_app.command()
def convert(
    src: Src,
    out: Annotated[str, typer.Argument(metavar="OUT", help="File or folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="messages (.jsonl), llava (.json) or webdataset (a folder of .tar).")],
    kind: Kind = None,
    images: Images = None,
    image_folder: ImageFolders = None,
    column: Columns = None,
    copy_images: Annotated[bool, typer.Option("--copy-images", help="Take image files along, beside OUT.")] = False,
    max_rejected: Rejected = 0.0,
    as_json: Json = False,
) -> None:
    """Write the rows of a source, or of all training sources of a recipe, in another format."""
    from ..base.progress import RowProgress
    from ..prepare.convert import convert_rows
    from ..prepare.rows_of import RowsOf

    rows = RowsOf(src, kind, images, column, max_rejected, image_folder)
    with RowProgress(make_console(), src) as progress:
        written = convert_rows(progress.through(rows, "converted"), to, out, copy_images=copy_images)
    frames = f" {rows.frames:,} frames of videos were written as pictures." if rows.frames else ""
    with for_a_program(as_json) as give:
        tell(f"{out}: {written:,} rows.{frames}")
        give({"out": out, "rows": written, "frames": rows.frames})


@data_app.command()
def stats(
    src: Src,
    kind: Kind = None,
    images: Images = None,
    image_folder: ImageFolders = None,
    column: Columns = None,
    as_json: Json = False,
    look_images: Annotated[
        int | None,
        typer.Option(min=0, help="Images compared by look; 0: none. Default: the recipe's data.look_images, or 20000."),
    ] = None,
    max_rejected: Rejected = 1.0,
) -> None:
    """Count rows, images, answers, languages, repetitions, and images that look like others or like held-out ones."""
    from ..base.progress import RowProgress
    from ..data.look_alikes import find_look_alikes
    from ..prepare.rows_of import RowsOf
    from ..prepare.stats import DataStats, stats_table

    found, console = DataStats(), make_console()
    rows = RowsOf(src, kind, images, column, max_rejected, image_folder)
    with RowProgress(console, src) as progress:
        for row in progress.through(rows, "counted"):
            found.add(row)
    if not found.rows:
        raise UserError(f"No row of {src} can be counted, for the reasons above: correct the rows, or --format.")
    most = rows.look_images if look_images is None else look_images
    if most != 0:
        with RowProgress(console, src) as progress:
            train, held_out = rows.quietly(), rows.quietly(held_out=True)
            found.look_alikes = find_look_alikes(train, held_out, most=most, tick=progress.tell)
        for sentence in found.look_alikes.left_out():
            say(console, sentence)
    with for_a_program(as_json) as give:
        give(found.as_dict())
    if not as_json:
        make_console(stderr=False).print(stats_table(found.as_dict()))


@data_app.command("filter")
def filter_(
    src: Src,
    out: Annotated[str, typer.Argument(metavar="OUT", help="File of the rows that are kept.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of a CLIP, SigLIP or BLIP-ITM model.", show_default=False)
    ],
    threshold: Annotated[float | None, typer.Option(help="Smallest score that is kept.")] = None,
    keep: Annotated[float | None, typer.Option(min=0.001, max=1.0, help="Or the share that is kept.")] = None,
    text: Annotated[str, typer.Option(help="What is compared with the image: answers or all.")] = "answers",
    scores: Annotated[str | None, typer.Option(help="File of scores; default OUT.scores.jsonl.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    kind: Kind = None,
    images: Images = None,
    image_folder: ImageFolders = None,
    column: Columns = None,
    max_rejected: Rejected = 0.0,
    as_json: Json = False,
) -> None:
    """Keep the rows whose text fits the image, as a model scores them; a rerun goes on where it was.

    Without --threshold and --keep the scores and their histogram are written, to choose by.
    """
    from ..base.console import quiet_libraries

    quiet_libraries()
    from ..base.progress import RowProgress
    from ..prepare.convert import convert_rows
    from ..prepare.filtering import TEXTS, draw_histogram, kept_rows, score_rows, threshold_of_share
    from ..prepare.rows_of import RowsOf
    from ..prepare.scorer import Scorer

    if text not in TEXTS:
        raise UserError(f"--text must be one of {', '.join(TEXTS)}, not {text}.")
    if threshold is not None and keep is not None:
        raise UserError("--threshold and --keep say the same in two ways: give one of them.")
    to = "llava" if Path(out).suffix == ".json" else "messages"
    if (threshold, keep) != (None, None) and Path(out).exists():
        raise UserError(f"{out} exists already: give another OUT or remove it.")
    rows = RowsOf(src, kind, images, column, max_rejected, image_folder)
    next(iter(rows), None)  # a source that cannot be read is said before a model is loaded
    file = scores or f"{out}.scores.jsonl"
    console = make_console()
    with RowProgress(console, src) as progress:
        about = {"model": model, "sources": rows.describe()}
        scorer, tick = Scorer(model), partial(progress.tell, "scored", of=None)
        found = score_rows(rows, scorer, file, about, text=text, batch_size=batch_size, tick=tick)
    limit = threshold_of_share(found, keep) if keep is not None else threshold
    histogram = draw_histogram(found, f"{out}.histogram.png", limit, title=f"{src}: {model}")
    _say_scores(found, console)
    done = {"scores": file, "histogram": str(histogram), "rows": len(found)}
    with for_a_program(as_json) as give:
        tell(f"Scores: {file}\nHistogram: {histogram}")
        if limit is None:
            tell("Nothing was filtered: choose by the histogram, then run again with --threshold or --keep.")
            give(done)
            return
        with RowProgress(console, src) as progress:
            kept = convert_rows(progress.through(kept_rows(rows, found, limit), "written"), to, out)
        tell(f"{out}: {kept:,} of {len(found):,} rows have a score of {limit:.4g} or more, or no image.")
        give({**done, "out": out, "kept": kept, "threshold": limit})


@data_app.command()
def caption(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of pictures, or rows that have an image.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="File of rows to write, .jsonl.", show_default=False)],
    captioner: Annotated[
        str, typer.Option(help="Bundle, or folder or Hub id of a BLIP, a BLIP-2 or another VLM.", show_default=False)
    ],
    matcher: Annotated[str | None, typer.Option(help="Scores captions: what `filter` takes as --model.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Smallest score that is kept.")] = None,
    keep: Annotated[float | None, typer.Option(min=0.001, max=1.0, help="Or the share that is kept.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Ask in en or zh; may be repeated.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Ask this instead; may be repeated.")] = None,
    captions: Annotated[int, typer.Option(min=1, max=100, help="Captions for each prompt, drawn if several.")] = 1,
    settings: Options = None,
    seed: Annotated[int, typer.Option(help="Of captions that are drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    kind: Annotated[
        str | None, typer.Option("--format", help="Of rows that have captions, which are then scored along.")
    ] = None,
    images: Images = None,
    image_folder: ImageFolders = None,
    column: Columns = None,
    max_rejected: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of pictures to leave out.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Write captions of pictures and keep those that fit; a rerun goes on. For several processes, use: accelerate
    launch -m vlm_sft data caption."""
    from ..base.console import quiet_libraries

    quiet_libraries()
    from ..captions.capfilt import Wish
    from ..captions.command import caption as run
    from ..captions.wanted import WantedPictures

    options = settings_of(settings)
    wish = Wish(captioner, matcher, language or (), prompt or (), captions, options, seed, batch_size)
    found = WantedPictures(src, kind, images, column, image_folder)
    with for_a_program(as_json) as give:
        give(run(found, out, wish, make_console(), threshold, keep, max_rejected))


def _say_scores(scores: list[Score], console: Console) -> None:
    """One line on what was scored; rows whose image cannot be read are named."""
    errors = [score.error for score in scores if score.error is not None]
    plain = sum(score.score is None and score.error is None for score in scores)
    if plain:
        console.print(f"{plain:,} rows have no image: they are kept without a score.", highlight=False)
    if errors:
        console.print(
            f"{len(errors):,} rows are left out because an image cannot be read; the first: {errors[0]}",
            highlight=False, markup=False,
        )  # fmt: skip
