"""`group_by_length`: each row once an epoch, less padding, the same order in all processes and after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.data import DataLoader

from vlm_sft import load_recipe
from vlm_sft.batch.by_length import PACK, ByLength, Packs, pack_stream
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.rows.filling import pack
from vlm_sft.stack.kinds import compose
from vlm_sft.training.build_trainer import build_collator, build_trainer
from vlm_sft.training.run_rows import RunRows, load_rows

LENGTHS = [1 + (number * 37) % 100 for number in range(90)]


def test_each_row_once_an_epoch_in_an_order_of_the_seed_and_the_epoch():
    orders = []
    for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0)):
        sampler = ByLength(LENGTHS, 6, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # the global one plays no part
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(90)) and len(sampler) == 90
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
    spread = [max(step) - min(step) for step in lengths_of(orders[0], 6)]
    assert sorted(spread)[len(spread) // 2] <= 30  # at random it is above 80
    assert max(orders[0][:6], key=LENGTHS.__getitem__) == LENGTHS.index(max(LENGTHS))  # the longest first


def lengths_of(order: list[int], size: int) -> list[list[int]]:
    return [[LENGTHS[number] for number in order[start : start + size]] for start in range(0, len(order), size)]


@pytest.mark.parametrize("epoch", [0, 1])
def test_processes_share_one_order(epoch):
    ranks = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        loader = DataLoader(list(range(90)), batch_size=3, sampler=ByLength(LENGTHS, 6, 5))
        shared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        shared.set_epoch(epoch)
        ranks.append([batch.tolist() for batch in shared])
    both = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
    assert sorted(both) == list(range(90))
    steps = [[LENGTHS[row] for batch in pair for row in batch] for pair in zip(*ranks, strict=True)]
    spread = sorted(max(step) - min(step) for step in steps)
    assert spread[len(spread) // 2] <= 30


def test_two_processes_pack_their_own_rows_of_a_stream_and_each_row_is_in_one_pack():
    given = []
    for rank in (0, 1):
        rows = Dataset.from_dict({"id": list(range(90))}).to_iterable_dataset(num_shards=2).shuffle(3, buffer_size=8)
        stream = pack_stream(rows, lambda rows: [LENGTHS[row["id"]] for row in rows], 100, mean_length=50.0)
        loader = DataLoader(stream, collate_fn=list)
        shared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        given.append([[row["id"] for row in item[PACK]] for items in shared for item in items])
    assert sorted(row for packs in given for numbers in packs for row in numbers) == list(range(90))
    filled = [sum(LENGTHS[row] for row in numbers) for packs in given for numbers in packs]
    assert max(filled) <= 100 and sum(filled) / len(filled) > 90
    assert abs(len(given[0]) - len(given[1])) <= 1, "as much work for both"


@pytest.fixture
def make(tmp_path, recipe_file, photos):
    """Strategy → a trainer of 240 rows, and what is said of them; answers have 1 to 24 words."""
    lines = [{"image": photos[k % 8], "caption": " ".join(["猫"] * (1 + k * 7 % 24)), "id": str(k)} for k in range(240)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def make(strategy: str, given: bool = True, **data):
        sft = {"output_dir": str(tmp_path / strategy), "learning_rate": 1e-3, "bf16": False, "report_to": "none",
               "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
               "train_sampling_strategy": strategy, "use_cpu": True, "save_strategy": "no"}  # fmt: skip
        source = {"path": str(file), "format": "caption"}
        recipe = load_recipe(recipe_file(sft=sft, data={"train": [source], "eval": [source], **data}))
        args, composed = build_sft_config(recipe), compose(recipe)
        collator = build_collator(recipe, composed.processor, args)
        rows = load_rows(recipe, collator, args, Console(quiet=True))
        rows = rows if given else RunRows(*rows[:3])
        return build_trainer(recipe, args, collator, rows, composed, lambda line: None)

    return make


def padding(trainer) -> tuple[float, list[int]]:
    """Share of padding in an epoch, and the lengths of its rows in order."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks), [
        n for m in masks for n in m.sum(1).tolist()
    ]


def test_a_run_pads_less_and_sees_every_row(make):
    grouped, random = make("group_by_length", measure_rows=5), make("random")
    share, lengths = padding(grouped)
    other, others = padding(random)
    assert sorted(lengths) == sorted(others) == sorted(grouped.lengths) and len(lengths) == 240
    assert random.lengths is None and share < other / 3, (share, other)
    # Known from the measurement of all rows; a trainer that is not told them measures for itself.
    alone = make("group_by_length", given=False)
    assert padding(alone) == (share, lengths) and alone.lengths == grouped.lengths
    sizes = [batch["attention_mask"].sum(1).tolist() for batch in grouped.get_eval_dataloader()]
    assert [n for batch in sizes for n in batch] == grouped.lengths  # evaluation keeps the order of the file


def test_lengths_are_those_of_the_mixture(make, tmp_path, photos):
    wrong = {"image": photos[0], "caption": "x" * 4000}  # too long, and left out
    file = tmp_path / "more.jsonl"
    rows = [{"image": photos[0], "caption": "a " * n} for n in (1, 30)] + [wrong, {"image": photos[1], "caption": "b"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sources = [
        {"path": str(tmp_path / "rows.jsonl"), "format": "caption"},
        {"path": str(file), "format": "caption", "repeat": 3},
    ]
    trainer = make("group_by_length", train=sources, sampling="sqrt", max_rejected=0.5)
    rows = trainer.train_dataset
    collator = trainer.data_collator
    assert trainer.lengths == [len(collator.encode(row, with_images=False).chat.input_ids) for row in rows]
    assert len({row["source"] for row in rows}) == 2


ROOM = 60
SOME = st.lists(st.integers(1, ROOM), max_size=60) | st.lists(st.sampled_from([7, 13, 20, 22, 30, 38]), max_size=60)


@given(lengths=SOME, seed=st.integers(-1, 2**40), epoch=st.integers(0, 3))
def test_an_epoch_of_packs_is_drawn_from_seed_and_epoch_alone(lengths, seed, epoch):
    found = []
    for _ in range(2):
        sampler = Packs(lengths, ROOM, seed)
        sampler.set_epoch(epoch)
        np.random.seed(len(found))  # the global one plays no part
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler) == len(pack(lengths, ROOM))
        assert sorted(row for rows in found[-1] for row in rows) == list(range(len(lengths)))
        assert all(sum(lengths[row] for row in rows) <= ROOM for rows in found[-1])
    assert found[0] == found[1]


def test_epochs_and_seeds_mix_rows_anew_and_without_a_seed_rows_keep_their_order():
    drawn = {}
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        sampler = Packs([length % 10 + 11 for length in LENGTHS], 128, seed)
        sampler.set_epoch(epoch)
        drawn[seed, epoch] = {frozenset(rows) for rows in sampler if len(rows) > 1}
    companions = list(drawn.values())
    assert all(len(a & b) < len(a) / 4 for a, b in zip(companions, companions[1:] + companions[:1], strict=True))
    ordered = list(Packs(LENGTHS, 128, None))
    assert [rows[0] for rows in ordered] == sorted(rows[0] for rows in ordered)
    assert all(rows == sorted(rows) for rows in ordered) and ordered == list(Packs(LENGTHS, 128, None))
