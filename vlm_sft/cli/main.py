"""The console command `vlm-sft`. Parses and delegates; torch and transformers are imported inside the commands."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ..base.console import for_a_program, make_console, tell
from ..base.errors import exit_on_user_error
from ..base.names import PREFLIGHT_PAGE
from ..base.processes import let_threads_sleep
from ..train import Json, Overrides, RecipeName, Trust, run
from .bundles import bundles_app
from .cache import cache_app
from .data import data_app
from .encoders import encoders_app
from .evaluation import evaluation_app
from .recipes import recipes_app
from .serving import serving_app
from .start import start_app
from .watch import watch_app

app = typer.Typer(
    help="Instruction tuning for vision-language models: train, chat, generate, evaluate, export.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(start_app)
app.command("train", short_help="Train one stage, as a recipe describes it.")(run)
app.add_typer(bundles_app)
app.add_typer(evaluation_app)
app.add_typer(encoders_app)
app.add_typer(serving_app)
app.add_typer(watch_app)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from .. import __version__

        tell(__version__)
        raise typer.Exit()


@app.command(short_help="Look at data and model before the GPU hour; write a page.")
def preflight(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The page to write.")] = PREFLIGHT_PAGE,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Look at rows and sizes alone; read no weights.")
    ] = False,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Estimate time and memory for the processes of this config file of accelerate.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Look at the data, take a real step, and write a page with what will be trained on; exit code 1 if it fails."""
    from ..preflight.preflight import run_preflight

    run_preflight(
        recipe,
        overrides or [],
        output=output,
        with_model=not no_model,
        accelerate_config=accelerate_config,
        as_json=as_json,
        trust_remote_code=trust_remote_code,
    )


@app.command("apply-delta", short_help="Make a language model from a published delta.")
def apply_delta(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the delta was made from.", show_default=False)],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What is published.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    tables: Annotated[
        str | None,
        typer.Option(
            help="Embeddings and head of the delta: whole (Ziya) or sum (Vicuna). Unset: compared with the base."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a language model together that is published as a delta (Ziya-LLaMA, Vicuna), shard by shard."""
    from ..base.progress import RowProgress
    from ..pieces.delta import apply_delta as run

    with for_a_program(as_json) as give, RowProgress(make_console(), out) as progress:
        done = run(base, delta, out, tables, say=tell, progress=partial(progress.tell, "made", what="tensors"))
        give({"out": out, **done})
    if as_json:
        return
    how = "the delta's own, not added" if done["tables"] == "whole" else "added, as everything else"
    rows = "".join(f"; {name} has {more} rows more than the base" for name, more in done["rows_added"].items())
    tell(
        f"{out}: {done['tensors']} tensors, {done['summed']} of them base + delta; embeddings and head: {how}{rows}; "
        f"{done['left_out']} computed tables left out; {done['bytes'] / 1e9:.2f} GB in {done['shards']} shards."
    )


def main() -> None:
    """Entry point of the console command: a `UserError` becomes one line on stderr and exit code 2."""
    let_threads_sleep()
    with exit_on_user_error():
        app()


if __name__ == "__main__":
    main()
