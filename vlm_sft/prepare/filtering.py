"""Keeps the rows whose text fits their image: `vlm-sft data filter`.

A model that was trained to match images and texts scores every row; rows below a threshold are left out, as BLIP's
CapFilt (arXiv:2201.12086, section 3.2) and the cleaning of Ziya's data do it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..base.errors import RowError, UserError
from ..base.limits import READERS, bounded, limits
from ..base.names import ImageEntry, Json, Row
from ..base.whole_files import read_bytes
from ..base.words import one_line, reason_of
from ..batch.pictures import BLANK, name_of, refused
from ..reading.images import grown_size, load_image, too_long
from ..reading.video import Films

# What of a row is compared with its image.
TEXTS: dict[str, tuple[str, ...]] = {"answers": ("assistant",), "all": ("user", "assistant")}
BINS = 40


class Score(NamedTuple):
    """What is known of a row.

    Attributes:
        id: The row's id.
        score: Higher fits better; of several images the mean; None for a row without an image.
        error: Why the row has no score, or None. It is never kept.
    """

    id: str
    score: float | None
    error: str | None


def score_rows(
    rows: Iterable[Row],
    scorer: Callable[[Sequence[Image.Image], Sequence[str]], list[float]],
    path: str | Path,
    about: Json,
    *,
    text: str = "answers",
    batch_size: int = 32,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Scores rows in batches, a line of a file each; lines that are there from an earlier run are not made again.

    Args:
        rows: Rows `{"messages", "images", "source", "id"}`.
        scorer: N images and N texts → N scores, as `scorer.Scorer`.
        path: JSONL file of scores.
        about: What the scores depend on (model, sources); its first line.
        text: A key of `TEXTS`.
        batch_size: Rows at a time.
        tick: Told how many rows have a score.

    Returns:
        One score a row, in order.

    Raises:
        UserError: The file cannot be written, or holds scores of other rows or of another model.
    """
    path = Path(os.path.expanduser(path))
    about = {**about, "text": text}
    found, size = _read_scores(path, about)
    todo = iter(rows)
    for there in found:
        row = next(todo, {"id": "no row"})
        if there.id != row["id"]:
            raise UserError(f"--scores {path} has {there.id!r} where the rows have {row['id']!r}: give another file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(size)
            if not size:
                file.write(_line(about))
            while batch := list(islice(todo, batch_size)):
                new = _scores_of(batch, scorer, TEXTS[text])
                file.write(b"".join(_line(score._asdict()) for score in new))
                file.flush()
                found += new
                tick(len(found))
    except OSError as error:
        raise UserError(f"--scores {path} cannot be written ({reason_of(error)}): make room.") from None
    return found


def _scores_of(batch: list[Row], scorer: Callable[..., list[float]], roles: Sequence[str]) -> list[Score]:
    """Scores of a batch; a broken image, or one that the model refuses, does not take the others with it."""
    images, texts, owners = [], [], []
    names: list[str] = []
    errors: dict[int, str] = {}
    for number, row in enumerate(batch):
        try:
            with Films() as films:
                opened = [_opened(image, row["id"], scorer, films) for image in row["images"]]
        except UserError as error:
            errors[number] = str(error)
            continue
        images += opened
        names += map(name_of, row["images"])
        texts += [text_of(row, roles)] * len(opened)
        owners += [number] * len(opened)
    values: dict[int, list[float]] = {}
    scores = score_pairs(scorer, images, texts, [(batch[n]["id"], name) for n, name in zip(owners, names, strict=True)])
    for owner, value in zip(owners, scores, strict=True):
        if isinstance(value, RowError):
            errors[owner] = str(value)
        else:
            values.setdefault(owner, []).append(value)
    means = {owner: sum(scores) / len(scores) for owner, scores in values.items() if owner not in errors}
    return [Score(row["id"], means.get(number), errors.get(number)) for number, row in enumerate(batch)]


def score_pairs(
    scorer: Callable[[Sequence[Image.Image], Sequence[str]], list[float]],
    images: Sequence[Image.Image],
    texts: Sequence[str],
    names: Sequence[tuple[str, str]],
) -> list[float | RowError]:
    """Scores pairs of a picture and a text; in place of a score stands why the model refuses a picture.

    Args:
        scorer: N images and N texts → N scores.
        images: One a pair.
        texts: Likewise.
        names: Where each picture is of, and its path or "".
    """
    try:
        return list(scorer(images, texts))
    except Exception as error:  # image processors raise anything, over the whole batch
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        if len(images) == 1:
            scorer([Image.new("RGB", BLANK)], texts)  # what fails on this too is no picture's fault
            return [refused(*names[0], images[0].size, "the scoring model", error)]
    alone = (score_pairs(scorer, images[n : n + 1], texts[n : n + 1], names[n : n + 1]) for n in range(len(images)))
    return [score for found in alone for score in found]


def _opened(image: ImageEntry, where: str, scorer: object, films: Films) -> Image.Image:
    """A picture that is not too long for the scorer."""
    loaded = load_image(image, where=where, films=films)
    check_grown(loaded, name_of(image), where, scorer)
    return loaded


def check_grown(loaded: Image.Image, name: str, where: str, scorer: object) -> None:
    """Looks that the scorer's image processor makes no more pixels of a picture than may be decoded.

    Raises:
        RowError: It does.
    """
    grown = grown_size(loaded.size, getattr(getattr(scorer, "processor", None), "image_processor", None))
    if grown[0] * grown[1] > (most := limits().image_pixels):
        raise too_long(where, name or "in the row", loaded, grown, most)


def text_of(row: Row, roles: Sequence[str]) -> str:
    """What some speakers of a row say, in one line."""
    said = [p["text"] for m in row["messages"] if m["role"] in roles for p in m["content"] if p.get("text")]
    return one_line(" ".join(said))


def _read_scores(path: Path, about: Json) -> tuple[list[Score], int]:
    """Scores of an earlier run, and the size of the file without a half-written last line.

    Raises:
        UserError: The file is about something else.
    """
    if not path.exists():
        return [], 0
    whole = [line for line in read_bytes(path).splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        first, *lines = [json.loads(bounded(line)) for line in whole] or [None]
        scores = [Score(line["id"], line["score"], line["error"]) for line in lines]
        if not all(map(_is_score, scores)):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--scores {path} is not a file of scores: give another name.") from None
    if first is not None and first != about:
        raise UserError(f"--scores {path} belongs to {_cut(first)}, not to {_cut(about)}: give another file.")
    return scores, sum(map(len, whole)) if first is not None else 0


def _is_score(score: Score) -> bool:
    """Whether a line holds what is written of a row; the file may be a stranger's."""
    number = score.score is None or (
        isinstance(score.score, int | float) and abs(score.score) <= READERS.score_magnitude
    )
    return number and isinstance(score.id, str) and isinstance(score.error, str | None)


def _cut(about: object) -> str:
    text = str(about)
    return text if len(text) <= 500 else f"{text[:497]}..."


def _line(value: Json) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def threshold_of_share(scores: Sequence[Score], keep: float) -> float:
    """The threshold that keeps a share (0 … 1] of the rows with a score.

    Raises:
        UserError: No row has a score.
    """
    values = _values(scores)
    return float(np.quantile(values, 1 - keep, method="lower"))


def kept_rows(rows: Iterable[Row], scores: Sequence[Score], threshold: float) -> Iterator[Row]:
    """The rows whose score is the threshold or more, and those without an image."""
    for row, score in zip(rows, scores, strict=True):
        if score.error is None and (score.score is None or score.score >= threshold):
            yield row


def draw_histogram(scores: Sequence[Score], path: str | Path, threshold: float | None = None, title: str = "") -> Path:
    """Draws how the scores are spread, and the threshold among them.

    Args:
        scores: One a row.
        path: PNG file to write.
        threshold: A line, and what lies below it paler.
        title: What was scored.

    Returns:
        `path`.

    Raises:
        UserError: No row has a score.
    """
    from matplotlib.figure import Figure

    values = _values(scores)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    counts, edges = np.histogram(values, BINS)
    bars = axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#3b6ea5")
    axis.set_xlabel("score")
    axis.set_ylabel("rows")
    axis.spines[["top", "right"]].set_visible(False)
    if threshold is not None:
        for left, bar in zip(edges, bars, strict=False):
            bar.set_alpha(0.3 if left < threshold else 1.0)
        share = float((values >= threshold).mean())
        axis.axvline(threshold, color="#c0392b", label=f"threshold {threshold:.4g} keeps {share:.1%}")
        axis.legend(frameon=False)
    axis.set_title(title, fontsize=11)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


def _values(scores: Sequence[Score]) -> np.ndarray:
    values = np.array([score.score for score in scores if score.score is not None])
    if not len(values):
        raise UserError("No row has a score: none has an image that can be read.")
    return values
