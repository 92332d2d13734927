"""A forked program is to whoever starts it what a fresh process is."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

TRAIN = [sys.executable, "-m", "vlm_sft.train"]


def end(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return done.args, done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_it_ends_and_says_what_a_fresh_process_does(forge, monkeypatch, tmp_path):
    commands = [
        [*TRAIN, "无.yaml"],
        [*TRAIN, "quickstart_stage1", "sft.max_stepz=1"],
        [sys.executable, "-m", "vlm_sft"],
    ]
    forked = [end(command, cwd=tmp_path) for command in commands]
    monkeypatch.setattr(forge, "forks", False)
    assert [end(command, cwd=tmp_path) for command in commands] == forked
    assert [code for _, code, _, _ in forked] == [2, 2, 2]


def test_it_is_given_files_time_and_surroundings(tmp_path, forge):
    command = [*TRAIN, "无.yaml"]
    with (tmp_path / "said").open("w") as file:
        assert subprocess.run(command, stderr=file).returncode == 2
    assert "无.yaml does not exist" in (tmp_path / "said").read_text(encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(command, check=True, capture_output=True)
    assert subprocess.run(command, capture_output=True).stderr.startswith(b"error: ")
    assert "error (process 3): " in end(command, env={**forge.environment, "RANK": "3"})[3]


def test_a_program_that_takes_too_long_is_ended(forge, recipe_file):
    command = [*TRAIN, str(recipe_file()), "sft.max_steps=1000000"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=1)
    program = forge.start(command, stderr=subprocess.STDOUT, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(5)
    deadline = time.monotonic() + 60
    while is_alive(program.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
