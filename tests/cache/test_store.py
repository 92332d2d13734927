"""Features on disk: what is damaged, half written, too much or a stranger's is not taken for a picture's."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from vlm_sft.base.errors import UserError
from vlm_sft.cache.store import Store, size_of

KEYS = [bytes([n]) * 16 for n in range(4)]


def filled(folder, dtype=torch.float32, **options):
    store = Store(folder / "stack", {"what": "猫"}, (2, 3), **options)
    features = torch.randn(4, 2, 3).to(dtype)
    store.add(KEYS, features)
    return store, features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_process_reads_the_same_bits(tmp_path, dtype):
    store, features = filled(tmp_path, dtype)
    for other in (Store(tmp_path / "stack", {}, (2, 3)), pickle.loads(pickle.dumps(store))):
        assert len(other) == 4 and all(torch.equal(other.get(k), f) for k, f in zip(KEYS, features, strict=True))
    assert Store(tmp_path / "stack").about == {"what": "猫"} and store.get(b"?" * 16) is None


def test_a_reader_finds_what_was_written_since(tmp_path):
    reader = Store(tmp_path / "stack", {}, (2, 3))
    assert reader.get(KEYS[0]) is None
    store, features = filled(tmp_path)
    assert torch.equal(reader.get(KEYS[0]), features[0])
    store.add([b"n" * 16], features[:1])
    assert torch.equal(reader.get(b"n" * 16), features[0])


def test_a_picture_that_is_there_is_not_written_again(tmp_path):
    store, features = filled(tmp_path)
    before = size_of(tmp_path)
    store.add(KEYS, features)
    assert size_of(tmp_path) == before
    store.add([b"m" * 16, b"m" * 16], features[:2])
    assert len(store) == 5 and torch.equal(store.get(b"m" * 16), features[0])


def test_a_damaged_entry_is_found_and_made_again(tmp_path):
    _, features = filled(tmp_path)
    (shard,) = (tmp_path / "stack").glob("*.features")
    content = bytearray(shard.read_bytes())
    content[30] ^= 1
    shard.write_bytes(content)
    fresh = Store(tmp_path / "stack", {}, (2, 3))
    assert fresh.get(KEYS[1]) is None and fresh.damaged == 1 and torch.equal(fresh.get(KEYS[0]), features[0])
    fresh.add([KEYS[1]], features[1:2])
    assert torch.equal(fresh.get(KEYS[1]), features[1])
    assert torch.equal(Store(tmp_path / "stack", {}, (2, 3)).get(KEYS[2]), features[2])


def test_a_shard_that_was_cut_keeps_what_is_whole(tmp_path):
    _, features = filled(tmp_path)
    (shard,) = (tmp_path / "stack").glob("*.features")
    shard.write_bytes(shard.read_bytes()[:-1])
    fresh = Store(tmp_path / "stack", {}, (2, 3))
    assert fresh.get(KEYS[3]) is None and torch.equal(fresh.get(KEYS[2]), features[2])


def test_two_writers_have_files_of_their_own(tmp_path):
    filled(tmp_path)
    other = Store(tmp_path / "stack", {}, (2, 3))
    other.add([b"o" * 16], torch.zeros(1, 2, 3))
    assert len(list((tmp_path / "stack").glob("*.features"))) == 2
    assert len(Store(tmp_path / "stack", {}, (2, 3))) == 5


WRITER = """
import sys, torch
from pathlib import Path
from vlm_sft.cache.store import Store
store = Store(Path(sys.argv[1]), {"what": "猫"}, (16, 64))
for n in range(100_000):
    store.add([n.to_bytes(16, "little")], torch.full((1, 16, 64), float(n)))
    print(n, flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_had_written_and_another_goes_on(tmp_path):
    folder, written = tmp_path / "stack", 0
    for turn in (400, 700):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for line in writer.stdout:
            if (written := int(line)) >= turn:
                writer.kill()
                break
        writer.communicate()
        store = Store(folder)
        # The last may stand there too, whole, without having been said.
        assert len(store) >= written + 1
        found = [store.get(key) for key in store.known]
        wanted = [torch.full((16, 64), float(int.from_bytes(key, "little"))) for key in store.known]
        assert store.damaged == 0 and all(map(torch.equal, found, wanted))
    assert len(list(folder.glob("*.index"))) == 2


def test_no_more_is_kept_than_the_limit(tmp_path):
    store, _ = filled(tmp_path, max_gb=1e-7)
    assert len(store) == 0 and "cache.max_gb is 1e-07" in store.full and "raise it" in store.full
    store, _ = filled(tmp_path, max_gb=1e-3)
    assert len(store) == 4 and store.full is None


def test_a_disk_that_is_full_is_one_sentence_and_what_was_there_stays(tmp_path, monkeypatch):
    store, features = filled(tmp_path)

    def refuse(file, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_sft.cache.store.append_whole", refuse)
    store.add([b"n" * 16], features[:1])
    assert "No space left on device" in store.full and "make room" in store.full
    assert len(Store(tmp_path / "stack", {}, (2, 3))) == 4 and b"n" * 16 not in store


@pytest.mark.parametrize(
    ("change", "word"),
    [({"shape": [2, 10**9]}, "shape"), ({"shape": [-2, 3]}, "shape"), ({"shape": [True, 3]}, "shape"),
     ({"shape": "23"}, "shape"), ({"dtype": "object"}, "object"), ({"shape": [3, 2]}, "3 x 2"), (None, "Expecting")],
)  # fmt: skip
def test_a_folder_that_is_none_is_refused(tmp_path, change, word):
    filled(tmp_path)
    about = tmp_path / "stack" / "about.json"
    about.write_text("[" if change is None else json.dumps({**json.loads(about.read_text()), **change}))
    with pytest.raises(UserError, match=r"remove its folder|remove that folder") as told:
        Store(tmp_path / "stack", {}, (2, 3))
    assert word in str(told.value) and "\n" not in str(told.value)


def test_an_index_that_lies_about_its_shard_gives_nothing(tmp_path):
    filled(tmp_path)
    (index,) = (tmp_path / "stack").glob("*.index")
    index.write_bytes(index.read_bytes() + b"x" * 20 * 1000)
    fresh = Store(tmp_path / "stack", {}, (2, 3))
    assert fresh.get(b"x" * 16) is None
    shutil.rmtree(tmp_path / "stack")
    assert fresh.get(KEYS[0]) is None
