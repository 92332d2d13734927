"""`vlm-sft evaluate BUNDLE --benchmark NAME`: asks benchmarks, scores the answers, writes and prints what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import set_seed

from ..base.assets import list_tasks
from ..base.console import make_console, quiet_libraries, say
from ..base.errors import UserError
from ..base.names import ERROR_PAGE, FORGETTING
from ..base.processes import on_first_process, share_work
from ..base.progress import RowProgress
from ..bundle.hub import find_bundle, is_fetched
from ..bundle.load import recipe_of
from ..bundle.manifest import read_manifest
from ..forgetting.bundles import BeforeAndAfter
from ..forgetting.compare import page_tables, print_forgetting
from ..forgetting.texts import USUAL, Wish
from ..inference.settings import check_options
from ..metrics.measures import MEASURES, Answered, Measured
from ..pages.against import against as put_beside
from ..pages.against import earlier_answers
from ..pages.errors import write_page
from ..pages.records import read_records, sheet_of
from ..recipe.schema import Recipe
from .asking import Asker, How, Loading, Record, share_of
from .contamination import contamination, seen_in_words
from .pictures import Pictures
from .records import Records, fingerprint
from .task_rows import Asked, read_task
from .tasks import Task, load_task

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..batch.processor import VLMProcessor

FOLDER = "evaluation"
"""Of a bundle: where the records of benchmarks lie."""


class Benchmark(NamedTuple):
    """A benchmark, ready to be asked."""

    name: str
    task: Task
    asked: list[Asked]
    pictures: Pictures


def run(
    bundle: str,
    names: Sequence[str],
    data: str | None = None,
    output: str | None = None,
    how: How | None = None,
    max_rows: int | None = None,
    compare: bool = True,
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    against: str | None = None,
    forgetting: Wish = USUAL,
) -> dict[str, dict[str, Any]]:
    """Evaluates a bundle on benchmarks.

    Args:
        bundle: Folder of the bundle, or `name/repository` on the Hub.
        names: Of benchmarks that ship, or files of one's own.
        data: Folder of their data; None for their own place or the Hub.
        output: Folder of what is written; default `evaluation` in the bundle, or `NAME-evaluation` here for the Hub's.
        how: How they are asked; its `settings` come from the bundle, the tasks and `options`.
        max_rows: Only the first so many rows of each.
        compare: Look whether their pictures are among those of the bundle's training sources.
        options: For `generate`, over what bundle and task say.
        trust_remote_code: See `vlm_sft.load`.
        against: Another bundle, or its answers, for the page of errors to compare with.
        forgetting: What of it is measured.

    Returns:
        For each benchmark what is written to its `NAME.json`; see docs/evaluation.md.

    Raises:
        UserError: A benchmark or its data are not there or wrong; once all is written, also where questions could not
            be asked.
    """
    _begin(dict(options or {}))
    folder = find_bundle(bundle)
    recipe = recipe_of(folder, read_manifest(folder))
    target = _target(bundle, folder, output)
    ready = read_benchmarks(names, data, max_rows)
    command = f"vlm-sft evaluate {{}} --benchmark {','.join(names)}"
    theirs = earlier_answers(against, [each.name for each in ready], command) if against else {}
    loading = Loading(folder, recipe, trust_remote_code)
    console = make_console(highlight=False, soft_wrap=True)
    change = _before(folder, forgetting, trust_remote_code, console)
    found = {}
    for benchmark in ready:
        settings = {**recipe.generation, **benchmark.task.generation, **(options or {})}
        asked = replace(how or How(), settings=settings, options=benchmark.task.options)
        kept = Records(target, benchmark.name, fingerprint(folder, benchmark.asked, _told(benchmark.task, asked)))
        found[benchmark.name] = on_first_process(kept.finished) or _evaluate(
            benchmark, loading, asked, kept, console, recipe if compare else None
        )
    lost = on_first_process(lambda: change[0].finish(loading, target / FORGETTING, loading.loaded))
    if PartialState().is_main_process:
        print_table(found, target)
        print_forgetting(lost)
        show_errors(bundle, ready, found, target, (against or "", theirs), page_tables(lost))
    _check_all_were_asked(found)
    return found


def _begin(options: dict[str, Any]) -> None:
    quiet_libraries()
    # Without being told that there is nothing but CPUs, accelerate takes each process of a launch for one alone.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    check_options(options)


def _before(folder: Path, wish: Wish, trust: bool, console: Console) -> list[BeforeAndAfter]:
    """What is measured of forgetting, on the first process alone."""
    found: list[BeforeAndAfter] = []
    on_first_process(lambda: found.append(BeforeAndAfter(folder, wish, trust, partial(say, console))))
    return found


def _target(bundle: str, folder: Path, output: str | None) -> Path:
    default = Path(f"{bundle.partition('@')[0].rpartition('/')[2]}-{FOLDER}") if is_fetched(folder) else folder / FOLDER
    target = Path(output).expanduser() if output else default
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {str(target)!r} is a file; name a folder.")
    return target


def show_errors(
    bundle: str,
    ready: Sequence[Benchmark],
    found: Mapping[str, Any],
    target: Path,
    against: tuple[str, dict[str, Any]],
    tables: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the page of errors beside the records; `against`: a bundle, and what `earlier_answers` says of it."""
    sheets, (other, theirs) = [], against
    for name, *_ in ready:
        sheet = sheet_of(name, read_records(target / f"{name}.jsonl"), found[name])
        sheet.notes += [seen_in_words(seen)] if (seen := found[name]["contamination"]) else []
        if name in theirs:
            put_beside(sheet, theirs[name], other)
        sheets.append(sheet)
    images = {(each.name, one.id): (each.pictures.whole, one.images) for each in ready for one in each.asked}
    given = (sheets, other, lambda entry: list(map(*images[entry.sheet, entry.id])))
    write_page(target / ERROR_PAGE, bundle, *given, tables=tables)


