"""What a person sees: standard error, of the first process alone, in whole lines; and what libraries may not say.

All that is printed goes through `make_console` or `tell`: names of files, sources and keys, answers, templates and
ledgers are a stranger's words, and a terminal obeys control sequences in them (it fills the clipboard, hides text,
makes links), and rich its markup.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import TYPE_CHECKING

from .names import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console
    from rich.table import Table

WIDTH_OF_LOGS = 120  # a table in a log file is not cut to the width of a terminal that is not there
# Control characters but line breaks and tabs, marks that turn the direction of what follows, and what is no text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]")


def harmless(text: str) -> str:
    """A text of which a terminal obeys nothing, character by character: no sequence comes through in pieces."""
    return UNSAFE.sub("\ufffd", text)


def harmless_json(value: object, indent: int | None = None) -> str:
    """JSON with what is unsafe to print as escapes, which a reader of JSON takes for the same text."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(text: str = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Prints a text as it is, but for what a terminal would obey."""
    print(harmless(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


@contextmanager
def for_a_program(wanted: bool) -> Iterator[Callable[[object], None]]:
    """Where a program asked for it (`--json`), the result alone goes to standard output, all else to standard error.

    Args:
        wanted: Whether it was asked for.

    Yields:
        What takes the result: prints it as JSON, numbers that are none as null, on the first process of a launch.
    """
    out = sys.stdout

    def give(result: object) -> None:
        if wanted and os.environ.get("RANK", "0") == "0":
            plain = json.loads(json.dumps(result), parse_constant=lambda name: None)
            print(harmless_json(plain, indent=2), file=out, flush=True)

    if not wanted:
        yield give
        return
    with redirect_stdout(sys.stderr):
        yield give


def make_console(
    stderr: bool = True, *, quiet: bool | None = None, soft_wrap: bool = False, highlight: bool = True
) -> Console:
    """A console that speaks on the first process of a launch alone, and prints brackets and control characters as text.

    Args:
        stderr: Standard error, so that standard output stays free for results.
        quiet: Whether it says nothing; None: it does on the first process.
        soft_wrap: Leaves the breaking of lines to the terminal.
        highlight: Colours numbers and paths.
    """
    if quiet is None:
        quiet = os.environ.get("RANK", "0") != "0"
    console = _console_class()(
        stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, highlight=highlight, markup=False, emoji=False
    )
    if not console.is_terminal:
        console.width = WIDTH_OF_LOGS
    return console


@cache
def _console_class() -> type[Console]:
    """Made when it is asked for, because rich takes its time to be imported."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            """What rich itself does with the terminal stays: its segments say that they are controls."""
            for segment in super().render(renderable, options):
                unsafe = not segment.control and UNSAFE.search(segment.text)
                yield segment._replace(text=harmless(segment.text)) if unsafe else segment

    return Harmless


def plain_table(title: str, caption: str) -> Table:
    """A table without a frame, its title and caption at the left: as narrow as its columns are."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    left: Options = {"title_justify": "left", "caption_justify": "left"}
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **left)


def say(console: Console, message: str) -> None:
    """Prints a message as it is: brackets are no markup, and a log file's lines are not broken."""
    console.print(harmless(message), markup=False, highlight=False, soft_wrap=not console.is_terminal)


def quiet_libraries() -> None:
    """Leaves out notes and deprecations of the libraries and their progress bars; errors stay.

    To be called by the commands before the first heavy import (bitsandbytes speaks while it is imported), never on
    import.
    """
    # It says that a faster 4-bit kernel exists elsewhere, also where nothing is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Data-loader workers are forked after the rows were tokenised, and each would warn of that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What is deprecated is how the libraries call each other; a recipe's own keys are checked when it is read.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed")
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator")

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
