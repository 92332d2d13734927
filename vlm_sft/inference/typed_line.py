"""A line as people type it at a terminal: edited and completed, and the paths in it."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Iterable
from functools import partial


def split_paths(given: str) -> list[str]:
    """Paths as people type or drop them: with spaces, in quotes, with backslashes, several in a row.

    What is a file as it stands is one path. Else quotes and backslashes are read as a shell reads them; if none of the
    words found is a file, the whole was meant as one path (which an error can name).
    """
    whole = os.path.expanduser(given)
    if os.path.exists(whole):
        return [whole]
    try:
        words = [os.path.expanduser(word) for word in shlex.split(given)]
    except ValueError:  # a quotation mark is not closed
        return [whole]
    return words if len(words) == 1 or any(map(os.path.exists, words)) else [whole]


def use_readline(commands: Iterable[str]) -> None:
    """History and editing for `input`, and completion of commands and of the path after /image and /video."""
    try:
        import readline
    except ImportError:  # Windows has no readline
        return
    readline.set_completer_delims("")
    readline.set_completer(partial(_complete, list(commands)))
    readline.parse_and_bind("tab: complete")


def _complete(commands: list[str], line: str, state: int) -> str | None:
    if line.startswith(("/image ", "/video ")):
        command, start = line[: len("/image ")], line[len("/image ") :]
        paths = glob.glob(glob.escape(os.path.expanduser(start)) + "*")
        found = [f"{command}{path}{'/' if os.path.isdir(path) else ''}" for path in sorted(paths)]
    else:
        found = [command + " " for command in commands if line and command.startswith(line)]
    return found[state] if state < len(found) else None
