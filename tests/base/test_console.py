"""What is said reaches a person whole, and once."""

from __future__ import annotations

import io

from rich.console import Console

from vlm_sft.base.console import WIDTH_OF_LOGS, make_console, say


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
