"""Sums between two logs: numbers of the host and of a device together, read once; rows go into their ledger."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from support.waits import Waits
from vlm_sft.base.errors import UserError
from vlm_sft.data.ledger import Ledger, SourceLedger
from vlm_sft.model.losses import VLMOutput
from vlm_sft.training.meters import COUNTERS, Meters, RowsMet

ALONE = SimpleNamespace(num_processes=1, is_main_process=True)


def batch(tokens):
    mask = torch.ones(2, tokens, dtype=torch.long)
    return {"input_ids": mask, "attention_mask": mask}


def test_numbers_of_host_and_device_are_added_and_read_at_once():
    meters = Meters(ALONE)
    with Waits() as waits:
        for hits in ([True, False], [True, True, True]):
            meters.add_batch("train", batch(5), VLMOutput(token_hits=torch.tensor(hits)))
        assert not waits.ours, "adding asks for nothing"
        own = meters.own("train")
        assert waits.ours == {"meters.own: tolist": 1}
    assert own.keys() == set(COUNTERS) and json.loads(json.dumps(own)) == own
    assert [own[name] for name in ("hits", "supervised", "tokens", "samples", "loss")] == [4, 5, 20, 4, 0]


def test_what_a_checkpoint_held_is_gone_on_with():
    meters, whole = Meters(ALONE), Meters(ALONE)
    meters.add_batch("train", batch(5), VLMOutput(token_hits=torch.tensor([True])))
    saved = json.loads(json.dumps(meters.own("train")))
    again = Meters(ALONE)
    again.sums["train"] = saved
    for each in (again, whole):
        each.add_batch("train", batch(3), VLMOutput(token_hits=torch.tensor([False])))
    whole.add_batch("train", batch(5), VLMOutput(token_hits=torch.tensor([True])))
    assert again.own("train") == whole.own("train")


def test_millions_of_tokens_are_counted_to_the_last():
    meters = Meters(ALONE)
    meters.add("train", tokens=torch.tensor(2**24), hits=torch.tensor(1.0))
    meters.add("train", tokens=torch.tensor(1), hits=torch.tensor(2**24))
    assert meters.own("train")["tokens"] == 2**24 + 1


def test_a_log_gets_its_metrics_and_the_sums_begin_anew():
    meters = Meters(ALONE)
    meters.add_batch("train", batch(5), VLMOutput(token_hits=torch.tensor([True, False])))
    meters.add("train", wait_seconds=1.0, step_seconds=3.0)
    logs = {"loss": 1.0, "learning_rate": 0.1}
    meters.enter(logs, "train", [{"part": "projector", "lr": 0.1}, {"part": "lora", "lr": 0.2}])
    assert logs == {
        "loss": 1.0, "learning_rate": 0.1, "learning_rate_projector": 0.1, "learning_rate_lora": 0.2,
        "token_accuracy": 0.5, "tokens_per_second": 2.5, "samples_per_second": 0.5, "data_wait_share": 0.25,
        "padding_share": 0.0,
    }  # fmt: skip
    meters.enter(empty := {"loss": 1.0}, "train", [])
    assert empty == {"loss": 1.0}


def test_rows_that_batches_lost_go_into_the_ledger_and_too_many_stop_the_run(capsys):
    met, notes = RowsMet(ALONE), {}
    ledger = Ledger(0.3, {"s": SourceLedger(read=8)})
    data = {"rejected_rows": [("s", "s/2", "image damaged", "It is broken.")], "seen_rows": {"s": 4}, "x": 1}
    met.take(data)
    assert data == {"x": 1}
    met.enter("train", ledger, notes)
    assert notes["train"]["sources"]["s"]["rejected"] == {"image damaged": 1} and met.rejected == []
    met.enter("train", ledger, notes)
    assert notes["train"]["sources"]["s"]["rejected"] == {"image damaged": 1}, "nothing new"
    for i in range(3, 7):
        met.take({"rejected_rows": [("s", f"s/{i}", "image damaged", "坏了")]})
    with pytest.raises(UserError, match=r"max_rejected"):
        met.enter("train", ledger, notes)
