"""What a person sees: standard error, of the first process alone, in whole lines; and what libraries may not say."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_LOGS = 120  # a table in a log file is not cut to the width of a terminal that is not there


def make_console(stderr: bool = True) -> Console:
    """A console that speaks on the first process of a launch alone.

    Args:
        stderr: Standard error, so that standard output stays free for results.
    """
    from rich.console import Console

    console = Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")
    return console if console.is_terminal else Console(stderr=stderr, quiet=console.quiet, width=WIDTH_OF_LOGS)


def say(console: Console, message: str) -> None:
    """Prints a message as it is: brackets are no markup, and a log file's lines are not broken."""
    console.print(message, markup=False, highlight=False, soft_wrap=not console.is_terminal)


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
