"""The Hub is looked for before it is asked; what is tried again and what is not (bundle/test_hub.py: over HTTP)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import datasets
import pytest
from huggingface_hub import close_session, constants, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from support.source_files import captions
from vlm_sft.base import hub
from vlm_sft.base.errors import UserError
from vlm_sft.base.hub import hub_is_away, look_for_hub, one_sentence, patiently
from vlm_sft.bundle.hub import find_bundle


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    return seconds


def test_a_broken_connection_is_tried_three_times(slept):
    tries = []

    def call():
        tries.append(1)
        raise ConnectionResetError("cut")

    with pytest.raises(ConnectionResetError):
        patiently(call)
    assert len(tries) == 3 and slept == [1.0, 2.0]
    with pytest.raises(ConnectionResetError):
        patiently(call, max_tries=1)
    assert len(tries) == 4


def test_mistakes_of_the_program_are_neither_tried_again_nor_hidden(slept):
    with pytest.raises(ZeroDivisionError), one_sentence("me/x"):
        patiently(lambda: 1 / 0)
    assert slept == []


def test_a_sentence_of_ours_stays_and_a_cause_is_not_shown():
    with pytest.raises(UserError, match=r"^mine$"), one_sentence("me/x", before="a", after="b"):
        raise UserError("mine")
    sentence = r"^Ah\. The Hub at .* cannot be reached \(ConnectionResetError\); .*; so\.$"
    with pytest.raises(UserError, match=sentence) as found, one_sentence("me/x", before="Ah. ", after="; so"):
        raise ConnectionResetError("hf_secret")
    assert found.value.__suppress_context__ and "hf_secret" not in str(found.value)


@pytest.fixture
def endpoint(monkeypatch):
    """A port on which somebody answers until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "getproxies", dict)
        yield server
    close_session()  # and with it what refuses requests


def test_a_hub_that_answers_is_left_to_the_libraries(endpoint):
    assert look_for_hub() and not hub_is_away()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    endpoint.close()
    assert look_for_hub(), "it is looked for once"


def test_a_hub_that_is_away_leaves_the_caches_and_no_switch_of_a_library_is_touched(endpoint, monkeypatch, tmp_path):
    endpoint.close()
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    assert not look_for_hub() and not look_for_hub() and hub_is_away()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    began = time.monotonic()
    with pytest.raises(UserError, match=r"'me/mine' is no folder here. The Hub at http://127.* cannot be reached"):
        find_bundle("me/mine")
    commit = "a" * 40
    cached = tmp_path / "models--me--mine" / "snapshots" / commit / "a.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text("猫", encoding="utf-8")
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text(commit, encoding="utf-8")
    assert hf_hub_download("me/mine", "a.txt", cache_dir=tmp_path) == str(cached)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/mine", "b.txt", cache_dir=tmp_path)
    assert time.monotonic() - began < 20, "the libraries alone try for half a minute"
    assert get_session().event_hooks["request"].count(hub._refuse) == 1


def test_a_hub_that_comes_back_is_asked_again(endpoint, monkeypatch):
    port = endpoint.getsockname()[1]
    endpoint.close()
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    assert not look_for_hub()
    with socket.create_server(("127.0.0.1", port)):
        assert not look_for_hub(), "not for every file"
        monkeypatch.setattr(hub, "LOOK_AGAIN", 0.0)
        assert look_for_hub() and not hub_is_away()
        hub._refuse(get_session().build_request("GET", constants.ENDPOINT))


def slow_connection(*args):
    time.sleep(1)
    raise TimeoutError


def test_a_name_that_takes_too_long_to_look_up(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub.socket, "create_connection", slow_connection)
    assert not look_for_hub()


def test_a_proxy_and_a_user_who_is_offline_are_not_asked(endpoint, monkeypatch):
    monkeypatch.setattr(hub.socket, "create_connection", pytest.fail)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:8080"})
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
