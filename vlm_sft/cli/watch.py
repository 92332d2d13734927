"""The command that shows a run."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.console import for_a_program, tell
from ..train import Json

watch_app = typer.Typer()


@watch_app.command(short_help="Show a run while it trains, and afterwards.")
def watch(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Output folders; several are compared.", show_default=False)
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The page. Default: run.html in the first folder.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Seconds between two pages of a run that goes on.")] = 10,
    once: Annotated[bool, typer.Option("--once", help="Write one page and end.")] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve the page on this port of this machine; 0 for a free one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page with curves, answers, rows and warnings of a run, again and again while it goes on; it needs its
    files alone, so it works over ssh and afterwards."""
    from ..watching.live import watch as keep

    with for_a_program(as_json) as give:
        give({"page": str(keep(runs, output, every, once, port, lambda line: tell(line, stderr=True)))})
