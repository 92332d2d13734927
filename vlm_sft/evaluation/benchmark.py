"""`vlm-sft evaluate BUNDLE --benchmark NAME`: asks benchmarks, scores the answers, writes and prints what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerate import PartialState
from transformers import set_seed

from ..base.assets import list_tasks
from ..base.console import make_console, quiet_libraries, say
from ..base.errors import UserError
from ..base.names import ERROR_PAGE, FORGETTING, Json, Options, Record, Values
from ..base.processes import find_processes, on_first_process, share_work
from ..base.progress import RowProgress
from ..bundle.hub import find_bundle, is_fetched
from ..bundle.load import recipe_of
from ..bundle.manifest import read_manifest
from ..forgetting.bundles import BeforeAndAfter
from ..forgetting.compare import page_tables, print_forgetting
from ..forgetting.texts import USUAL, Wish
from ..inference.settings import check_options
from ..judging.reviews import in_words, review
from ..pages.against import against as put_beside
from ..pages.against import earlier_answers, not_yet_asked
from ..pages.errors import write_page
from ..pages.records import read_records, sheet_of
from .asking import Asker, How, Loading, share_of
from .contamination import contamination, seen_in_words
from .pictures import Pictures
from .records import Records, by_kind, fingerprint, print_table, score, totals_of
from .task_rows import Asked, read_task
from .tasks import Task, check_judge, load_task, render_prompt

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..batch.processor import VLMProcessor
    from ..judging.judge import Judge

FOLDER = "evaluation"
"""Of a bundle: where the records of benchmarks lie."""
AGAINST = "against"
"""There: those of another bundle that was asked for the comparison alone."""
VERDICTS = "verdicts.jsonl"
"""There: what judges said, of all benchmarks."""


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
    options: Values | None = None,
    trust_remote_code: bool = False,
    against: str | None = None,
    judge: Judge | None = None,
    prompt: str | None = None,
    forgetting: Wish = USUAL,
) -> dict[str, Json]:
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
        against: Another bundle, or its answers, for the page to compare with; one without answers is asked the same.
        judge: Scores the answers to benchmarks that are measured by one.
        prompt: What is asked in place of the benchmarks' own prompts.
        forgetting: What of it is measured.

    Returns:
        For each benchmark what is written to its `NAME.json`; see docs/evaluation.md.

    Raises:
        UserError: A benchmark or its data are not there or wrong; in the end, also where questions were not asked.
    """
    quiet_libraries()
    find_processes()
    check_options(dict(options or {}))
    folder = find_bundle(bundle)
    target = _target(bundle, folder, output)
    ready = read_benchmarks(names, data, max_rows, prompt)
    check_judge([each.task for each in ready], judge)
    told = _Told(how or How(), dict(options or {}), compare, judge)
    change = _before(folder, forgetting, trust_remote_code)
    theirs = _others_answers(against, names, ready, target / AGAINST, told, trust_remote_code) if against else {}
    loading = _bundle(folder, trust_remote_code, told.options)
    found = _ask_all(ready, loading, target, told)
    lost = on_first_process(lambda: change[0].finish(loading, target / FORGETTING, loading.loaded))
    if PartialState().is_main_process:
        _tell(found, target)
        print_forgetting(lost)
        show_errors(bundle, ready, found, target, (against or "", theirs), page_tables(lost))
    _check_all_were_asked(found)
    return found


def _bundle(folder: Path, trust_remote_code: bool, options: Options) -> Loading:
    return Loading(folder, recipe_of(folder, read_manifest(folder)), trust_remote_code, options)


def _before(folder: Path, wish: Wish, trust_remote_code: bool) -> list[BeforeAndAfter]:
    """What is measured of forgetting, on the first process alone."""
    note = partial(say, make_console(highlight=False, soft_wrap=True))
    found: list[BeforeAndAfter] = []
    on_first_process(lambda: found.append(BeforeAndAfter(folder, wish, trust_remote_code, note)))
    return found


def _others_answers(
    other: str, names: Sequence[str], ready: Sequence[Benchmark], folder: Path, told: _Told, trust_remote_code: bool
) -> dict[str, list[Record]]:
    """What another bundle said before; to what it was not asked yet, it is asked now, and its model is gone then."""
    new = not_yet_asked(other, [each.name for each in ready])
    known = [each.name for each in ready if each.name not in new]
    found = earlier_answers(other, known, f"vlm-sft evaluate {{}} --benchmark {','.join(names)}") if known else {}
    if new:
        again = [each for each in ready if each.name in new]
        _ask_all(
            again, _bundle(find_bundle(other), trust_remote_code, told.options), folder, told._replace(compare=False)
        )
    return found | {name: read_records(folder / f"{name}.jsonl") for name in new}


def _target(bundle: str, folder: Path, output: str | None) -> Path:
    default = Path(f"{bundle.partition('@')[0].rpartition('/')[2]}-{FOLDER}") if is_fetched(folder) else folder / FOLDER
    target = Path(output).expanduser() if output else default
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {str(target)!r} is a file; name a folder.")
    return target


class _Told(NamedTuple):
    """How benchmarks are asked: `run`'s arguments."""

    how: How
    options: Options
    compare: bool
    judge: Judge | None


def _ask_all(ready: Sequence[Benchmark], loading: Loading, target: Path, told: _Told) -> dict[str, Json]:
    """Asks one bundle, and writes its answers; what was asked before is not asked again."""
    found = {}
    for benchmark in ready:
        settings = {**loading.recipe.generation, **benchmark.task.generation, **told.options}
        asked = replace(told.how, settings=settings, options=benchmark.task.options)
        mark = fingerprint(loading.folder, benchmark.asked, _decides(benchmark.task, asked))
        kept = Records(target, benchmark.name, mark)
        found[benchmark.name] = _evaluate(benchmark, loading, asked, kept, told)
    return found


