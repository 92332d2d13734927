"""`vlm-sft doctor`: what a bug report needs, and nothing that is private."""

from __future__ import annotations

import getpass
import json
import re
import socket
import sys
from pathlib import Path

import pytest

from support.recipe_texts import TEXT, write
from vlm_sft.cli import main as cli
from vlm_sft.machine.doctor import examine


@pytest.fixture
def doctor(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_SFT_LANG", "en")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vlm-sft", "doctor", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().out

    return run


def test_versions_and_machine_are_there_and_nothing_private(doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "secret place"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLM_SFT_LIMITS", "row_bytes=5 /home/somebody")
    code, out = doctor()
    assert code == 0
    for words in ("Python 3.", "torch 2.", "transformers 5.", "HF_TOKEN=set", "HF_HOME=set", "OMP_NUM_THREADS=3",
                  "VLM_SFT_LIMITS=set", "GiB of memory", "CUDA         not used"):  # fmt: skip
        assert words in out, words
    for private in (
        "hf_abc",
        "secret place",
        "somebody",
        getpass.getuser() + "/",
        socket.gethostname(),
        str(Path.home()),
    ):
        assert private not in out, private
    assert not re.search(r"(?<![\w.])/\w", out), "no absolute path"
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        (["sft.report_to=swanlab"], "sft.report_to names swanlab, which is not installed: pip install swanlab."),
        (["sft.bf16=true"], "sft.bf16 needs a GPU, and there is none here"),
        (
            ["data.train.0.path=/home/somebody/gone.jsonl"],
            "data.train: what 'gone' names is not there: correct `path`.",
        ),
        (["stack.language_model.attn_implementation=flash_attention_2"], "needs flash-attn"),
        (["stack.language_model.pretrained=nobody/no-model"], "language_model: nobody/no-model is not on this machine"),
        (["stack.language_model.pretrained=/home/somebody/llm"], "language_model: its folder or file is not there"),
        (["sft.output=1", "sftt.x=1"], 'unknown key "sftt"'),
        (["sft.max_steps=abc"], "sft.max_steps"),
    ],
)
def test_what_a_recipe_misses_is_said(changes, finding, doctor, tmp_path):
    code, out = doctor(write(tmp_path, TEXT), *changes)
    assert code == 1 and finding in " ".join(out.split()), out
    assert "somebody" not in out


def test_a_folder_without_weights_is_no_piece(doctor, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    code, out = doctor(write(tmp_path, TEXT), f"stack.language_model.pretrained={tmp_path / 'llm'}")
    assert code == 1 and "language_model: its folder holds no weights" in " ".join(out.split())
    code, out = doctor("quickstart_stage1")
    assert "no weights" not in out


def test_a_recipe_of_an_encoder_is_looked_at_too(doctor):
    code, out = doctor("vle_vqa")
    assert code == 1 and "hfl/vle-base is not on this machine yet" in " ".join(out.split())


def test_json_says_the_same(doctor, tmp_path):
    code, out = doctor(write(tmp_path, TEXT), "sft.report_to=swanlab", "--json")
    found = json.loads(out)
    assert code == 1 and found["versions"]["torch"] and found["hub"] is None
    assert any("swanlab" in finding["what"] for finding in found["findings"])


def test_the_hub_is_asked_only_when_one_says_so(monkeypatch):
    asked = []
    monkeypatch.setattr("vlm_sft.base.hub.look_for_hub", lambda: asked.append(1) or False)
    assert examine().hub is None and not asked
    report = examine(ask_hub=True)
    assert report.hub is False and asked and "The Hub does not answer" in report.findings[-1].what
