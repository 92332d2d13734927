"""Measures a bundle on held-out rows: captions and answers right, how much of that needs the image, and every error."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.console import make_console, quiet_libraries, say
from ..base.errors import UserError, refused_by_library
from ..base.names import ERROR_PAGE, EVALUATION, MANIFEST, METRICS, SCORES, ImageEntry, Json, Record, Values
from ..base.whole_files import read_text, write_json, write_whole
from ..forgetting.texts import USUAL, Wish
from ..metrics.intervals import mean_of
from ..pages.against import against as put_beside
from ..pages.against import earlier_answers, not_yet_asked
from ..pages.errors import write_page
from ..pages.records import sheet_of
from ..rows.messages import Message
from .scoring import Answers, Question, collect, score

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import Source
    from .asking import Loading


def run(
    bundle: str,
    split: str = "test",
    batch_size: int = 32,
    output: str | None = None,
    max_rows: int | None = None,
    recipe: str | None = None,
    trust_remote_code: bool = False,
    against: str | None = None,
    forgetting: Wish = USUAL,
) -> Json:
    """Evaluates a bundle, prints a table, writes `eval.json`, the bundle's card, every answer and a page of errors.

    Args:
        bundle: Folder of the bundle, or `name/repository` on the Hub.
        split: `test` or `eval`: which sources of the recipe's `data`.
        batch_size: Questions answered at a time.
        output: Where the results go; default `eval.json` in the bundle, or `NAME-eval.json` here for one on the Hub.
            The answers and the page lie in the bundle's `evaluation`, or else beside it, `.jsonl` and `.html`.
        max_rows: Only the first so many rows of each source.
        trust_remote_code: See `vlm_sft.load`.
        recipe: A recipe whose `data` is used in place of the bundle's own.
        against: Another bundle, or its answers, for the page to compare with; one without answers is asked the same.
        forgetting: What of it is measured.

    Returns:
        What `scoring.score` gives, and `train_seconds`, `split`, `evaluate_seconds`, and maybe `forgetting`.

    Raises:
        UserError: No bundle, no such split, no rows, or a row that cannot be read; in the end, also where questions
            could not be asked.
    """
    quiet_libraries()
    from ..bundle.card import write_card
    from ..bundle.hub import find_bundle, is_fetched
    from ..forgetting.bundles import BeforeAndAfter
    from ..forgetting.compare import page_tables
    from ..recipe.schema import load_recipe

    folder = find_bundle(bundle)
    loading = _bundle(folder, trust_remote_code)
    sources, fetched = sources_of(load_recipe(recipe) if recipe else loading.recipe, split), is_fetched(folder)
    target = _target(bundle, folder, fetched, output)
    name, command = f"data.{split}", f"vlm-sft evaluate {{}}{f' --split {split}' if split != 'test' else ''}"
    questions = collect(sources, max_rows)
    change = BeforeAndAfter(folder, forgetting, trust_remote_code, partial(say, make_console()))
    theirs = _others_answers(against, name, command, questions, batch_size, trust_remote_code) if against else None
    results, said = _asked(loading, questions, batch_size)
    lost = change.finish(loading)
    results |= {"train_seconds": train_seconds(folder), "split": split} | ({"forgetting": lost} if lost else {})
    write_json(target, results)
    write_answers(said, name, target, bundle, (against or "", theirs), page_tables(lost))
    if not output and not fetched:
        write_card(folder)
    _print(results, target)
    _check_all_were_asked(results)
    return results


def _bundle(folder: Path, trust_remote_code: bool) -> Loading:
    from ..bundle.load import recipe_of
    from ..bundle.manifest import read_manifest
    from .asking import Loading

    return Loading(folder, recipe_of(folder, read_manifest(folder)), trust_remote_code)


def _others_answers(
    other: str,
    name: str,
    command: str,
    questions: dict[str | None, list[Question]],
    batch_size: int,
    trust_remote_code: bool,
) -> list[Record]:
    """What another bundle said before, or says now; its model is gone then."""
    from ..bundle.hub import find_bundle

    if not not_yet_asked(other, [name]):
        return earlier_answers(other, [name], command)[name]
    _, said = _asked(_bundle(find_bundle(other), trust_remote_code), questions, batch_size)
    return [record for record, _ in _numbered(said)]


def _asked(
    loading: Loading, questions: dict[str | None, list[Question]], batch_size: int
) -> tuple[Json, list[Answers]]:
    """What a bundle scores, with `evaluate_seconds`, and its answers."""
    from transformers import set_seed

    model, processor = loading()
    start = time.perf_counter()
    set_seed(int(loading.recipe.sft.get("seed", 42)))  # some recipes sample answers, as Ziya's card does
    said: list[Answers] = []
    results = score(model, processor, questions, batch_size, dict(loading.recipe.generation), said.append)
    return results | {"evaluate_seconds": round(time.perf_counter() - start, 1)}, said


def _target(bundle: str, folder: Path, fetched: bool, output: str | None) -> Path:
    # What lies in the Hub's cache is not ours to change.
    default = Path(f"{bundle.partition('@')[0].rpartition('/')[2]}-{SCORES}") if fetched else folder / SCORES
    target = Path(output) if output else default
    if target.is_dir():
        raise UserError(f"--output {str(target)!r} is a folder; name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def write_answers(
    said: Sequence[Answers],
    name: str,
    target: Path,
    bundle: str,
    other: tuple[str, list[Record] | None],
    tables: Sequence[Values] = (),
) -> None:
    """Writes a record of each question, and the page that shows them.

    Args:
        said: The answers of each kind.
        name: Of the split.
        target: File of the results: those of a bundle have the rest in its `evaluation`, others beside them.
        bundle: What was asked, in words.
        other: What it is compared with, in words, and its records.
        tables: Further tables of the page.

    Raises:
        UserError: The other's records are of other questions.
    """
    numbered = list(_numbered(said))
    records = {record["id"]: record for record, _ in numbered}
    images = {record["id"]: shown for record, shown in numbered}
    if not records:
        return
    own = target.name == SCORES and (target.parent / MANIFEST).is_file()
    stem = target.parent / EVALUATION / name if own else target.with_suffix("")
    page = target.parent / EVALUATION / ERROR_PAGE if own else target.with_suffix(".html")
    stem.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records.values())
    write_whole(stem.with_name(f"{stem.name}.jsonl"), "".join(lines).encode("utf-8", "replace"))
    sheet = sheet_of(name, list(records.values()), summary_of(said))
    described, theirs = other
    if theirs is not None:
        put_beside(sheet, theirs, described)
    write_page(page, bundle, [sheet], described, lambda entry: images[entry.id], tables=tables)


def _numbered(said: Sequence[Answers]) -> Iterator[tuple[Record, Sequence[Any]]]:
    """Records and images of all kinds, each record with an id of its own."""
    seen: set[str] = set()
    for each in said:
        for record, shown in records_of(each):
            while record["id"] in seen:  # two rows may have the same id
                record["id"] += "~"
            seen.add(record["id"])
            yield record, shown


def records_of(said: Answers) -> Iterator[tuple[Record, Sequence[Any]]]:
    """A record of each question, and its images; see docs/evaluation.md."""
    for number, (question, answer) in enumerate(zip(said.questions, said.given, strict=True)):
        turns = [_text(message) for message in question.messages if message["role"] != "system"]
        blind = None if said.blind is None or not question.images or question.refused else number
        pieces = getattr(answer, "confidence", None)
        record = {
            "id": question.id, "images": [_name(image) for image in question.images], "question": "\n".join(turns),
            "choices": None, "answers": question.references, "kind": said.kind or "captions", "answer": str(answer),
            "answer_blank": None if blind is None or said.blind is None else str(said.blind[blind]),
            "score": float(said.scores[number]),
            "score_blank": None if blind is None or said.blind_scores is None else float(said.blind_scores[blind]),
            "confidence": None if pieces is None else [[piece, round(share, 4)] for piece, share in pieces],
        }  # fmt: skip
        yield (record | {"error": question.refused} if question.refused else record), question.images


def summary_of(said: Sequence[Answers]) -> Json:
    """The score of all questions with its interval, and with every image grey."""
    metrics = {each.metric for each in said}
    name = metrics.pop() if len(metrics) == 1 else "score"
    blind = [score for each in said for score in each.blind_scores or ()]
    found: Json = {"scores": {name: _interval([score for each in said for score in each.scores])}}
    seeing = any(question.images for each in said if each.blind for question in each.questions)
    return found | {"scores_blank": {name: _interval(blind)} if blind and seeing else None}


def _interval(scores: Sequence[float]) -> dict[str, float]:
    total = mean_of([float(score) for score in scores])
    low, high = total.interval()
    return {"value": total.score(), "low": low, "high": high}


def _text(message: Message) -> str:
    return "".join(part.get("text") or "" for part in message["content"]).strip()


def _name(image: ImageEntry) -> str:
    return f"sha256:{sha256(image['bytes']).hexdigest()}" if image["bytes"] else str(image["path"])


def _check_all_were_asked(results: Json) -> None:
    if refused := results.get("refused"):
        count = results["questions"]["captions"] + sum(results["questions"]["answers"].values())
        raise UserError(
            f"{refused['questions']:,} of {count:,} questions could not be asked and count as wrong; the first: "
            f"{refused['first']}"
        )


def sources_of(recipe: Recipe, split: str) -> list[Source]:
    """The sources of a split.

    Raises:
        UserError: The split is not `test` or `eval`, or the recipe names no source for it.
    """
    if split not in ("test", "eval"):
        raise UserError(f"--split must be test or eval, not {split!r}.")
    sources = getattr(recipe.data, split)
    if not sources:
        raise UserError(
            f"{recipe.path or 'the recipe'} has no data.{split}; add sources there, or name another recipe with "
            f"--recipe."
        )
    return list(sources)


def train_seconds(folder: Path) -> float | None:
    """Seconds that the bundle's stage was trained for, or None where that was not written down."""
    path = folder / METRICS
    if not path.is_file():
        return None
    with refused_by_library(f"{str(path)!r} holds no list of numbers; remove it"):
        runtimes = [row["train_runtime"] for row in json.loads(read_text(path)) if "train_runtime" in row]
        return round(sum(runtimes), 1) if runtimes else None


def _print(results: Json, target: Path) -> None:
    from ..forgetting.compare import print_forgetting

    print_forgetting(results.get("forgetting"))
    _print_shares(results, target)


def _print_shares(results: Json, target: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    own = results["metrics_by_kind"]
    title = f"{'Right' if own else 'Exactly right'} on the {results['split']} set"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("what")
    table.add_column("share", justify="right")
    table.add_column("questions", justify="right")
    counts = results["questions"]
    lines = [("captions", results["caption_exact_match"], counts["captions"])]
    by_kind = results["answer_accuracy_by_kind"]
    for kind, accuracy in by_kind.items():
        shares = own.get(kind) or {"": accuracy}
        lines += [
            (f"answers: {kind}{metric and ', ' + metric.replace('_', ' ')}", share, counts["answers"][kind])
            for metric, share in shares.items()
        ]
    answers = sum(counts["answers"].values())
    lines += [
        ("answers", results["answer_accuracy"], answers),
        ("answers, image blanked", results["answer_accuracy_blank_image"], answers),
    ]
    for name, share, count in lines:
        if share is not None:
            table.add_row(name, f"{share:.1%}", f"{count:,}")
    console = make_console(stderr=False, quiet=False)
    console.print(table)
    say(console, f"Written to {target}.")
