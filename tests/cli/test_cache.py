"""`vlm-sft cache` on a folder: told, checked with an exit code, tidied."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from vlm_sft.cache.store import Store
from vlm_sft.cli import main as cli


@pytest.fixture
def say(monkeypatch, capsys):
    """Runs the console command; returns its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vlm-sft", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_folder_is_shown_checked_and_tidied(tmp_path, say, command):
    store = Store(tmp_path / "kept" / "stack", {"pretrained": {"vision_tower": "eyes/眼"}})
    store.add([b"a" * 16, b"b" * 16], torch.randn(2, 2, 3))
    store.close()
    code, said = say("info", tmp_path / "kept")
    assert code == 0 and "vision_tower: eyes/眼" in said and "2 x 3" in said
    (kept,) = json.loads(say("info", tmp_path / "kept", "--json")[1])
    assert (kept["pictures"], kept["shape"], kept["about"]["pretrained"]) == (2, [2, 3], {"vision_tower": "eyes/眼"})
    code, said = say("verify", tmp_path / "kept")
    assert code == 0 and "0 of 2 entries" in said
    (shard,) = store.folder.glob("*.features")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    code, said = say("verify", tmp_path / "kept")
    assert code == 1 and "1 of 2 entries are damaged" in said
    assert "1 damaged and removed, 2.4e-08 GB freed, 1 picture left." in say("prune", tmp_path / "kept")[1]
    assert "nothing to remove" in say("prune", tmp_path / "kept")[1]
    assert "There is no folder" in command("cache", "info", tmp_path / "no")
    assert "no.yaml does not exist" in command("cache", "info", tmp_path / "no.yaml")


def test_a_recipe_names_its_folder(tmp_path, recipe_file, say, command):
    with_cache = recipe_file("with", cache={"path": str(tmp_path / "kept")})
    Store(tmp_path / "kept" / "stack").add([b"a" * 16], torch.randn(1, 2, 3))
    assert "1 entries" in say("verify", with_cache)[1]
    assert "has no `cache`" in command("cache", "verify", recipe_file("without"))
