"""Held-out rows → questions → answers → how many are right, by the metric of their format, and without the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.console import make_console
from ..base.errors import RowError, UserError, raise_it
from ..base.names import ImageEntry, Json, Options, Record, Row
from ..base.progress import RowProgress
from ..metrics.table import EXACT_MATCH, METRICS, Metric
from ..rows.messages import Message

if TYPE_CHECKING:
    from torch import nn

    from ..batch.processor import VLMProcessor
    from ..recipe.sections import Source


@dataclass
class Question:
    """What is asked of some images, with every answer that is right.

    Rows that ask the same of the same images are one question: two captions of a photo, or one in English and one in
    Chinese, are two right answers. Only in a benchmark, which has a metric of its own, every row counts for itself.

    Attributes:
        messages: Up to the question.
        images: As the row has them.
        references: Right answers; of `vqav2` those of all annotators, alike ones too.
        id: Of the row.
        format: Of its source.
        refused: Why it cannot be asked, or "".
        answer: The message that is right, where it has boxes, whose text is known when a model writes them.
    """

    messages: list[Message]
    images: list[ImageEntry]
    references: list[str] = field(default_factory=list)
    id: str = ""
    format: str = ""
    refused: str = ""
    answer: Record | None = None


class Answers(NamedTuple):
    """The answers to the questions of one kind.

    Attributes:
        kind: Name of their source; None for captions.
        metric: What the scores are by.
        questions: What was asked.
        given: What the model said to each.
        scores: Of each.
        blind: What it said to grey images; None where that was not asked.
        blind_scores: Of each.
    """

    kind: str | None
    metric: str
    questions: list[Question]
    given: list[str]
    scores: list[float]
    blind: list[str] | None = None
    blind_scores: list[float] | None = None


FEWEST_ANSWERS = 4  # with fewer, VQA accuracy gives no answer full marks: three of the others must agree with it


def collect(
    sources: Sequence[Source], max_rows: int | None = None, lenient: bool = False
) -> dict[str | None, list[Question]]:
    """Questions by kind: the name of their source, and None for captions, whose sources may share their images.

    Args:
        sources: Where the rows are.
        max_rows: Only the first so many of each.
        lenient: Wrong rows are left out, which a run counts in its ledger.

    Raises:
        UserError: A source cannot be read; unless `lenient`, an image is missing or a row has no answer.
    """
    from ..data.dataset import load_source
    from ..data.image_files import check_images, missing_images
    from ..data.source import every_answer
    from ..rows.formats import FORMATS

    questions: dict[str | None, list[Question]] = {}
    for source in sources:
        limit = min(filter(None, (source.max_rows, max_rows)), default=None)
        first = source.model_copy(update={"max_rows": limit})
        rows = load_source(first, reject=(lambda error: None) if lenient else raise_it)
        gone: dict[str, str] = {}
        if lenient:
            _, gone = missing_images(rows)
        else:
            check_images(rows)
        whole = (row for row in rows if not any(image["path"] in gone for image in row["images"]))
        found = gather((row for row in whole if _ends_with_answer(row) or not lenient), source.format)
        if source.format == "vqav2":  # its metric wants the answers of all annotators, a row has the most frequent
            answers = every_answer(first)
            for question in found:
                question.references = answers[question.id]
                if len(question.references) < FEWEST_ANSWERS:
                    raise UserError(
                        f"row {question.id}: VQA accuracy compares an answer with those of ten annotators, and here "
                        f"are {len(question.references)}: name the annotations with all of them."
                    )
        questions.setdefault(None if FORMATS[source.format].prompts == "caption" else source.name, []).extend(found)
    return questions


def score(
    model: nn.Module,
    processor: VLMProcessor,
    questions: dict[str | None, list[Question]],
    batch_size: int,
    options: Options,
    keep: Callable[[Answers], None] = lambda answers: None,
) -> Json:
    """Asks a model, in evaluation mode, the questions of `collect` and compares.

    Args:
        model: The model.
        processor: Its processor.
        questions: By kind; those of the kind None are captions.
        batch_size: Questions at a time.
        options: For `generate`.
        keep: Given the answers of each kind.

    Returns:
        `caption_exact_match`, `answer_accuracy`, `answer_accuracy_blank_image` (None where nothing measures them),
        `answer_accuracy_by_kind` and `answer_accuracy_blank_image_by_kind` (source name → accuracy), `metrics_by_kind`
        (source name → metric → its mean, where the format has metrics of its own: the accuracy is then the first of
        them), `questions` (how many), `wrong` (the first wrong answers of each kind, to look at) and, where some could
        not be asked because of their pictures and are wrong, `refused` (how many `questions`, and why the `first`).
    """
    captions: list[float] = []
    answers: dict[str, dict[str, list[float]]] = {}
    blank: dict[str, list[float]] = {}
    wrong: Json = {"captions": [], "answers": {}}
    merged = {kind: merge(asked, processor) for kind, asked in questions.items()}
    total = sum(len(asked) * (1 if kind is None else 2) for kind, asked in merged.items())
    with RowProgress(make_console(), "evaluation") as progress:
        tick = progress.counter("asked", total, "questions")
        for kind, asked in merged.items():
            metrics = METRICS.get(asked[0].format, EXACT_MATCH)
            given = ask(model, processor, asked, batch_size, options, tick, True)
            scores = _by_metric(metrics, given, asked)
            accuracy, hits = next(iter(scores.items()))
            if kind is None:
                captions, wrong["captions"] = hits, _wrong(asked, given, hits)
                keep(Answers(None, accuracy, asked, given, hits))
                continue
            answers[kind], wrong["answers"][kind] = scores, _wrong(asked, given, hits)
            blindly = ask_blindly(model, processor, asked, given, batch_size, options, tick)
            blank[kind] = _compare(metrics[accuracy], blindly, asked)
            keep(Answers(kind, accuracy, asked, given, hits, blindly, blank[kind]))
    hits_by_kind = {kind: next(iter(scores.values())) for kind, scores in answers.items()}
    refused = [question.refused for asked in merged.values() for question in asked if question.refused]
    seeing = [kind for kind in blank if any(question.images for question in merged[kind])]
    return {
        "caption_exact_match": _share(captions),
        "answer_accuracy": _share([hit for hits in hits_by_kind.values() for hit in hits]),
        "answer_accuracy_blank_image": _share([hit for hits in blank.values() for hit in hits]) if seeing else None,
        "answer_accuracy_by_kind": {kind: _share(hits) for kind, hits in hits_by_kind.items()},
        "answer_accuracy_blank_image_by_kind": {kind: _share(blank[kind]) for kind in seeing},
        "metrics_by_kind": _own_metrics(answers),
        "questions": {"captions": len(captions), "answers": {kind: len(hits) for kind, hits in hits_by_kind.items()}},
        "wrong": wrong,
        **({"refused": {"questions": len(refused), "first": refused[0]}} if refused else {}),
    }


def _by_metric(
    metrics: dict[str, Metric], answers: Sequence[str], questions: Sequence[Question]
) -> dict[str, list[float]]:
    """Scores of each metric of a format; of `vcr` also of answers, of reasons, and of rows of which both are right."""
    scores = {name: _compare(metric, answers, questions) for name, metric in metrics.items()}
    if questions[0].format != "vcr":
        return scores
    found: dict[str, dict[str, float]] = {"q2a": {}, "qa2r": {}}
    for question, hit in zip(questions, scores["VCR_accuracy"], strict=True):
        found[question.messages[-1]["choices"]["task"]][question.id.rpartition("#")[0]] = hit
    right, reasoned = found["q2a"], found["qa2r"]
    both = [right[row] * reasoned[row] for row in right if row in reasoned]
    return scores | {"Q2A": list(right.values()), "QA2R": list(reasoned.values()), "Q2AR": both}


def _own_metrics(answers: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float | None]]:
    own = {kind: scores for kind, scores in answers.items() if scores.keys() != EXACT_MATCH.keys()}
    return {kind: {name: _share(hits) for name, hits in scores.items()} for kind, scores in own.items()}


def gather(rows: Iterable[Row], format: str = "") -> list[Question]:  # noqa: A002
    """Rows → questions; the last answer of a row is its reference."""
    from ..rows.messages import has_boxes, unpacked

    questions = []
    for row in map(unpacked, rows):
        if not _ends_with_answer(row):
            raise UserError(f"row {row['id']}: its last message is no answer to compare with; end it with one.")
        *asked, answer = row["messages"]
        reference = "".join(part["text"] or "" for part in answer["content"])
        boxed = answer if has_boxes([answer]) else None
        questions.append(Question(asked, row["images"], [reference], str(row["id"]), format, answer=boxed))
    return questions


def _ends_with_answer(row: Row) -> bool:
    return bool(row["messages"][-1]["role"] == "assistant")


def merge(questions: Sequence[Question], processor: VLMProcessor) -> list[Question]:
    """Makes one question of those whose prompt (as the template renders it) and images are the same; see `Question`."""
    questions = [_written(question, processor) for question in questions]
    if questions and questions[0].format in METRICS:
        return questions
    merged: dict[tuple[Any, ...], Question] = {}
    prompts = _prompts(questions, processor)
    for question, prompt in zip(questions, prompts, strict=True):
        key = (prompt, *[(image["bytes"] or image["path"], image.get("time")) for image in question.images])
        first = merged.setdefault(key, replace(question, references=[]))
        first.references += [reference for reference in question.references if reference not in first.references]
    return list(merged.values())


def _written(question: Question, processor: VLMProcessor) -> Question:
    """A question with its boxes, and those of its answer, as this model writes them."""
    from ..batch.box_text import write_boxes

    messages = [*question.messages, *([question.answer] if question.answer else [])]
    written = list(write_boxes(processor, messages, question.images, f"row {question.id}"))
    if question.answer is None:
        return replace(question, messages=written)
    *asked, answer = written
    return replace(question, messages=asked, references=["".join(part["text"] or "" for part in answer["content"])])


def _prompts(questions: Sequence[Question], processor: VLMProcessor) -> list[str]:
    """What the template makes of each question."""
    from ..templates.process import asked_ahead

    renders = [partial(processor.render, question.messages, add_generation_prompt=True) for question in questions]
    with asked_ahead(renders):
        return [render().text for render in renders]


def ask(
    model: nn.Module,
    processor: VLMProcessor,
    questions: Sequence[Question],
    batch_size: int,
    options: Options,
    tick: Callable[[int], None] = lambda done: None,
    confidence: bool = False,
) -> list[str]:
    """One answer a question, in order; `tick` is told how many were answered since the last time.

    With `confidence` each is a `Said` that knows how sure the model was. The answer to a question that cannot be asked,
    because of its pictures, is "", and `refused` then says why.
    """
    from ..inference.generation import answer_each

    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        rows = [{"messages": q.messages, "images": q.images, "id": q.id} for q in batch]
        said = answer_each(model, processor, rows, confidence=confidence, **options)  # type: ignore[arg-type]
        for question, found in zip(batch, said, strict=True):
            question.refused = str(found) if isinstance(found, RowError) else ""
            answers.append("" if isinstance(found, RowError) else found)
        tick(len(batch))
    return answers


def ask_blindly(
    model: nn.Module,
    processor: VLMProcessor,
    questions: Sequence[Question],
    given: Sequence[str],
    batch_size: int,
    options: Options,
    tick: Callable[[int], None],
) -> list[str]:
    """Answers with every image blanked.

    A question without an image, or that cannot be asked with its own, keeps the answer that was given, so that both
    accuracies are over the same questions. Questions that differ in their images alone are one question then, and are
    asked once, unless answers are drawn.
    """
    from ..inference.settings import SAMPLING  # imported here, because it loads transformers

    alike: dict[tuple[Any, ...], list[int]] = {}
    drawn = options.get("do_sample") or SAMPLING.keys() & options.keys()
    asked = [i for i, question in enumerate(questions) if question.images and not question.refused]
    for i, prompt in zip(asked, _prompts([questions[i] for i in asked], processor), strict=True):
        alike.setdefault((i,) if drawn else (prompt, len(questions[i].images)), []).append(i)
    first = [without_image(questions[same[0]]) for same in alike.values()]
    answers = list(given)
    for text, same in zip(ask(model, processor, first, batch_size, options, tick), alike.values(), strict=True):
        for i in same:
            answers[i] = text
    tick(len(questions) - len(first))
    return answers


def without_image(question: Question) -> Question:
    """The same question about grey images."""
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    return replace(question, images=[grey] * len(question.images))  # type: ignore[list-item]


def _compare(metric: Metric, answers: Sequence[str], questions: Sequence[Question]) -> list[float]:
    return [metric(answer, question.references) for answer, question in zip(answers, questions, strict=True)]


def _wrong(questions: Sequence[Question], answers: Sequence[str], hits: Sequence[float]) -> list[Record]:
    """The first three wrong answers."""
    missed = [(q, answer) for q, answer, hit in zip(questions, answers, hits, strict=True) if not hit]
    return [{"id": q.id, "answer": answer, "right": list(dict.fromkeys(q.references))} for q, answer in missed[:3]]


def _share(hits: Sequence[float]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None
