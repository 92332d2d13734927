"""Answers in TensorBoard, read back from its file, and as tables through the modules that other callbacks hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from vlm_sft.during.trackers import show_in_trackers

RECORD = {"step": 3, "id": "a/1", "question": "这是什么?\n<b>x</b>", "answers": ["猫", "猫"], "answer": "cat"}
FAILED = {"step": 3, "id": "a/2", "question": "?", "answers": ["x"], "answer": "", "error": "damaged"}


def test_tensorboard_has_texts_at_each_step_and_pictures_once(tmp_path, photos):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    callback = TensorBoardCallback(SummaryWriter(str(tmp_path)))
    said: list[str] = []
    images = [[{"path": photos[0], "bytes": None}], [{"path": str(tmp_path / "gone.png"), "bytes": None}]]
    for step, first in ((0, True), (3, False)):
        show_in_trackers([object(), callback], [RECORD, FAILED], images, step, first, said.append)
    callback.tb_writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["images"] == ["samples/a/1"] and len(found.Images("samples/a/1")) == 1
    texts = found.Tensors("samples/a/1/text_summary")
    assert [each.step for each in texts] == [0, 3] and not said
    text = texts[1].tensor_proto.string_val[0].decode()
    assert "    这是什么?\n    <b>x</b>" in text and "    cat" in text
    assert "not asked: damaged" in found.Tensors("samples/a/2/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("kind", [WandbCallback, TrackioCallback])
def test_other_trackers_get_a_table(kind, photos):
    logged, rows = [], []

    class Table:
        def __init__(self, columns, data=()):
            rows.extend(data)

        def add_data(self, *values):
            rows.append(list(values))

    module = SimpleNamespace(Table=Table, Image=lambda picture: picture.size, log=logged.append, run=object())
    callback = kind.__new__(kind)  # whose package is not installed here
    callback._wandb = callback._trackio = module
    show_in_trackers([callback], [RECORD], [[{"path": photos[0], "bytes": None}]], 3, True, print)
    assert rows[0][:5] == [3, "a/1", "这是什么?\n<b>x</b>", "猫", "cat"]
    assert logged[0]["train/global_step"] == 3 and isinstance(logged[0]["samples"], Table)


def test_a_tracker_that_fails_ends_nothing():
    callback = TrackioCallback.__new__(TrackioCallback)
    callback._trackio = None
    said: list[str] = []
    show_in_trackers([callback], [RECORD], [[]], 3, True, said.append)
    assert len(said) == 1 and said[0].startswith("TrackioCallback did not take the answers of step 3: ")
