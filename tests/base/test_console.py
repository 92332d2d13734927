"""What is said reaches a person whole, and once; what libraries say of what nobody can mend is left out."""

from __future__ import annotations

import io
import os
import subprocess
import sys

from rich.console import Console

from vlm_sft.base.console import WIDTH_OF_LOGS, make_console, say

PROGRAM = """
import logging, os, warnings
from vlm_sft.base.console import quiet_libraries
quiet_libraries()
from transformers.utils import logging as transformers_logging
warnings.warn("old call", DeprecationWarning)
warnings.warn("old name", FutureWarning)
warnings.warn("a loss is odd", UserWarning)
logging.getLogger("bitsandbytes").warning("a faster kernel exists")
logging.getLogger("bitsandbytes").error("a kernel is broken")
transformers_logging.get_logger("transformers.x").warning("a note of transformers")
print(os.environ["TOKENIZERS_PARALLELISM"], transformers_logging.is_progress_bar_enabled())
"""


def test_a_message_is_printed_as_it_is():
    file = io.StringIO()
    message = "path/[b]x[/b].json: " + "a long line " * 30 + "1234"
    say(Console(file=file, width=40), message)
    assert file.getvalue() == message + "\n", "no markup, and no line break in a log file"


def test_a_log_file_has_room_for_a_table(capsys):
    assert make_console().width == make_console(stderr=False).width == WIDTH_OF_LOGS
    make_console().print("told")
    make_console(stderr=False).print("result")
    assert (capsys.readouterr()) == ("result\n", "told\n")


def test_the_first_process_alone_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say(make_console(), "hello")
    assert capsys.readouterr().err == ""


def said(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**kept, **environment}, check=True
    )


def test_notes_and_deprecations_are_left_out_and_errors_stay():
    result = said()
    for noise in ("old call", "old name", "faster kernel", "a note of transformers"):
        assert noise not in result.stderr
    assert "a loss is odd" in result.stderr and "a kernel is broken" in result.stderr
    assert result.stdout.split() == ["false", "False"]


def test_what_the_user_has_set_stays():
    assert said(TOKENIZERS_PARALLELISM="true").stdout.split()[0] == "true"
