"""Held-out rows → questions → answers → how many are exactly right, and how many of them without the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..base.console import make_console
from ..base.errors import UserError
from ..base.progress import RowProgress
from .metrics import exact_match

if TYPE_CHECKING:
    from torch import nn

    from ..batch.processor import VLMProcessor
    from ..recipe.sections import Source


@dataclass
class Question:
    """What is asked of some images, with every answer that is right.

    Rows that ask the same of the same images are one question: two captions of a photo, or one in English and one in
    Chinese, are two right answers.
    """

    messages: list[dict[str, Any]]
    images: list[dict[str, Any]]
    references: list[str] = field(default_factory=list)
    id: str = ""


def measure(
    model: nn.Module,
    processor: VLMProcessor,
    sources: Sequence[Source],
    batch_size: int = 32,
    max_rows: int | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers every question of some sources and compares.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        sources: Sources of the format `caption` count as captions, all others as answers, one kind a source.
        batch_size: Questions at a time.
        max_rows: Only the first so many rows of each source.
        options: For `generate`.

    Returns:
        `caption_exact_match`, `answer_accuracy`, `answer_accuracy_blank_image` (None where nothing measures them),
        `answer_accuracy_by_kind` (source name → accuracy), `questions` (how many), and `wrong` (the first wrong answers
        of each kind, to look at).
    """
    return score(model, processor, collect(sources, max_rows), batch_size, options or {})


def collect(sources: Sequence[Source], max_rows: int | None = None) -> dict[str | None, list[Question]]:
    """Questions by kind: the name of their source, and None for captions, whose sources may share their images.

    Raises:
        UserError: A source cannot be read, an image is missing, or a row has no answer to compare with.
    """
    from ..data.dataset import load_source
    from ..data.formats import FORMATS
    from ..data.image_files import check_images

    questions: dict[str | None, list[Question]] = {}
    for source in sources:
        limit = min(filter(None, (source.max_rows, max_rows)), default=None)
        rows = load_source(source.model_copy(update={"max_rows": limit}))
        check_images(rows)
        questions.setdefault(None if FORMATS[source.format].prompts == "caption" else source.name, []).extend(
            gather(rows)
        )
    return questions


def score(
    model: nn.Module,
    processor: VLMProcessor,
    questions: dict[str | None, list[Question]],
    batch_size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Asks the questions of `collect` and compares; see `measure`."""
    captions: list[bool] = []
    answers: dict[str, list[bool]] = {}
    blank: list[bool] = []
    wrong: dict[str, Any] = {"captions": [], "answers": {}}
    merged = {kind: merge(asked, processor) for kind, asked in questions.items()}
    total = sum(len(asked) * (1 if kind is None else 2) for kind, asked in merged.items())
    with RowProgress(make_console(), "evaluation") as progress:
        tick = progress.counter("asked", total, "questions")
        for kind, asked in merged.items():
            given = ask(model, processor, asked, batch_size, options, tick)
            hits = _compare(given, asked)
            if kind is None:
                captions, wrong["captions"] = hits, _wrong(asked, given, hits)
                continue
            answers[kind], wrong["answers"][kind] = hits, _wrong(asked, given, hits)
            blank += _compare(ask_blindly(model, processor, asked, given, batch_size, options, tick), asked)
    everything = [hit for hits in answers.values() for hit in hits]
    sees = any(question.images for kind, asked in merged.items() if kind is not None for question in asked)
    return {
        "caption_exact_match": _share(captions),
        "answer_accuracy": _share(everything),
        "answer_accuracy_blank_image": _share(blank) if sees else None,
        "answer_accuracy_by_kind": {kind: _share(hits) for kind, hits in answers.items()},
        "questions": {"captions": len(captions), "answers": {kind: len(hits) for kind, hits in answers.items()}},
        "wrong": wrong,
    }


def gather(rows: Iterable[dict[str, Any]]) -> list[Question]:
    """Rows → questions; the last answer of a row is its reference."""
    questions = []
    for row in rows:
        if row["messages"][-1]["role"] != "assistant":
            raise UserError(f"row {row['id']}: its last message is no answer to compare with; end it with one.")
        reference = "".join(part["text"] or "" for part in row["messages"][-1]["content"])
        questions.append(Question(row["messages"][:-1], row["images"], [reference], str(row["id"])))
    return questions


def merge(questions: Sequence[Question], processor: VLMProcessor) -> list[Question]:
    """Makes one question of those whose prompt (as the template renders it) and images are the same."""
    merged: dict[tuple[Any, ...], Question] = {}
    for question in questions:
        prompt = processor.render(question.messages, add_generation_prompt=True).text
        key = (prompt, *[image["bytes"] or image["path"] for image in question.images])
        first = merged.setdefault(key, Question(question.messages, question.images, [], question.id))
        first.references += [reference for reference in question.references if reference not in first.references]
    return list(merged.values())


def ask(
    model: nn.Module,
    processor: VLMProcessor,
    questions: Sequence[Question],
    batch_size: int,
    options: dict[str, Any],
    tick: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One answer a question, in order; `tick` is told how many were answered since the last time."""
    from .generation import answer

    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = [
            {"messages": q.messages, "images": q.images, "id": q.id} for q in questions[start : start + batch_size]
        ]
        answers += answer(model, processor, batch, **options)  # type: ignore[arg-type]
        tick(len(batch))
    return answers


def ask_blindly(
    model: nn.Module,
    processor: VLMProcessor,
    questions: Sequence[Question],
    given: Sequence[str],
    batch_size: int,
    options: dict[str, Any],
    tick: Callable[[int], None],
) -> list[str]:
    """Answers with every image blanked.

    A question without an image keeps the answer that was given, so that both accuracies are over the same questions.
    """
    seeing = [i for i, question in enumerate(questions) if question.images]
    blind = ask(model, processor, [without_image(questions[i]) for i in seeing], batch_size, options, tick)
    answers = list(given)
    for i, text in zip(seeing, blind, strict=True):
        answers[i] = text
    tick(len(questions) - len(seeing))
    return answers


def without_image(question: Question) -> Question:
    """The same question about grey images."""
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    return Question(question.messages, [grey] * len(question.images), question.references, question.id)  # type: ignore[list-item]


def _compare(answers: Sequence[str], questions: Sequence[Question]) -> list[bool]:
    return [exact_match(answer, question.references) for answer, question in zip(answers, questions, strict=True)]


def _wrong(questions: Sequence[Question], answers: Sequence[str], hits: Sequence[bool]) -> list[dict[str, Any]]:
    """The first three wrong answers."""
    missed = [(q, answer) for q, answer, hit in zip(questions, answers, hits, strict=True) if not hit]
    return [{"id": q.id, "answer": answer, "right": q.references} for q, answer in missed[:3]]


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None