def _check_all_were_asked(found: Mapping[str, Any]) -> None:
    for name, one in found.items():
        if refused := one.get("refused"):
            count = f"{refused['questions']:,} of {one['questions']:,} questions of {name}"
            raise UserError(f"{count} could not be asked and count as wrong; the first: {refused['first']}")


def read_benchmarks(names: Sequence[str], data: str | None, max_rows: int | None = None) -> list[Benchmark]:
    """The questions of benchmarks, read and checked before anything is loaded.

    Raises:
        UserError: As `load_task` and `read_task`; one is named twice.
    """
    if not names:
        raise UserError(f"--benchmark names no benchmark; there are {', '.join(list_tasks())}, and files of your own.")
    tasks = [load_task(name) for name in names]
    known = [name for name, _ in tasks]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise UserError(f'--benchmark names "{twice}" twice; name each once.')
    found = []
    for name, task in tasks:
        pictures = Pictures()
        found.append(Benchmark(name, task, read_task(name, task, data, pictures, max_rows), pictures))
    return found


def _told(task: Task, how: How) -> dict[str, Any]:
    """What of the task and of how it is asked decides over the records."""
    same = {name: value for name, value in vars(how).items() if name != "batch_size"}
    return {"metric": task.metric, **same}


def _evaluate(
    benchmark: Benchmark, loading: Loading, how: How, kept: Records, console: Console, recipe: Recipe | None
) -> dict[str, Any]:
    """Asks a benchmark and concludes; a recipe: that of the training sources to compare with."""
    done = on_first_process(kept.done)
    if done:
        count = f"{len(done):,} of {len(benchmark.asked):,} questions of {benchmark.name}"
        say(console, f"{count} are answered already.")
    started = time.perf_counter()
    set_seed(int(loading.recipe.sft.get("seed", 42)))  # some recipes sample, as Ziya's card does
    ask(benchmark, loading, how, kept, done, console)
    seconds = round(time.perf_counter() - started, 1)

    def first() -> dict[str, Any]:
        seen = contamination(recipe, benchmark.asked, benchmark.pictures) if recipe else None
        return conclude(benchmark, how, kept, seconds, seen)

    return on_first_process(first)


def ask(
    benchmark: Benchmark,
    loading: Callable[[], tuple[PreTrainedModel, VLMProcessor]],
    how: How,
    kept: Records,
    done: set[str],
    console: Console,
) -> None:
    """Asks what is not yet answered; every process a share of it."""
    todo = [asked for asked in benchmark.asked if asked.id not in done]

    def share(process: int, processes: int) -> int:
        mine = share_of(todo, process, processes)
        if not mine:
            return 0
        asker = Asker(*loading(), benchmark.pictures, how)
        with kept.adding(process) as write, RowProgress(console, benchmark.name) as progress:
            count = progress.counter("asked", len(mine), "questions")

            def add(records: list[Record]) -> None:
                write(records)
                count(len(records))

            asker.ask(mine, add)
        return asker.shared.encoded

    share_work(share)


