"""Rows read while training: dealt without overlap, in an order that can be had again, and continued exactly."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from itertools import islice

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from support.paths import ROOT
from support.source_files import write
from vlm_sft import load_recipe
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.data.streaming import first_rows, stream_mixture
from vlm_sft.recipe.sections import Source
from vlm_sft.train import train


def chats(folder, name, count, **options) -> Source:
    rows = [{"prompt": "问", "completion": f"{i}"} for i in range(count)]
    return Source(path=write(folder / f"{name}.jsonl", rows), format="messages", **options)


def ids(rows, count):
    return [row["id"] for row in islice(iter(rows), count)]


def test_every_row_comes_once_in_a_pass_and_the_stream_has_no_end(tmp_path):
    stream = stream_mixture([chats(tmp_path, "a", 50)], buffer=1)
    assert ids(stream, 120) == [f"a/{1 + i % 50}" for i in range(120)]
    shuffled = ids(stream_mixture([chats(tmp_path, "a", 50)], buffer=7), 2000)
    assert shuffled[:50] != ids(stream, 50)
    assert max(Counter(shuffled).values()) - min(Counter(shuffled).values()) <= 3


def test_the_order_follows_from_the_seed(tmp_path):
    source = chats(tmp_path, "a", 50)
    first = ids(stream_mixture([source], seed=3, buffer=20), 100)
    assert first == ids(stream_mixture([source], seed=3, buffer=20), 100)
    assert first != ids(stream_mixture([source], seed=4, buffer=20), 100)


def test_processes_and_workers_share_the_rows_without_overlap(tmp_path):
    stream = stream_mixture([chats(tmp_path, "a", 60)], buffer=4, shards=4)
    seen = []
    for rank in range(2):
        share = stream.shard(num_shards=2, index=rank)
        loader = DataLoader(share, batch_size=5, num_workers=2, collate_fn=lambda rows: [row["id"] for row in rows])
        batches = list(islice(iter(loader), 4))
        seen += [set(batches[0] + batches[2]), set(batches[1] + batches[3])]
    for k, one in enumerate(seen):
        assert one <= {f"a/{1 + i}" for i in range(60) if i % 4 == k}, "each worker has its own quarter of the file"


def test_sources_are_mixed_by_weight(tmp_path):
    sources = [chats(tmp_path, "a", 5, weight=3.0), chats(tmp_path, "b", 500, weight=1.0)]
    drawn = Counter(name.split("/")[0] for name in ids(stream_mixture(sources, buffer=10), 4000))
    assert 2850 <= drawn["a"] <= 3150


def test_fewer_rows_than_shards(tmp_path):
    stream = stream_mixture([chats(tmp_path, "a", 2)], shards=3)
    with pytest.raises(UserError, match=r'"a" has too few rows to be dealt to 3 processes and workers'):
        ids(stream.shard(num_shards=3, index=2), 1)


def test_a_row_that_cannot_be_read_stops_the_stream_or_comes_through_with_its_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "b"}, {"prompt": "q"}, {"completion": "b"}])
    source = Source(path=path, format="messages")
    with pytest.raises(RowError, match=r"line 2"):
        ids(stream_mixture([source], buffer=1), 9)
    rows = list(islice(iter(stream_mixture([source], buffer=1, keep_rejected=True)), 4))
    assert [row["rejected"] is None for row in rows] == [True, False, False, True]
    assert rows[1]["id"].endswith("line 2") and rows[1]["rejected"]["sentence"].startswith(rows[1]["id"])
    assert [row["id"] for row in first_rows(rows, 5)] == ["a/1", "a/1"]


@pytest.mark.parametrize(
    ("data", "overrides", "sentence"),
    [
        ({}, ["sft.max_steps=-1"], r"has no end of its own; say how long to train: `sft\.max_steps`"),
        ({"languages": {"zh": 1.0}}, [], r"`data\.languages` needs to know all rows"),
        ({"train": 2}, [], r"set `sampling: weights` and give each source a `weight`"),
        ({"repeat": 2}, [], r"a stream repeats every source without end"),
        ({"streaming": False, "shuffle_buffer": 9}, [], r"`data\.shuffle_buffer` belongs to `data\.streaming: true`"),
    ],
)
def test_recipes_that_cannot_stream(recipe_file, caption_file, data, overrides, sentence):
    source = {"path": caption_file, "format": "caption", "repeat": data.pop("repeat", 1)}
    sources = [{**source, "name": f"s{i}"} for i in range(data.pop("train", 1))]
    with pytest.raises(UserError, match=sentence):
        load_recipe(recipe_file(data={"train": sources, "streaming": True, **data}), overrides)


@pytest.mark.slow
def test_a_streamed_run_goes_on_exactly_and_keeps_its_ledger(recipe_file, photos, tmp_path):
    rows = [{"image": photos[i % 8], "caption": f"第{i}张"} for i in range(2000)]
    rows[3] = {"caption": "no image"}
    rows[1200]["image"] = "gone.png"
    path = write(tmp_path / "many.jsonl", rows)
    data = {
        "train": [{"path": path, "format": "caption"}],
        "streaming": True,
        "shuffle_buffer": 30,
        "max_rejected": 0.01,
    }

    def run(name, *more):
        steps = ["sft.max_steps=6", "sft.save_strategy=steps", "sft.save_steps=3", "sft.dataloader_num_workers=2"]
        folder = train(load_recipe(recipe_file(name, data=data), [*steps, *more]))
        losses = [entry["loss"] for entry in json.loads((folder / "metrics.json").read_text()) if "loss" in entry]
        return folder, losses

    whole, losses = run("whole")
    again, later = run("again", f"sft.resume_from_checkpoint={whole}/checkpoint-3")
    assert later == losses and len(losses) == 6
    for file in whole.glob("*.safetensors"):
        one, other = load_file(file), load_file(again / file.name)
        assert all(one[name].equal(other[name]) for name in one)
    for folder in (whole, again):
        entry = json.loads((folder / "bundle.json").read_text())["ledger"]["train"]["sources"]["many"]
        assert entry["read"] == 24 and entry["streamed"]
        assert sum(entry["rejected"].values()) == len(entry["met"]) == 24 - entry["used"]


def test_the_benchmark_of_memory_measures_both_ways(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "data_memory.py"))
    file = benchmark["write_index"](tmp_path / "rows", 320)
    results = {way: {"epoch": benchmark["measure"](way, file, 320, points=2)} for way in ("first start", "streaming")}
    for found in results.values():
        assert found["epoch"]["megabytes"][-1][0] == 320 and found["epoch"]["megabytes"][-1][1] > 50
        assert 0 < found["epoch"]["first_batch_seconds"] <= found["epoch"]["seconds"]
    benchmark["draw"](results, tmp_path / "memory.png")
    assert Image.open(tmp_path / "memory.png").size == (840, 480)
