"""The commands that come before everything else: `init`, `fit` and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.console import for_a_program, quiet_libraries, tell
from ..spoken.language import in_words
from ..train import Json, Overrides, RecipeName, Trust

start_app = typer.Typer()


@start_app.command(short_help="From a folder of pictures to a recipe.")
def init(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of pictures and texts, a data file, or a data set's Hub id.",
            show_default=False,
        ),
    ],
    learn: Annotated[str | None, typer.Option(help="caption, classify, answer or talk; as the data allow.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model to start from.")] = None,
    language: Annotated[str | None, typer.Option(help="en or zh: of the questions and the recipe's comments.")] = None,
    hours: Annotated[float | None, typer.Option(help="How long training may take.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures that a data file names.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The recipe to write; default FOLDER's name with .yaml, here.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; take what is proposed.")] = False,
    seed: Annotated[int, typer.Option(help="Draws which rows are held out.")] = 0,
    as_json: Json = False,
) -> None:
    """Look at a folder and at this machine, ask four questions, and write a recipe with its rows shared out into
    training, validation and test. Your files stay as they are."""
    quiet_libraries()
    from ..start.answers import Answers
    from ..start.init import init as run

    answers = Answers(learn, model, language, hours)
    done = run(folder, answers, output=output, images=images, ask=not (yes or as_json), seed=seed)
    if as_json:
        with for_a_program(as_json) as give:
            give(done)
        return
    tell(in_words(
        f"\n{done['recipe']}: {done['train']:,} rows to train on, {done['validation']:,} to validate, "
        f"{done['test']:,} to test, in {done['rows']}.\nNext:",
        f"\n{done['recipe']}：训练 {done['train']:,} 行，验证 {done['validation']:,} 行，测试 {done['test']:,} 行，"
        f"在 {done['rows']} 里。\n接下来：",
    ))  # fmt: skip
    for command in done["commands"]:
        tell(f"  {command}")


@start_app.command(short_help="What a bug report needs of this machine, and what a recipe misses.")
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Say what a run of it would miss.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ask whether the Hub answers.")] = False,
    as_json: Json = False,
) -> None:
    """Print versions, machine and settings to paste into a bug report: no token, no name, no path. With a recipe, also
    what a run of it would miss; exit code 1 where it could not begin."""
    from ..machine.doctor import examine

    report = examine(recipe, overrides, ask_hub=hub)
    if as_json:
        with for_a_program(as_json) as give:
            give(report.as_dict())
    else:
        for line in report.lines():
            tell(line)
        if recipe is not None:
            tell(report.summary())
    if any(finding.stops for finding in report.findings):
        raise SystemExit(1)


@start_app.command(short_help="Which settings of a recipe fit a GPU, the fastest first.")
def fit(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory or name: 24GB, 'RTX 4090', 'A100 40GB'. Default: the GPU here.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of them train together.")] = 1,
    write: Annotated[bool, typer.Option("--write", help="Set the fastest in the recipe's file.")] = False,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Say which settings of a recipe fit a GPU: batch and accumulation, whose product stays; checkpointing; FSDP2; and
    where nothing else fits 4 bits, smaller pictures, shorter rows. No weight is read."""
    from ..machine.fit_command import run
    from ..recipe.opening import open_recipe

    run(open_recipe(recipe, overrides, trust_remote_code), gpu, count, write=write, as_json=as_json)
