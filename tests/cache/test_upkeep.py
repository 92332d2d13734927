"""A cache's folder is checked and tidied: what is damaged goes, what is whole and what a run writes stays."""

from __future__ import annotations

import os
import time

import pytest
import torch

from vlm_sft.base.errors import UserError
from vlm_sft.cache.store import Store, size_of
from vlm_sft.cache.upkeep import prune, stores_in, verify

KEYS = [bytes([n]) * 16 for n in range(4)]
FEATURES = torch.randn(4, 2, 3)


@pytest.fixture
def make(tmp_path):
    """Writes a store of that name that was last used so many days ago; its writer has ended."""

    def write(name="a", days=0.0):
        store = Store(tmp_path / "cache" / name, {"pretrained": {"vision_tower": "眼"}})
        store.add(KEYS, FEATURES)
        store.close()
        then = time.time() - days * 86_400
        os.utime(store.folder / "about.json", (then, then))
        return store

    return write


def damage(store):
    (shard,) = store.folder.glob("*.features")
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)


def test_what_lies_there_is_told_the_last_used_first(tmp_path, make):
    make("old", days=3), make("new")
    new, old = stores_in(tmp_path / "cache")
    assert (new.store.folder.name, old.store.folder.name) == ("new", "old") and len(new.store) == 4
    assert new.about == {"pretrained": {"vision_tower": "眼"}} and new.bytes == size_of(new.store.folder)
    with pytest.raises(UserError, match="does not exist"):
        stores_in(tmp_path / "no")


def test_damage_is_counted_and_removed_and_the_rest_stays(tmp_path, make):
    store = make()
    assert list(prune(tmp_path / "cache")) == []
    damage(store)
    assert [verify(kept.store) for kept in stores_in(tmp_path / "cache")] == [1]
    (sentence,) = prune(tmp_path / "cache")
    assert "1 damaged and removed" in sentence and "3 pictures left" in sentence
    (kept,) = stores_in(tmp_path / "cache")
    assert verify(kept.store) == 0 and len(kept.store) == 3
    assert torch.equal(kept.store.get(KEYS[2]), FEATURES[2]) and len(list(kept.store.folder.glob("*.index"))) == 1
    assert not list(kept.store.folder.glob("*.lock"))


def test_what_was_written_twice_or_half_is_written_once(tmp_path, make):
    store = make()
    again = Store(store.folder)
    again.forget()
    again.add(KEYS, FEATURES)
    again.close()
    (shard, _) = store.folder.glob("*.features")
    with open(shard, "ab") as file:
        file.write(b"killed")
    (sentence,) = prune(tmp_path / "cache")
    assert "0 damaged" in sentence and "4 pictures left" in sentence
    assert sum(path.stat().st_size for path in store.folder.glob("*.features")) == 4 * 24


def test_what_a_run_writes_is_left_alone(tmp_path, make):
    store = make("a", days=9)
    writing = Store(store.folder)
    writing.add([b"n" * 16], FEATURES[:1])
    (sentence,) = prune(tmp_path / "cache", days=1, max_gb=0)
    assert "a run is writing there" in sentence and len(Store(store.folder)) == 5
    writing.close()


def test_stores_go_by_age_and_then_by_size(tmp_path, make):
    make("oldest", days=30), make("old", days=3), make("new")
    (sentence,) = prune(tmp_path / "cache", days=10)
    assert "oldest" in sentence and "no run opened it for 10 days" in sentence
    limit = (size_of(tmp_path / "cache" / "new") + 10) / 1e9
    (sentence,) = prune(tmp_path / "cache", max_gb=limit)
    assert "old" in sentence and [kept.store.folder.name for kept in stores_in(tmp_path / "cache")] == ["new"]


def test_what_lies_behind_a_link_is_not_removed(tmp_path, make):
    make()
    (tmp_path / "links").mkdir()
    for kept in stores_in(tmp_path / "cache"):
        (tmp_path / "links" / kept.store.folder.name).symlink_to(kept.store.folder)
    with pytest.raises(UserError, match="is a link"):
        list(prune(tmp_path / "links", days=-1))
    assert stores_in(tmp_path / "cache")
