"""The Hub is looked for once; where it is away, the sentence comes at once and nothing before it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import datasets
import pytest
from huggingface_hub import constants

from support.source_files import captions
from vlm_sft.base import reach
from vlm_sft.base.errors import UserError
from vlm_sft.base.reach import hub_is_away, look_for_hub
from vlm_sft.bundle.hub import find_bundle


@pytest.fixture
def endpoint(monkeypatch):
    """A port on which somebody answers until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(reach, "getproxies", dict)
        yield server


def test_a_hub_that_answers_is_left_to_the_libraries(endpoint):
    assert look_for_hub() and not hub_is_away()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    endpoint.close()
    assert look_for_hub(), "it is looked for once"


def test_a_hub_that_is_away_leaves_the_caches(endpoint, monkeypatch):
    endpoint.close()
    monkeypatch.setattr(reach.time, "sleep", lambda seconds: None)
    assert not look_for_hub() and hub_is_away()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"'me/mine' is no folder here. The Hub at http://127.* cannot be reached"):
        find_bundle("me/mine")


def slow_connection(*args):
    time.sleep(1)
    raise TimeoutError


def test_a_name_that_takes_too_long_to_look_up(endpoint, monkeypatch):
    monkeypatch.setattr(reach, "PATIENCE", 0.1)
    monkeypatch.setattr(reach.socket, "create_connection", slow_connection)
    assert not look_for_hub()


def test_a_proxy_and_a_user_who_is_offline_are_not_asked(endpoint, monkeypatch):
    monkeypatch.setattr(reach.socket, "create_connection", pytest.fail)
    monkeypatch.setattr(reach, "getproxies", lambda: {"https": "http://proxy:8080"})
    assert look_for_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not look_for_hub() and not hub_is_away()


@pytest.mark.parametrize("of", ["model", "source"])
def test_a_command_says_one_sentence_and_nothing_else(tmp_path, of):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    source = captions(tmp_path, "c", 1).path if of == "model" else "nobody/nothing"
    command = [
        "data",
        "filter",
        source,
        str(tmp_path / "out.jsonl"),
        "--format",
        "caption",
        "--model",
        "nobody/nothing",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": closed}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sft", *command], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    said = "--model: 'nobody/nothing' is no folder here" if of == "model" else 'no file or folder "nobody/nothing" here'
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert time.monotonic() - began < 60, "half a minute for each file was spent on waiting"