def _tell(found: Mapping[str, Values], target: Path) -> None:
    console = make_console(stderr=False, quiet=False, highlight=False, soft_wrap=True)
    print_table(found, console)
    for name, one in found.items():
        if (seen := one["contamination"]) is not None:
            say(console, f"{name}: {seen_in_words(seen)}")
        if (judged := one.get("judge")) is not None:
            say(console, f"{name}: {in_words(judged)}")
    say(console, f"Written to {target}.")


def show_errors(
    bundle: str,
    ready: Sequence[Benchmark],
    found: Values,
    target: Path,
    against: tuple[str, Json],
    tables: Sequence[Values] = (),
) -> None:
    """Writes the page of errors beside the records; `against`: a bundle, and what `earlier_answers` says of it."""
    sheets, (other, theirs) = [], against
    for name, *_ in ready:
        sheet = sheet_of(name, read_records(target / f"{name}.jsonl"), found[name])
        if seen := found[name]["contamination"]:
            (sheet.warnings if seen.get("questions") else sheet.notes).append(seen_in_words(seen))
        sheet.notes += [in_words(judged)] if (judged := found[name].get("judge")) else []
        if name in theirs:
            put_beside(sheet, theirs[name], other)
        sheets.append(sheet)
    images = {(each.name, one.id): (each.pictures.whole, one.images) for each in ready for one in each.asked}
    given = (sheets, other, lambda entry: list(map(*images[entry.sheet, entry.id])))
    write_page(target / ERROR_PAGE, bundle, *given, tables=tables)


def _check_all_were_asked(found: Values) -> None:
    for name, one in found.items():
        if refused := one.get("refused"):
            count = f"{refused['questions']:,} of {one['questions']:,} questions of {name}"
            raise UserError(f"{count} could not be asked and count as wrong; the first: {refused['first']}")
        if (judged := one.get("judge")) and judged["refused"]:
            count = f"{judged['refused']:,} of {judged['verdicts']:,} verdicts on {name}"
            raise UserError(f"{count} could not be had and count nowhere; the first: {judged['first']}")


def read_benchmarks(
    names: Sequence[str], data: str | None, max_rows: int | None = None, prompt: str | None = None
) -> list[Benchmark]:
    """The questions of benchmarks, read and checked before anything is loaded.

    Raises:
        UserError: As `load_task` and `read_task`; one is named twice.
    """
    if not names:
        raise UserError(f"--benchmark names no benchmark; there are {', '.join(list_tasks())}, and files of your own.")
    tasks = [load_task(name, prompt) for name in names]
    known = [name for name, _ in tasks]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise UserError(f'--benchmark names "{twice}" twice; name each once.')
    found = []
    for name, task in tasks:
        pictures = Pictures()
        found.append(Benchmark(name, task, read_task(name, task, data, pictures, max_rows), pictures))
    return found


def _decides(task: Task, how: How) -> Json:
    """What of the task and of how it is asked decides over the records."""
    same = {name: value for name, value in vars(how).items() if name != "batch_size"}
    return {"metric": task.metric, **same}


def _evaluate(
    benchmark: Benchmark,
    loading: Loading,
    how: How,
    kept: Records,
    told: _Told,
) -> Json:
    """Asks a benchmark, of which all answers may be there already, and concludes."""
    console = make_console(highlight=False, soft_wrap=True)
    finished = on_first_process(kept.finished)
    done = on_first_process(lambda: kept.done(benchmark.asked))
    if done and not (finished and len(done) == len(benchmark.asked)):
        count = f"{len(done):,} of {len(benchmark.asked):,} questions of {benchmark.name}"
        say(console, f"{count} are answered already.")
    started = time.perf_counter()
    set_seed(int(loading.recipe.sft.get("seed", 42)))  # some recipes sample answers, as Ziya's card does
    ask(benchmark, loading, how, kept, done, console)
    seconds = finished.get("seconds", round(time.perf_counter() - started, 1))

    def first() -> Json:
        seen = finished.get("contamination")
        if told.compare and not finished:
            seen = contamination(loading.recipe, benchmark.asked, benchmark.pictures)
        return conclude(benchmark, how, kept, seconds, seen, told.judge)

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
    benchmark: Benchmark,
    how: How,
    kept: Records,
    seconds: float,
    seen: Json | None = None,
    judge: Judge | None = None,
) -> Json:
    """Scores the records, writes them in order and what was found."""
    records = kept.collect(benchmark.asked)
    judged = None
    if judge is not None and benchmark.task.judge is not None:
        columns = {asked.id: asked.columns for asked in benchmark.asked}
        path, console = kept.folder / VERDICTS, make_console(highlight=False, soft_wrap=True)
        judged = review(records, columns, benchmark.task.judge, render_prompt, judge, path, console)
    measured, blank = score(benchmark.task, records)
    summary: Json = {
        "benchmark": benchmark.name,
        "about": benchmark.task.about,
        "metric": benchmark.task.metric,
        "likelihood": how.likelihood,
        "fingerprint": kept.mark,
        "questions": len(records),
        "scores": totals_of(measured),
        "scores_blank": totals_of(blank) if blank else None,
        "kinds": by_kind(benchmark.task, records),
        "contamination": seen,
        "seconds": seconds,
    }
    if judged is not None:
        summary["judge"] = judged
    refused = [record["error"] for record in records if "error" in record]
    if refused:
        summary["refused"] = {"questions": len(refused), "first": refused[0]}
    kept.finish(records, summary)
    return summary
