"""`vlm-sft serve` on the command line: what is judged before anything heavy, and what is handed on."""

from __future__ import annotations

import sys
import types

import pytest

from vlm_sft.bundle import run_folder
from vlm_sft.cli import main as cli


def test_options_are_judged_before_weights_are_read(command, tmp_path, monkeypatch) -> None:
    assert "is no bundle" in command("serve", tmp_path)
    assert "--image-folder 无 is no folder: correct it." in command("serve", tmp_path, "--image-folder", "无")
    assert "--engine must be one of own, vllm, transformers, not x" in command("serve", tmp_path, "--engine", "x")
    assert "has no config.json" in command("serve", tmp_path, "--engine", "vllm")
    for more, what in (([tmp_path], "several folders"), (["--set", "a=1"], "--set")):
        assert f"--engine vllm takes no {what} from here" in command("serve", tmp_path, *more, "--engine", "vllm")
    monkeypatch.setattr("vlm_sft.cli.serving.find_spec", lambda name: None)
    assert "pip install 'vlm-sft[serve]'" in command("serve", tmp_path)


def test_what_is_said_is_handed_on(tmp_path, monkeypatch) -> None:
    noted = []
    stand_in = types.ModuleType("vlm_sft.serving.serve")
    stand_in.serve = lambda *given: noted.append(given)
    monkeypatch.setitem(sys.modules, "vlm_sft.serving.serve", stand_in)
    monkeypatch.setattr(run_folder, "find_manifest", lambda folder: folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "照片").mkdir()
    options = ["--port", "0", "--image-folder", "照片", "--max-images", "2"]
    options += ["--max-request-mb", "3", "--set", "top_k=4"]
    monkeypatch.setattr(sys, "argv", ["vlm-sft", "serve", str(tmp_path), str(tmp_path / "b"), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    ((bundles, rules, host, port, batch_size, queue, key_file, settings, trusted, patience),) = noted
    assert (bundles, host, port) == ([str(tmp_path), str(tmp_path / "b")], "127.0.0.1", 0)
    assert (rules.image_folders, rules.fetch, rules.images, rules.body_bytes) == (("照片",), None, 2, 3 * 2**20)
    assert (batch_size, queue, key_file, settings, trusted, patience) == (16, 256, None, {"top_k": 4}, False, 30.0)


def test_a_page_is_judged_before_weights_are_read(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vlm_sft.cli.serving.find_spec", lambda name: None)
    assert "needs Gradio, which is not installed: pip install 'vlm-sft[web]'" in command("web", tmp_path)
    monkeypatch.setattr("vlm_sft.cli.serving.find_spec", lambda name: "found")
    assert "is no bundle" in command("web", tmp_path)


def test_what_is_said_of_a_page_is_handed_on(tmp_path, monkeypatch) -> None:
    noted = []
    stand_in = types.ModuleType("vlm_sft.web.serve")
    stand_in.web = lambda *given: noted.append(given)
    monkeypatch.setitem(sys.modules, "vlm_sft.web.serve", stand_in)
    monkeypatch.setattr("vlm_sft.cli.serving.find_spec", lambda name: "found")
    monkeypatch.setattr(run_folder, "find_manifest", lambda folder: folder)
    options = ["--port", "0", "--keep", str(tmp_path / "留"), "--max-images", "2", "--set", "top_k=4"]
    monkeypatch.setattr(sys, "argv", ["vlm-sft", "web", str(tmp_path), str(tmp_path / "b"), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    bundles = [str(tmp_path), str(tmp_path / "b")]
    given = (bundles, tmp_path / "留", "127.0.0.1", 0, 8, 32, None, {"top_k": 4}, False, 2, 50_000_000, 1024)
    assert noted == [given]
