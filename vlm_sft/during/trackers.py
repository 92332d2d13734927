"""Answers in what the run reports to: as text and pictures in TensorBoard, as tables in Weights & Biases and trackio.

Each goes through the callback of transformers that the run has anyway, so that it lies in the same run there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..base.errors import UserError
from ..base.names import Record
from ..base.words import one_line
from ..reading.images import load_image

COLUMNS = ["step", "id", "question", "right", "answer"]
Records = Sequence[Record]
Images = Sequence[Sequence[Any]]
SIDE = 448  # pixels of a picture's longer side


def show_in_trackers(
    callbacks: Iterable[object],
    records: Records,
    images: Images,
    step: int,
    first: bool,
    say: Callable[[str], None],
) -> None:
    """Hands answers to the trackers among the callbacks of a trainer.

    Args:
        callbacks: Those of the trainer.
        records: As `samples` has them, of one step.
        images: Of each.
        step: Which.
        first: Whether nothing was handed over before: pictures do not change.
        say: Told what a tracker did not take: training goes on without it.
    """
    for callback in callbacks:
        for kind, show in SHOWN_BY.items():
            if isinstance(callback, kind):
                try:
                    show(callback, records, images, step, first)
                except Exception as error:  # whatever a tracker raises, hours of training must not end on it
                    say(f"{kind.__name__} did not take the answers of step {step:,}: {one_line(error)}")


def _tensorboard(callback: TensorBoardCallback, records: Records, images: Images, step: int, first: bool) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    for record, shown in zip(records, images, strict=True):
        writer.add_text(f"samples/{record['id']}", _in_markdown(record), step)
        for number, picture in enumerate(_pictures(shown) if first else ()):
            name = f"samples/{record['id']}" + (f"/{number}" if number else "")
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    writer.flush()


def _in_markdown(record: Record) -> str:
    lines = [("question", record["question"]), ("right", _right(record)), ("answer", _said(record))]
    # Indented text is shown as it is: a row is a stranger's words, and the page would take them for marks.
    return "\n\n".join(f"{name}:\n\n" + "\n".join(f"    {line}" for line in text.split("\n")) for name, text in lines)


def _row(record: Record, step: int) -> list[Any]:
    return [step, record["id"], record["question"], _right(record), _said(record)]


def _right(record: Record) -> str:
    return " / ".join(dict.fromkeys(record["answers"]))


def _said(record: Record) -> str:
    return f"not asked: {record['error']}" if "error" in record else str(record["answer"])


def _wandb(callback: WandbCallback, records: Records, images: Images, step: int, first: bool) -> None:
    wandb = callback._wandb
    if wandb is None or wandb.run is None:
        return
    table = wandb.Table(columns=[*COLUMNS, "pictures"])
    for record, shown in zip(records, images, strict=True):
        table.add_data(*_row(record, step), [wandb.Image(picture) for picture in _pictures(shown)])
    wandb.log({"samples": table, "train/global_step": step})


def _trackio(callback: TrackioCallback, records: Records, images: Images, step: int, first: bool) -> None:
    trackio = callback._trackio
    table = trackio.Table(columns=COLUMNS, data=[_row(record, step) for record in records])
    trackio.log({"samples": table, "train/global_step": step})


def _pictures(images: Sequence[Any]) -> list[Any]:
    """The pictures of a row, small; those that cannot be read are left out, and the record says so."""
    found = []
    for image in images:
        try:
            picture = load_image(image)
        except UserError:
            continue
        picture.thumbnail((SIDE, SIDE))
        found.append(picture)
    return found


SHOWN_BY: dict[type, Callable[[Any, Records, Images, int, bool], None]] = {
    TensorBoardCallback: _tensorboard,
    WandbCallback: _wandb,
    TrackioCallback: _trackio,
}
"""Callback of transformers → how it is given answers."""
