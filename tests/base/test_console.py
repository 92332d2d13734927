"""What is said reaches a person whole, and once; what libraries say of what nobody can mend is left out."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from support.paths import ROOT
from vlm_sft.base.console import WIDTH_OF_LOGS, harmless, harmless_json, make_console, say, tell

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


# -- a stranger's words ------------------------------------------------------------------------------------------------

ATTACKS = [
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # fills the clipboard
    "\x1b]8;;https://evil.example\x1b\\\\猫\x1b]8;;\x1b\\\\",
    "\x1b[2J\x1b[1;1H",
    "\x9b2J",
    "ok\rrm -rf ~",
    "\x08\x08\x08",
    "\u202egnp.exe",
    "[red]",
    "[link=https://evil.example]",
    "[/]",
    ":skull:",
]
KEPT = "这是什么？ 🙂 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 é ñ العربية \tx\n"


def printed(file: io.StringIO, *, terminal: bool) -> Console:
    console = make_console(quiet=False)
    console.file, console._force_terminal, console.width = file, terminal, 200
    return console


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_that_a_stranger_wrote_is_obeyed_by_rich_or_a_terminal(text, capsys):
    """In lines, tables, titles and what is printed by itself."""
    table = Table(text, title=text)
    table.add_row(text)
    for terminal in (False, True):
        file = io.StringIO()
        console = printed(file, terminal=terminal)
        console.print(f"a {text} b", table, highlight=False)
        say(console, text)
        plain = (
            file.getvalue().replace("\x1b[3m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
        )  # rich's own: a title
        assert not [letter for letter in plain if unicodedata.category(letter) == "Cc" and letter != "\n"], plain
        assert "\u202e" not in plain
        for mark in ("[red]", "[link=", "[/]", ":skull:"):
            assert (mark in text) == (mark in plain)
    tell(text)
    tell(text, stderr=True)
    assert [*capsys.readouterr()] == [harmless(text) + "\n"] * 2 and harmless(text).isascii() | (
        "\ufffd" in harmless(text)
    )


@given(st.text())
def test_what_is_kept_and_what_is_not(text):
    """Every letter, mark and line break stays in its place; one at a time, so that no sequence is put together anew."""
    safe = harmless(text)
    assert len(safe) == len(text) and safe == "".join(map(harmless, text))
    for before, after in zip(text, safe, strict=True):
        unsafe = unicodedata.category(before) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(before) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        assert after == ("\ufffd" if unsafe and before not in "\n\t" else before) or before in "\ufff9\ufffa\ufffb"
    assert json.loads(harmless_json({"a": text}))["a"] == text and harmless(harmless_json(text)) == harmless_json(text)


def test_chinese_emoji_and_marks_are_kept():
    assert harmless(KEPT) == KEPT


@pytest.mark.parametrize("path", sorted((ROOT / "vlm_sft").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_else_prints(path):
    if path.name == "console.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            to_a_file = path.name == "chat.py" and any(word.arg == "flush" for word in node.keywords)  # not a terminal
            assert name not in ("Console", "print", "echo", "secho") or to_a_file or _of_a_console(node), node.lineno


def _of_a_console(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "print"