def conclude(
    benchmark: Benchmark, how: How, kept: Records, seconds: float, seen: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Scores the records, writes them in order and what was found."""
    records = kept.collect([asked.id for asked in benchmark.asked])
    measured, blank = score(benchmark.task, records)
    summary: dict[str, Any] = {
        "benchmark": benchmark.name,
        "about": benchmark.task.about,
        "metric": benchmark.task.metric,
        "likelihood": how.likelihood,
        "fingerprint": kept.mark,
        "questions": len(records),
        "scores": _totals(measured),
        "scores_blank": _totals(blank) if blank else None,
        "kinds": by_kind(benchmark.task, records),
        "contamination": seen,
        "seconds": seconds,
    }
    refused = [record["error"] for record in records if "error" in record]
    if refused:
        summary["refused"] = {"questions": len(refused), "first": refused[0]}
    kept.finish(records, summary)
    return summary


def score(task: Task, records: Sequence[Record]) -> tuple[Measured, Measured | None]:
    """Scores answers, and those without the pictures; the score of each goes into its record.

    A question without pictures, or that could not be asked, keeps its answer, so that both are over the same questions.
    """
    measured = MEASURES[task.metric]([answered(record, record["answer"]) for record in records])
    blind = [record["answer"] if record["answer_blank"] is None else record["answer_blank"] for record in records]
    asked_blind = any(record["answer_blank"] is not None for record in records)
    blank = (
        MEASURES[task.metric]([answered(r, a) for r, a in zip(records, blind, strict=True)]) if asked_blind else None
    )
    for number, record in enumerate(records):
        record["score"] = 0.0 if "error" in record else round(measured.each[number], 6)
        was_asked = blank is not None and record["answer_blank"] is not None
        record["score_blank"] = round(blank.each[number], 6) if blank is not None and was_asked else None
    return measured, blank


def answered(record: Record, answer: str) -> Answered:
    """A record as measures take it, with one of its answers."""
    kind, group = record["kind"] or "", record["group"] or record["id"]
    return Answered(answer, record["answers"], record["choices"] or {}, kind, group)


def _totals(measured: Measured) -> dict[str, dict[str, float]]:
    found = {}
    for name, total in measured.totals.items():
        low, high = total.interval()
        found[name] = {"value": round(total.score(), 6), "low": round(low, 6), "high": round(high, 6)}
    return found


def by_kind(task: Task, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """How many questions of each kind there are, the first score of it with its interval, and all `scores`."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["kind"] or "", []).append(record)
    if len(kinds) < 2:
        return {}
    found = {}
    for kind, some in sorted(kinds.items()):
        measured = MEASURES[task.metric]([answered(record, record["answer"]) for record in some])
        scores = _totals(measured)
        name = next(iter(scores))
        found[kind] = {"questions": len(some), "metric": name, **scores[name], "scores": scores}
    return found


def print_table(found: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Prints every score with its interval and that without pictures, and what was seen in training."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("benchmark", "score", box=SIMPLE_HEAD, show_edge=False)
    for name in ("value", "95 % interval", "image blanked", "questions"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        for metric, score_of in one["scores"].items():
            blank = (one["scores_blank"] or {}).get(metric)
            table.add_row(
                name, metric.replace("_", " "), _number(score_of["value"]),
                f"{_number(score_of['low'])} – {_number(score_of['high'])}",
                _number(blank["value"]) if blank else "", f"{one['questions']:,}",
            )  # fmt: skip
    console = make_console(stderr=False, quiet=False, highlight=False, soft_wrap=True)
    console.print(table)
    for name, one in found.items():
        if (seen := one["contamination"]) is not None:
            say(console, f"{name}: {seen_in_words(seen)}")
    say(console, f"Written to {target}.")


def _number(value: float) -> str:
    return f"{value:.1%}" if abs(value) <= 1 else f"{value:,.2f}"
