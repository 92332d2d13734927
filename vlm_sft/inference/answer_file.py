"""`vlm-sft generate`: answers a file of questions in batches into a JSONL file that a rerun resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..base.console import make_console
from ..base.errors import RowError, UserError
from ..base.limits import bounded
from ..base.names import Options, Record
from ..base.progress import RowProgress, waiting
from ..base.whole_files import IrregularError, read_bytes, write_whole
from ..base.words import reason_of
from ..batch.processor import VLMProcessor
from .generation import answer_each, check_length, encode_question
from .questions import MADE, QuestionRow, conversation, read_questions
from .settings import check_options, ignores_text, open_bundle

if TYPE_CHECKING:
    from rich.console import Console

Asker = Callable[[list[QuestionRow]], list[Record]]
"""Rows of the input → one line a row, with `answer` or `error`, as `answer_rows` gives them."""


def generate(
    bundle: str,
    input: str,  # noqa: A002
    output: str,
    batch_size: int = 8,
    images: str | None = None,
    options: Options | None = None,
    trust_remote_code: bool = False,
    image_folders: Sequence[str] = (),
    boxes: str | None = None,
) -> Record:
    """Answers a file of questions.

    Args:
        bundle: Folder of a trained model.
        input: Anything `read_rows` reads. A row has a `question` (maybe with `<image>` marks) and `image` or
            `images`, or `messages` as in training; and maybe an `id`.
        output: JSONL file. Each row of the input becomes one line, in the same order: its columns and `answer` or
            `error`. What it holds already is kept and not asked again.
        batch_size: Rows answered at a time.
        images: Folder that relative image paths start from; default the folder of the input.
        options: For transformers' `generate`, over the recipe's `generation`.
        trust_remote_code: See `vlm_sft.load`.
        image_folders: Further folders in which images may lie, beside `images` and the folder of the input.
        boxes: What the numbers of boxes count where a row does not say it, as a source's `boxes`.

    Returns:
        As `answer_questions`.

    Raises:
        UserError: A file is wrong, or some rows could not be answered (after all others were).
    """
    check_options(options or {})

    def open_asker(console: Console) -> Asker:
        model, processor, settings = open_bundle(bundle, options or {}, trust_remote_code)
        if ignores_text(processor):
            console.print("This bundle's template shows the model images only: what the questions say is ignored.")
        return lambda batch: answer_rows(model, processor, batch, images, settings, image_folders, boxes)

    return answer_questions(input, output, open_asker, batch_size, images)


def answer_questions(
    input: str,  # noqa: A002
    output: str,
    open_asker: Callable[[Console], Asker],
    batch_size: int,
    images: str | None,
) -> Record:
    """Answers a file of questions by whatever answers them.

    Args:
        input: As `generate`.
        output: As `generate`.
        open_asker: Loads what answers; called where a question is left. Told where to say things.
        batch_size: Rows answered at a time.
        images: As `generate`; looked for here.

    Returns:
        `output`, how many `rows` it holds, and how many of them were `asked` now.

    Raises:
        UserError: As `generate`.
    """
    if images is not None and not os.path.isdir(os.path.expanduser(images)):
        raise UserError(f"--images {images} is no folder: correct it.")
    target = Path(output).expanduser()
    if target.exists() and os.path.exists(input) and target.samefile(input):
        raise UserError(f"--output {output} is the input itself: give another file.")
    console = make_console(highlight=False, soft_wrap=True)
    earlier, size = read_answers(target)
    order = check_questions(input, earlier, target)
    # Only what went wrong is kept: whole lines would fill the memory.
    done = {key: line.get("error") for key, line in earlier.items()}
    todo = (question for question in read_questions(input) if str(question.id) not in done)
    if left := len(order) - len(done):
        if done:
            console.print(f"{len(done):,} of {len(order):,} rows are in {target} already.")
        with waiting(console, "Loading the model"):
            ask = open_asker(console)
    with _append(target, size) as write, RowProgress(console, "answers") as progress:
        answered = errors = 0
        while batch := list(islice(todo, batch_size)):
            lines = ask(batch)
            write(lines)
            done |= {str(line["id"]): line.get("error") for line in lines}
            answered, errors = answered + len(lines), errors + sum("error" in line for line in lines)
            progress.tell("asked", answered, left, note=f"{errors:,} with errors" if errors else "")
    _finish(target, order, done, console)
    return {"output": str(target), "rows": len(order), "asked": answered}


def check_questions(path: str, done: dict[str, Record], target: Path) -> list[str]:
    """Ids of all questions, in order, checked against each other and against the answers there are.

    Raises:
        UserError: An id comes twice, or an answer belongs to no question or to another one.
    """
    seen: dict[str, str] = {}
    for question in read_questions(path):
        key = str(question.id)
        if key in seen:
            raise UserError(
                f'{question.row.where}: the id "{key}" is that of {seen[key]} too (a row without an id has its number '
                "for one): give every row its own."
            )
        seen[key] = question.row.where
        there = {name: value for name, value in done.get(key, {}).items() if name not in MADE}
        if there and _dump(there) != _dump(question.kept()):
            raise UserError(
                f'{target} has an answer to "{key}", but to another version of {question.row.where}: give another '
                "--output, or remove that line to ask again."
            )
    if not seen:
        raise UserError(f"{path} holds no rows: add some.")
    if strangers := [key for key in done if key not in seen]:
        raise UserError(
            f'{target} holds answers to other questions ({len(strangers)}, for instance the id "{strangers[0]}"): '
            "give another --output."
        )
    return list(seen)


def answer_rows(
    model: PreTrainedModel,
    processor: VLMProcessor,
    batch: Iterable[QuestionRow],
    images: str | None,
    options: Options,
    image_folders: Sequence[str] = (),
    boxes: str | None = None,
) -> list[Record]:
    """One line a row: its columns and `answer`, or `error` where the row cannot be asked.

    Raises:
        UserError: The GPU's memory does not hold the batch.
    """
    lines, asked = [], []
    for question in batch:
        line = question.kept()
        lines.append(line)
        try:
            row = conversation(question, images, image_folders, boxes, processor)
            # Each by itself first, so that one bad row does not take the others with it.
            check_length(model, len(encode_question(processor, row).input_ids))
            asked.append((line, row))
        except UserError as error:
            line["error"] = str(error)
    try:
        answers = answer_each(model, processor, [row for _, row in asked], **options)
    except torch.OutOfMemoryError:
        raise UserError(
            f"The GPU's memory does not hold {len(asked)} rows at a time: run again with a smaller --batch-size (the "
            "answers so far are kept)."
        ) from None
    for (line, _), found in zip(asked, answers, strict=True):
        line["error" if isinstance(found, RowError) else "answer"] = str(found)
    return lines


def read_answers(path: Path) -> tuple[dict[str, Record], int]:
    """Lines of an earlier run by id, and the size of the file without a half-written last line.

    Raises:
        UserError: The file cannot be read, or holds a line that is not one of ours.
    """
    try:
        data = read_bytes(path) if path.exists() else b""
    except OSError as error:
        raise UserError(f"--output {path} cannot be read ({reason_of(error)}): give another file.") from None
    except IrregularError as error:
        raise UserError(f"--output {path} cannot be read (it is {error.what}): give another file.") from None
    found: dict[str, Record] = {}
    size = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        parsed = _parse(line)
        if parsed is not None and str(parsed["id"]) not in found:
            found[str(parsed["id"])] = parsed
        elif parsed is None and _is_half(line):
            break
        elif line.strip():
            problem = "is not an answer of ours" if parsed is None else f'has the id "{parsed["id"]}" again'
            raise UserError(f"--output {path}: line {number} {problem}: give another file, or remove the line.")
        size += len(line)
    return found, size


def _is_half(line: bytes) -> bool:
    """Whether a line is the beginning of one of ours: a foreign file must not lose its end."""
    start = b'{"id":'
    return not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line) or not line.strip(b"\0"))


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(bounded(line))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "id" in value and ("answer" in value or "error" in value) else None


def _dump(line: Record) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False, default=_as_json) + "\n").encode()
    except UnicodeEncodeError:  # there is half a character in it, which JSON can only escape
        return (json.dumps(line, default=_as_json) + "\n").encode()


def _as_json(value: object) -> Any:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


@contextmanager
def _append(path: Path, size: int) -> Iterator[Callable[[list[Record]], None]]:
    """Gives a function that adds lines after the first `size` bytes; when it returns, they are on the disk."""

    def failed(error: OSError) -> UserError:
        return UserError(f"--output {path} cannot be written ({reason_of(error)}): correct it or make room.")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab+")
        stream.truncate(size)
        stream.seek(max(size - 1, 0))
        if size and stream.read(1) != b"\n":
            stream.write(b"\n")
    except OSError as error:
        raise failed(error) from None

    def write(lines: list[Record]) -> None:
        try:
            stream.write(b"".join(map(_dump, lines)))
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            raise failed(error) from None

    with stream:
        yield write


def _finish(target: Path, order: list[str], done: dict[str, str | None], console: Console) -> None:
    """Puts the lines into the order of the input where they are not, and says how it went."""
    if list(done) != order:  # lines were removed to be asked again, and their new answers stand at the end
        lines, _ = read_answers(target)
        write_whole(target, b"".join(_dump(lines[key]) for key in order))
    failed = [key for key in order if done[key] is not None]
    if failed:
        raise UserError(
            f'{len(failed):,} of {len(order):,} rows could not be answered, the first is "{failed[0]}" '
            f"({str(done[failed[0]]).rstrip('.')}): mend them, remove their lines from {target} and run again."
        )
    console.print(f"{len(order):,} rows are answered: {target}")
