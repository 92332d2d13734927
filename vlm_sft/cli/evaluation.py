"""The command that measures a bundle: on held-out data of a recipe, or on benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.console import quiet_libraries
from ..base.errors import UserError
from ..forgetting.texts import Wish
from ..train import Trust
from .arguments import Bundle, Options, settings_of

evaluation_app = typer.Typer()

Names = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME]", help="Benchmarks that ship, or files of your own; see docs/evaluation.md."),
]
Folder = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the benchmarks' data. Default: the Hub.")]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="Default: eval.json, or evaluation/, in the bundle.")
]
Against = Annotated[
    str | None, typer.Option(metavar="OTHER", help="Bundle, or its answers, that the page compares with.")
]
Forgetting = Annotated[
    bool | None,
    typer.Option(show_default=False, help="What texts without pictures lost. Default: if no base must be read."),
]
Texts = Annotated[str | None, typer.Option(metavar="FILE", help="Such texts of your own, as JSON lines.")]
Pictures = Annotated[
    str | None, typer.Option(metavar="DIR", help="For a vision tower that was trained: a folder for each label.")
]


@evaluation_app.command(short_help="Measure a bundle on held-out data or benchmarks.")
def evaluate(
    bundle: Bundle,
    benchmark: Names = None,
    benchmark_data: Folder = None,
    split: Annotated[str, typer.Option(help="Without --benchmark: test or eval of the recipe's data.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    output: Output = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each source.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the data from this recipe, not the bundle's own.")] = None,
    likelihood: Annotated[bool, typer.Option("--likelihood", help="Choose the option that is likeliest.")] = False,
    blank: Annotated[bool, typer.Option(help="Ask with blanked images too.")] = True,
    confidence: Annotated[bool, typer.Option("--confidence", help="How sure it was also of options compared.")] = False,
    contamination: Annotated[bool, typer.Option(help="Look for the images in the training sources.")] = True,
    against: Against = None,
    forgetting: Forgetting = None,
    forgetting_texts: Texts = None,
    forgetting_pictures: Pictures = None,
    options: Options = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a bundle on held-out data, or on benchmarks; for several processes of these, use: accelerate launch -m
    vlm_sft.evaluate."""
    wish = Wish(forgetting, forgetting_texts, forgetting_pictures)
    if benchmark is None:
        settings = {
            "--benchmark-data": benchmark_data, "--likelihood": likelihood, "--confidence": confidence,
            "--set": options, "--no-blank": not blank, "--no-contamination": not contamination,
        }  # fmt: skip
        if alone := next((name for name, given in settings.items() if given), None):
            raise UserError(f"{alone} belongs to --benchmark; name benchmarks, or leave it out.")
        from ..evaluation.evaluate import run

        run(bundle, split=split, batch_size=batch_size, output=output, max_rows=max_rows, recipe=recipe,
            trust_remote_code=trust_remote_code, against=against, forgetting=wish)  # fmt: skip
        return
    if recipe is not None:
        raise UserError("--recipe belongs to the recipe's own data; leave it or --benchmark out.")
    quiet_libraries()
    from ..evaluation.asking import How
    from ..evaluation.benchmark import run as run_benchmarks

    run_benchmarks(
        bundle,
        [name for name in map(str.strip, benchmark.split(",")) if name],
        data=benchmark_data,
        output=output,
        how=How(batch_size=batch_size, likelihood=likelihood, blank=blank, confidence=confidence),
        max_rows=max_rows,
        compare=contamination,
        options=settings_of(options),
        trust_remote_code=trust_remote_code,
        against=against,
        forgetting=wish,
    )
