"""A cache that is filled ahead: every picture of a recipe once, in shares, and gone on with after a kill."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.paths import accelerate_config
from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.base.console import make_console
from vlm_sft.base.errors import UserError
from vlm_sft.cache.store import Store
from vlm_sft.cache.upkeep import stores_in
from vlm_sft.prepare.fill_cache import fill_cache


@pytest.fixture
def fill(recipe_file, tmp_path, capsys):
    """Fills `kept` for a recipe with these changes; returns what was said."""

    def run(*overrides, **changes):
        path = recipe_file(**changes)
        fill_cache(load_recipe(path, [f"cache.path={tmp_path / 'kept'}", *overrides]), make_console())
        return capsys.readouterr().err

    return run


def test_every_picture_is_kept_once_and_a_killed_filling_goes_on(fill, tmp_path, monkeypatch):
    real, calls = Store.add, []

    def killed(store, keys, features):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(keys)
        real(store, keys, features)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            fill()
    assert [len(kept.store) for kept in stores_in(tmp_path / "kept")] == [4]
    assert "8 pictures" in (said := fill()) and "4 computed now" in said
    assert "0 computed now" in fill()
    assert not (tmp_path / "out").exists(), "nothing is trained"


def test_all_processes_of_a_launch_share_the_pictures_and_keep_what_one_would(recipe_file, fill, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2"))]
    command += ["--main_process_port", "0", "-m", "vlm_sft.cache", str(recipe_file()), "--json", "sft.use_cpu=true"]
    command.append(f"cache.path={tmp_path / 'shared'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["pictures"], told["computed"]) == (8, 4) and "4 computed now by this process" in done.stderr
    fill()
    (alone,), (shared,) = stores_in(tmp_path / "kept"), stores_in(tmp_path / "shared")
    sizes = [file.stat().st_size for file in shared.store.folder.glob("*.features")]
    assert sizes == [4 * shared.store.row_bytes] * 2, "each process appends its half to a file of its own"
    assert sorted(alone.store.known) == sorted(shared.store.known)
    assert all(alone.store.get(key).equal(shared.store.get(key)) for key in alone.store.known)


def test_another_stack_has_another_store(fill, tmp_path, pieces):
    fill()
    fill(stack=tiny_stack(pieces, projector={"type": "mlp"}))  # which lies behind what is kept
    assert len(stores_in(tmp_path / "kept")) == 1
    fill("train={resampler: 0.001, projector: 0.001}")
    shapes = sorted(kept.store.shape for kept in stores_in(tmp_path / "kept"))
    assert shapes == [(4, 16), (17, 24)], "of the tower where the resampler learns"


def test_what_cannot_be_is_one_sentence(fill, recipe_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no `cache` to fill; add cache\.path"):
        fill_cache(load_recipe(recipe_file()), make_console())
    with pytest.raises(UserError, match="the vision tower is trained"):
        fill("train={vision_tower: 0.001}")
    with pytest.raises(UserError, match=r"cache\.max_gb is 1e-07 .* raise it"):
        fill("cache.max_gb=1e-7")
    with pytest.raises(UserError, match="rows of a stream"):
        fill("data.streaming=true")
    (tmp_path / "文件").write_text("")
    for path in ("文件", "文件/below"):
        with pytest.raises(UserError, match=r"cache\.path.*文件' is a file; name a folder"):
            fill(f"cache.path={tmp_path / path}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were started, but each would work alone.*sft\.use_cpu=true"):
        fill()
