"""`vlm-sft answer` and `vlm-sft match`: asks a published encoder, one picture at a time or a file of questions."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from ..base.console import make_console, tell
from ..base.errors import UserError
from ..base.names import MANIFEST, Record, Row
from ..base.progress import waiting
from ..base.whole_files import write_whole
from ..base.words import one_line, reason_of
from ..batch.pictures import Pictures, check_pictures, read_pictures
from ..bundle.hub import find_bundle
from ..bundle.load import load
from ..encoders.answers import read_answer_list
from ..encoders.ask import draw, find, match
from ..encoders.encoder import Answer, Encoder
from ..encoders.load import load_answerer
from ..encoders.processor import EncoderProcessor
from ..encoders.vle import load_vle
from ..pieces.checkpoints import fetch_file
from .answer_file import Asker, answer_questions
from .questions import QuestionRow, conversation

if TYPE_CHECKING:
    from rich.console import Console


class Asked(NamedTuple):
    """A question that was answered.

    Attributes:
        line: What is written of it: its columns, `answer` (the likeliest) and `top_answers`, `[[answer, share], …]`.
        text: The question.
        image: What it is about.
        where: Its row in words.
    """

    line: Record
    text: str
    image: Image.Image
    where: str


Next = Callable[[Sequence[Asked]], None]
"""What goes on with answers, and changes their lines."""


def answer_one(
    model: str, question: str, image: str, top: int, candidates: str | None = None, tokenizer: str | None = None
) -> list[Record]:
    """Prints the likeliest answers to a question about an image, a line each: share, tab, answer; returns them.

    Raises:
        UserError: The model, the question or the image is wrong.
    """
    found = answer_with(model, question, image, top, candidates, tokenizer).line["top_answers"]
    for answer, share in found:
        tell(f"{share:.4f}\t{one_line(answer)}")
    return [{"answer": answer, "score": share} for answer, share in found]


def answer_with(
    model: str, question: str, image: str, top: int, candidates: str | None = None, tokenizer: str | None = None
) -> Asked:
    """The likeliest answers to a question about an image; see `answer_many`.

    Raises:
        UserError: The model, the question or the image is wrong.
    """
    question = _given(question, "the question")
    among = read_candidates(candidates)
    with waiting(make_console(), f"Loading {model}"):
        encoder, known = _open(model, tokenizer)
    encoder.text_inputs([question])
    pictures = _picture(encoder, image)
    (answers,) = encoder.answers(pictures, [question], top, among or known)
    return Asked(_told(answers), question, pictures[0], image)


def _told(answers: Sequence[Answer]) -> Record:
    return {"answer": answers[0].answer, "top_answers": [[each.answer, round(each.score, 6)] for each in answers]}


def answer_many(
    model: str,
    input: str,  # noqa: A002
    output: str,
    top: int,
    batch_size: int,
    images: str | None = None,
    image_folders: Sequence[str] = (),
    candidates: str | None = None,
    tokenizer: str | None = None,
    open_next: Callable[[], Next] | None = None,
) -> Record:
    """Answers a file of questions into a JSONL file; a rerun goes on.

    Args:
        model: Bundle, folder or Hub id of a VLE or an mPLUG for VQA, or an mPLUG's weight file.
        input: As for `generate`: each row one question and one image.
        output: Each row becomes a line: its columns, `answer` (the likeliest) and `top_answers`,
            `[[answer, share], …]`.
        top: How many answers a row gets.
        batch_size: Rows at a time.
        images: Folder that relative image paths start from; default that of the input.
        image_folders: Further folders in which images may lie.
        candidates: File of the answers to choose from, as `read_candidates` reads it.
        tokenizer: Folder or Hub id of an mPLUG's tokenizer, where it brings none.
        open_next: Loads what goes on with the answers.

    Returns:
        As `answer_questions`.

    Raises:
        UserError: As `generate`.
    """

    among = read_candidates(candidates)

    def open_asker(console: Console) -> Asker:
        encoder, known = _open(model, tokenizer)
        ask = partial(encoder.answers, top=top, candidates=among or known)
        go_on = open_next() if open_next is not None else None
        return lambda batch: _answer_rows(encoder, ask, batch, images, image_folders, go_on)

    return answer_questions(input, output, open_asker, batch_size, images)


def _open(model: str, tokenizer: str | None) -> tuple[Encoder, Sequence[str]]:
    """A published model or that of a bundle, and the answers among which it is asked where nobody names others.

    Raises:
        UserError: It cannot be had, or a bundle's model writes.
    """
    if fetch_file(model, MANIFEST, None, "MODEL", required=False) is None:
        return load_answerer(model, tokenizer), ()
    folder = find_bundle(model)
    trained, processor = load(folder)
    if not isinstance(processor, EncoderProcessor):
        raise UserError(f"{model!r} writes its answers; ask it with `vlm-sft chat` or `vlm-sft generate`.")
    return processor.asker(trained), processor.candidates  # type: ignore[arg-type]


def _answer_rows(
    encoder: Encoder,
    ask: Callable[[list[Image.Image], list[str]], list[list[Answer]]],
    batch: Sequence[QuestionRow],
    images: str | None,
    folders: Sequence[str],
    go_on: Next | None,
) -> list[Record]:
    """One line a row; a row that cannot be asked has its `error`, and the others are answered."""
    lines: list[Record] = []
    asked: list[Asked] = []
    for question in batch:
        line, where = question.kept(), question.row.where
        lines.append(line)
        try:
            text, image = _one_question(conversation(question, images, folders), where)
            check_pictures(encoder, Pictures([image], where=where))
            encoder.text_inputs([text])
            asked.append(Asked(line, text, image, where))
        except UserError as error:
            line["error"] = str(error)
    if asked:
        found = ask([each.image for each in asked], [each.text for each in asked])
        for each, answers in zip(asked, found, strict=True):
            each.line.update(_told(answers))
        if go_on is not None:
            go_on(asked)
    return lines


def read_candidates(path: str | None) -> list[str]:
    """Answers to choose from: a JSON list of texts, or a text file with one a line; none without a file.

    Raises:
        UserError: The file cannot be read, or holds none.
    """
    return [] if path is None else read_answer_list(path, "--candidates")


def _one_question(row: Row, where: str) -> tuple[str, Image.Image]:
    """The text and the image of a row that asks once.

    Raises:
        UserError: It has several turns, or not one image.
    """
    turns = [message for message in row["messages"] if message["role"] == "user"]
    if len(turns) != 1 or len(row["images"]) != 1:
        raise UserError(
            f"{where}: an encoder answers one question about one image, and this row has {len(turns)} and "
            f"{len(row['images'])}: give each question a row of its own."
        )
    text = " ".join(part["text"].strip() for part in turns[0]["content"] if part["type"] == "text")
    return _given(text, f"{where}: the question"), row["images"][0]


def match_texts(model: str, texts: Sequence[str], image: str) -> list[Record]:
    """Prints how likely each text belongs to an image, a line each: share, tab, text; returns the same.

    Raises:
        UserError: The model, a text or the image is wrong.
    """
    texts = [_given(text, "a text") for text in texts]
    with waiting(make_console(), f"Loading {model}"):
        encoder = load_vle(model, "itm")
    picture = _picture(encoder, image)
    shares = match(encoder, picture * len(texts), texts)
    for text, share in zip(texts, shares, strict=True):
        tell(f"{share:.4f}\t{one_line(text)}")
    return [{"text": text, "score": float(share)} for text, share in zip(texts, shares, strict=True)]


def draw_text(model: str, text: str, image: str, out: str) -> Record:
    """Writes the picture as PNG with the patches bright that show what a text says; returns where it is brightest.

    Raises:
        UserError: The model, the text or the image is wrong, or the file cannot be written.
    """
    text = _given(text, "the text")
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--draw {out}: a PNG is written; let the name end with .png.")
    with waiting(make_console(), f"Loading {model}"):
        encoder = load_vle(model, "pbc")
    (picture,) = _picture(encoder, image)
    found = find(encoder, picture, text)
    png = io.BytesIO()
    draw(encoder, picture, found).save(png, "PNG")
    try:
        write_whole(Path(out).expanduser(), png.getvalue())
    except OSError as error:
        raise UserError(f"--draw {out} cannot be written ({reason_of(error)}): give another path.") from None
    row, column = divmod(int(found.argmax()), found.shape[1])
    tell(f"{out}: brightest in row {row + 1} of {found.shape[0]}, column {column + 1} of {found.shape[1]}.")
    return {"out": out, "row": row + 1, "rows": found.shape[0], "column": column + 1, "columns": found.shape[1]}


def _picture(encoder: Encoder, path: str) -> list[Image.Image]:
    return read_pictures(encoder, [os.path.expanduser(path)], [path])


def _given(text: str, what: str) -> str:
    if not text.strip():
        raise UserError(f"{what} is empty: write one.")
    return text.strip()
