"""`vlm-sft data`: sources converted, counted and filtered, before any training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.console import make_console
from ..base.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ..prepare.filtering import Score
    from ..recipe.sections import Source

data_app = typer.Typer(help="Look at data and prepare it: convert, stats, filter.", no_args_is_help=True)

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
    column: Columns = None,
    copy_images: Annotated[bool, typer.Option("--copy-images", help="Take image files along, beside OUT.")] = False,
    max_rejected: Rejected = 0.0,
) -> None:
    """Write the rows of a source, or of all training sources of a recipe, in another format."""
    from ..prepare.convert import convert_rows

    rows = _Rows(src, kind, images, column, max_rejected)
    written = convert_rows(rows, to, out, copy_images=copy_images)
    typer.echo(f"{out}: {written:,} rows.")


@data_app.command()
def stats(
    src: Src,
    kind: Kind = None,
    images: Images = None,
    column: Columns = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    max_rejected: Rejected = 1.0,
) -> None:
    """Count rows, images, answers, languages and repetitions."""
    from ..prepare.stats import DataStats, stats_table

    found = DataStats()
    for row in _Rows(src, kind, images, column, max_rejected):
        found.add(row)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
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
    column: Columns = None,
    max_rejected: Rejected = 0.0,
) -> None:
    """Keep the rows whose text fits the image, as a model scores them; a rerun goes on where it was.

    Without --threshold and --keep the scores and their histogram are written, to choose by.
    """
    from ..base.quiet import quiet_libraries

    quiet_libraries()
    from ..prepare.convert import convert_rows
    from ..prepare.filtering import TEXTS, Scorer, draw_histogram, kept_rows, score_rows, threshold_of_share

    if text not in TEXTS:
        raise UserError(f"--text must be one of {', '.join(TEXTS)}, not {text}.")
    if threshold is not None and keep is not None:
        raise UserError("--threshold and --keep say the same in two ways: give one of them.")
    to = "llava" if Path(out).suffix == ".json" else "messages"
    if (threshold, keep) != (None, None) and Path(out).exists():
        raise UserError(f"{out} exists already: give another OUT or remove it.")
    rows = _Rows(src, kind, images, column, max_rejected)
    next(iter(rows), None)  # a source that cannot be read is said before a model is loaded
    file = scores or f"{out}.scores.jsonl"
    console = make_console()
    with console.status("scoring") as status:

        def tick(done: int) -> None:
            status.update(f"scored {done:,} rows")

        about = {"model": model, "sources": rows.describe()}
        found = score_rows(rows, Scorer(model), file, about, text=text, batch_size=batch_size, tick=tick)
    limit = threshold_of_share(found, keep) if keep is not None else threshold
    histogram = draw_histogram(found, f"{out}.histogram.png", limit, title=f"{src}: {model}")
    _say_scores(found, console)
    typer.echo(f"Scores: {file}\nHistogram: {histogram}")
    if limit is None:
        typer.echo("Nothing was filtered: choose by the histogram, then run again with --threshold or --keep.")
        return
    kept = convert_rows(kept_rows(rows, found, limit), to, out)
    typer.echo(f"{out}: {kept:,} of {len(found):,} rows have a score of {limit:.4g} or more, or no image.")


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


class _Rows:
    """The rows of SRC, read anew each time that they are iterated.

    Raises:
        UserError: While iterating; also at the end, when more rows are wrong than allowed.
    """

    def __init__(
        self, src: str, kind: str | None, images: str | None, columns: list[str] | None, max_rejected: float
    ) -> None:
        self.sources = _sources(src, kind, images, columns)
        self.max_rejected = max_rejected

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from ..data.ledger import Ledger
        from ..data.source import name_of, source_rows

        ledger = Ledger(self.max_rejected)
        for source in self.sources:
            name = name_of(source)
            counted = ledger.source(name)
            for row in source_rows(source, reject=ledger.rejecter(name)):
                counted.read += 1
                counted.used += 1
                yield row
        console = make_console()
        ledger.check(console)
        if any(source.lost for source in ledger.sources.values()):
            from ..data.ledger import ledger_table

            console.print(ledger_table({"data": ledger}))

    def describe(self) -> list[dict[str, Any]]:
        """What the rows depend on, for a file that is made of them."""
        return [source.model_dump(mode="json") for source in self.sources]


def _sources(src: str, kind: str | None, images: str | None, columns: list[str] | None) -> list[Source]:
    """The training sources of a recipe, or one that the options describe.

    Raises:
        UserError: The format is missing or not known, or a column is no `OURS=THEIRS`.
    """
    from pydantic import ValidationError

    from ..base.assets import list_recipes
    from ..recipe.schema import load_recipe
    from ..recipe.sections import Source

    if src.endswith((".yaml", ".yml")) or (kind is None and src in list_recipes()):
        if kind or images or columns:
            raise UserError(f"{src} is a recipe, which says itself what its sources hold: leave out --format.")
        return load_recipe(src).data.train
    if kind is None:
        raise UserError(f"What does {src} hold? Give --format, as a recipe does (messages, llava, caption, …).")
    pairs = [column.partition("=") for column in columns or []]
    if wrong := next((ours for ours, equals, theirs in pairs if not (ours and equals and theirs)), None):
        raise UserError(f"--column {wrong} must be OURS=THEIRS, like --column caption=text.")
    try:
        return [Source(path=src, format=kind, images=images, columns={ours: theirs for ours, _, theirs in pairs})]  # type: ignore[arg-type]
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}.") from None
