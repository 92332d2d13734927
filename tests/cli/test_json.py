"""One convention for programs: with `--json` the result, and nothing else, is on standard output; exit codes are those
of the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer

from support.paths import ROOT
from vlm_sft.base.console import for_a_program, tell
from vlm_sft.cli.main import app, main

UNTIL_STOPPED = {"serve", "web"}
"""These end when they are told to, and have an address for programs."""


def commands(group, name=""):
    """Every command below a group, with its whole name."""
    for word, command in group.commands.items():
        whole = f"{name} {word}".strip()
        yield from commands(command, whole) if hasattr(command, "commands") else [(whole, command)]


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vlm-sft", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def test_every_command_that_ends_has_json():
    options = {name: {option for each in command.params for option in each.opts} for name, command in COMMANDS.items()}
    without = {name for name, known in options.items() if "--json" not in known}
    assert len(COMMANDS) > 25 and without == UNTIL_STOPPED


def test_what_is_said_on_the_way_goes_to_standard_error(capsys, monkeypatch):
    with for_a_program(True) as give:
        tell("on the way")
        print("and so")
        give({"loss": float("nan"), "名": "猫\x1b[2J", "all": [1.5, float("inf")]})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"loss": None, "名": "猫\x1b[2J", "all": [1.5, None]} and "\x1b" not in said.out
    assert said.err == "on the way\nand so\n"
    with for_a_program(False) as give:
        tell("for a person")
        give({"loss": 1})
    assert capsys.readouterr().out == "for a person\n"
    monkeypatch.setenv("RANK", "1")
    with for_a_program(True) as give:
        give({"loss": 1})
    assert capsys.readouterr().out == ""


def test_small_commands_print_one_value(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("recipes", "copy", "quickstart_stage1", "mine.yaml", "--json")
    assert code == 0 and json.loads(out)["made"][0] == "mine.yaml" and (tmp_path / "mine.yaml").exists()
    code, out, _ = call("recipes", "show", "quickstart_stage1", "--json")
    assert code == 0 and json.loads(out)["text"].startswith("#")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "猫"}\n', encoding="utf-8")
    (tmp_path / "a.png").write_bytes((ROOT / "docs" / "preflight.png").read_bytes())
    words = ("data", "convert", "rows.jsonl", "out.jsonl", "--to", "messages", "--format", "caption", "--json")
    code, out, err = call(*words)
    assert code == 0 and json.loads(out) == {"out": "out.jsonl", "rows": 1, "frames": 0} and "1 rows" in err


def test_what_can_be_mended_is_a_sentence_and_leaves_standard_output_empty(call, tmp_path):
    for words in (
        ["train", str(tmp_path / "no.yaml"), "--json"], ["evaluate", str(tmp_path), "--json"],
        ["chat", "a/b", "--json"], ["recipes", "copy", "no_such", "--json"], ["export", str(tmp_path), "x", "--json"],
    ):  # fmt: skip
        code, out, err = call(*words)
        assert (code, out) == (2, "") and err.startswith("error: ") and "Traceback" not in err, words
    code, out, err = call("train", "--no-such-option")
    assert (code, out) == (2, "") and "No such option" in err


@pytest.mark.slow
def test_a_run_and_its_evaluation_print_one_value_each(recipe_file, caption_file, tmp_path):
    source = {"path": caption_file, "format": "caption"}
    path = recipe_file(data={"train": [source], "test": [source]})

    def run(*words):
        program = "import sys; sys.argv[0] = 'vlm-sft'; from vlm_sft.cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    planned = run("train", str(path), "--dry-run", "--json")
    assert planned["memory"] > 1e5 and planned["recipe"]["data"]["train"][0]["format"] == "caption"
    trained = run("train", str(path), "--json")
    assert trained["train_loss"] > 0 and trained["step"] >= 1
    found = run("evaluate", trained["bundle"], "--json", "--max-rows", "4")
    assert found["split"] == "test" and found["questions"]["captions"] == 4


def test_the_page_names_the_exit_codes_in_both_languages():
    english, chinese = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("command_line.md", "command_line_zh.md")
    )
    codes = ["0", "1", "2", "130, 143"]
    assert re.findall(r"^\| ([\d, ]+) \|", english, re.MULTILINE) == codes
    assert re.findall(r"^\| ([\d、]+) \|", chinese, re.MULTILINE) == ["0", "1", "2", "130、143"]
    assert all(f"`{name}`" in page for name in UNTIL_STOPPED for page in (english, chinese))
