"""The rows of a run: read, looked over, mixed, and entered in the ledger, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.errors import UserError
from ..base.names import GROUPED, Json
from ..base.processes import cores_for_each, one_process_first, share_work
from ..base.words import counted
from ..data.ledger import Ledger, ledger_table
from ..rows.merging import fill, groups_of
from .row_check import Findings, describe_rows, look_over, summary

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from rich.console import Console
    from trl import SFTConfig

    from ..batch.collator import MultimodalCollator
    from ..data.dataset import SourceRows
    from ..recipe.schema import Recipe
    from ..recipe.sections import Data, Source


class RunRows(NamedTuple):
    """The rows of a run.

    Attributes:
        train: Training rows.
        eval: Evaluation rows, or None.
        notes: What goes into the bundle: `train_rows` and `eval_rows` as `summary` gives them, and `ledger`, which has
            `train` and `eval` as `Ledger.as_dict` gives them.
        lengths: Tokens of each training row, where the run groups or packs rows by them; else None.
        eval_lengths: Tokens of each evaluation row, where the run packs them; else None.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    notes: Json
    lengths: list[int] | None = None
    eval_lengths: list[int] | None = None


FIRST_ROWS = 1000  # rows of each source of a stream that are looked over before the first step


def load_rows(
    recipe: Recipe,
    collator: MultimodalCollator,
    args: SFTConfig,
    console: Console,
    seen: dict[str, Ledger] | None = None,
) -> RunRows:
    """Training rows, evaluation rows and the notes on them that go into the bundle.

    Every image file is looked for, and rows are measured and images decoded as `data.measure_rows` and
    `data.decode_rows` say, so that a long run does not end on a row that could have been named at once. Every process
    reads the rows and looks over a share of them; what one finds wrong is left out, or raised, in all.

    Args:
        recipe: The recipe, for its `data`.
        collator: Measures the rows; see `look_over`.
        args: For its seeds, the number of processes and, of a stream, of data-loader workers.
        console: Told how many rows there are and how long, and shown the ledger.
        seen: Filled with the ledgers, of a stream with that of its first rows, also where an error is raised.

    Raises:
        UserError: A source cannot be read, more rows are wrong than `data.max_rejected` allows, or there are fewer rows
            than processes.
    """
    data = recipe.data
    ledgers, notes = {"train": Ledger(data.max_rejected)}, {}
    seen = {} if seen is None else seen
    seen["train"] = Ledger(data.max_rejected) if data.streaming else ledgers["train"]
    seed = args.data_seed or args.seed
    packed, eval_packed = args.packing, args.packing if args.eval_packing is None else args.eval_packing
    grouped = (args.train_sampling_strategy == GROUPED or packed) and not data.streaming
    room = collator.max_length
    look = partial(_look_over, data=data, collator=collator, console=console)
    lengths: list[int] | None = None
    eval_lengths: list[int] | None = None
    if data.streaming:
        shards = args.world_size * max(1, args.dataloader_num_workers)
        first, ledger = seen["train"], ledgers["train"]
        train, notes["train_rows"] = _load_stream(data, first, ledger, look, console, seed=seed, shards=shards)
    else:
        look_at, ledger = partial(look, sampled=not grouped), ledgers["train"]
        train, notes["train_rows"], lengths = _load_set(
            "train", data.train, ledger, look_at, console, data.sampling, room=room, languages=data.languages, seed=seed
        )
        if (count := len(train)) < args.world_size:
            raise UserError(
                f"data.train has {counted(count, 'row')} but accelerate started {args.world_size} processes, so some "
                f"would have nothing to do; use --num_processes {count} or fewer."
            )
    rows = None
    if data.eval:
        ledgers["eval"] = seen["eval"] = Ledger(data.max_rejected)
        look_at = partial(look, sampled=not eval_packed)
        rows, notes["eval_rows"], eval_lengths = _load_set(
            "eval", data.eval, ledgers["eval"], look_at, console, "proportional", room=room, seed=args.seed
        )
    console.print(ledger_table(ledgers))
    notes["ledger"] = {name: ledger.as_dict() for name, ledger in ledgers.items()}
    return RunRows(train, rows, notes, lengths if grouped else None, eval_lengths if eval_packed else None)


def _load_stream(
    data: Data,
    first: Ledger,
    ledger: Ledger,
    look: Callable[..., list[Findings]],
    console: Console,
    *,
    seed: int,
    shards: int,
) -> tuple[IterableDataset, Json]:
    """Looks over the first rows of each source, into a ledger of their own; the others are met while training."""
    from ..data.dataset import read_source
    from ..data.ledger import SourceLedger
    from ..data.source import name_of
    from ..data.streaming import stream_mixture, too_few_rows

    beginnings = [
        source.model_copy(update={"max_rows": min(source.max_rows or FIRST_ROWS, FIRST_ROWS)}) for source in data.train
    ]
    parts = []
    for source in beginnings:
        name = name_of(source)
        reject, unused = first.rejecter(name), first.source(name).leave
        parts.append(read_source(source, seed=seed, reject=reject, unused=unused).rows)
    for source, beginning, part in zip(data.train, beginnings, parts, strict=True):
        whole = len(part) < (beginning.max_rows or 0) or beginning.max_rows == source.max_rows
        if whole and len(part) + first.source(name_of(source)).lost < shards:  # a rejected row is dealt like any other
            first.check(console, "train")
            raise too_few_rows(source, shards)
    findings = look("train", parts, seed=seed)
    for source, found in zip(data.train, findings, strict=True):
        found.write_to(first.source(name_of(source)))
        left = dict(first.source(name_of(source)).unused)
        ledger.sources[name_of(source)] = SourceLedger(streamed=True, unused=left)
    first.check(console, "train")
    rows = stream_mixture(
        data.train, seed=seed, buffer=data.shuffle_buffer, shards=shards, keep_rejected=data.max_rejected > 0
    )
    counts = {**summary(findings, 0), "rows": None}
    console.print(f"train: a stream, of which the first rows were measured: {describe_rows(counts)}", highlight=False)
    return rows, counts


def _load_set(
    name: str,
    sources: Sequence[Source],
    ledger: Ledger,
    look: Callable[..., list[Findings]],
    console: Console,
    sampling: str,
    *,
    room: int | None,
    languages: dict[str, float] | None = None,
    seed: int,
) -> tuple[Dataset, Json, list[int] | None]:
    """Reads, looks over and mixes the sources of a set; a rejected row is left out before the mixture is drawn.

    Returns:
        The mixture, its summary, and the length of each of its rows, where all rows were measured.
    """
    from ..base.progress import RowProgress
    from ..data.dataset import mix, read_source
    from ..data.row_cache import worth_waiting_for
    from ..data.source import name_of

    names = [name_of(source) for source in sources]

    def read() -> list[SourceRows]:
        parts = []
        with RowProgress(console, name) as progress:
            for source, own in zip(sources, names, strict=True):
                tell = partial(progress.tell, f"{own}: read", about=True)
                reject, unused, mixed = ledger.rejecter(own), ledger.source(own).leave, bool(languages)
                parts.append(read_source(source, seed=seed, reject=reject, languages=mixed, tell=tell, unused=unused))
        return parts

    try:
        parts = one_process_first(read) if any(worth_waiting_for(source) for source in sources) else read()
    except UserError:
        ledger.check(console, name)  # where no row of a source is left, the ledger says why
        raise
    merging = [number for number, source in enumerate(sources) if source.merge_by_image]
    findings = look(name, [part.rows for part in parts], seed=seed, whole=merging)
    for source_name, found in zip(names, findings, strict=True):
        found.write_to(ledger.source(source_name))
    ledger.check(console, name)
    left = [part.without({row.number for row in found.rejected}) for part, found in zip(parts, findings, strict=True)]
    members = [np.ones(len(part.rows), dtype=np.int64) for part in left]  # rows of the source in each row
    for number in merging:
        left[number], findings[number], groups = merge_source(
            left[number], findings[number], sources[number], partial(look, name, seed=seed), room=room, seed=seed
        )
        members[number] = np.array([len(group) for group in groups])
    rows, order = mix(left, sources, sampling, languages=languages, seed=seed)
    ends = np.cumsum([len(own) for own in members])
    for source_name, end, own in zip(names, ends, members, strict=True):
        drawn = order[(order >= end - len(own)) & (order < end)] - end + len(own)
        ledger.source(source_name).draw(drawn, own)
    counts = summary(findings, len(rows))
    console.print(f"{name}: {describe_rows(counts)}", highlight=False)
    lengths = [length for found in findings for length in found.lengths]
    whole = counts["measured"] == counts["read"]
    return rows, counts, [lengths[number] for number in order] if whole else None


def merge_source(
    part: SourceRows,
    found: Findings,
    source: Source,
    look: Callable[..., list[Findings]],
    *,
    room: int | None,
    seed: int,
) -> tuple[SourceRows, Findings, list[list[int]]]:
    """Merges rows of a source that are on the same pictures; what is longer than `room` after all is merged anew.

    Args:
        part: Its rows, all of which were measured.
        found: What is known of them.
        source: Says whether the questions see each other.
        look: `_look_over`, of all but the parts.
        room: `sft.max_length`.
        seed: Decides the order of the rows on a picture.

    Returns:
        The rows then, what is known of them, and the numbers of the rows that each was made of.

    Raises:
        UserError: The model or its template takes none of what was merged.
    """
    from datasets import concatenate_datasets

    from ..data.dataset import SourceRows, merge_keys, merged_rows

    keys = [None if lost else key for key, lost in zip(merge_keys(part, source.independent), found.turns, strict=True)]
    groups = groups_of(keys, seed)
    lengths, fronts = np.array(found.lengths, dtype=np.int64), np.array(found.fronts, dtype=np.int64)
    extra = 0
    if not source.independent and (pair := next((group[:2] for group in groups if len(group) > 1), None)):
        # A later turn brings tokens that stood before the picture when it was alone, such as who speaks.
        (probe,) = look([merged_rows(part.rows, [pair], False)], decode=False)
        extra = max([0, *(length - int(lengths[pair].sum() - fronts[pair[1]]) for length in probe.lengths)])
    todo = [filled for group in groups for filled in fill(group, lengths, fronts, room, extra)]
    tables, start, refused = [part.rows], len(part.rows), []
    done: list[tuple[list[int], int, int]] = []  # numbers of rows, the place of what was made of them, and its tokens
    while todo:
        done += [(group, group[0], int(lengths[group[0]])) for group in todo if len(group) == 1]
        if not (pending := [group for group in todo if len(group) > 1]):
            break
        tables.append(merged_rows(part.rows, pending, source.independent))
        (measured,) = look(tables[-1:], decode=False)
        refused += measured.rejected
        fit, todo = _settle(pending, measured)
        done += [(pending[place], start + place, tokens) for place, tokens in fit.items()]
        start += len(pending)
    if refused and all(len(group) == 1 for group, *_ in done):
        why = f'no rows of the source "{source.name}" can be merged by image: {refused[0].sentence}'
        raise UserError(f"{why.rstrip('.')}; remove `merge_by_image`.")
    done.sort(key=lambda each: min(each[0]))
    groups = [group for group, *_ in done]
    turns = [found.turns[group[0]] if len(group) == 1 else 0 for group in groups]
    rows = concatenate_datasets(tables).select([place for _, place, _ in done])
    languages = [part.languages[group[0]] for group in groups] if part.languages else []
    known = replace(found, lengths=[tokens for *_, tokens in done], turns=turns, fronts=[])
    return SourceRows(rows, languages), known, groups


def _settle(groups: Sequence[list[int]], measured: Findings) -> tuple[dict[int, int], list[list[int]]]:
    """The places of the groups that fit as they are, with their tokens; and into what the others are divided."""
    wrong = {row.number for row in measured.rejected}
    good = iter(zip(measured.lengths, measured.turns, strict=True))
    fit: dict[int, int] = {}
    left: list[list[int]] = []
    for place, group in enumerate(groups):
        if place in wrong:
            left += [[number] for number in group]
            continue
        tokens, lost = next(good)
        if not lost:
            fit[place] = tokens
            continue
        kept = max(1, len(group) - lost)  # a row keeps one turn at least
        left += [group[:kept], group[kept:]]
    return fit, left


def _look_over(
    name: str,
    parts: Sequence[Dataset],
    *,
    seed: int,
    data: Data,
    collator: MultimodalCollator,
    console: Console,
    sampled: bool = True,
    whole: Collection[int] = (),
    decode: bool = True,
) -> list[Findings]:
    """Looks over the rows of each source, shared by all processes and their cores, and says how far it is.

    `sampled` False: all rows are measured, whatever `data.measure_rows` says; `whole` are the numbers of parts of which
    they are in any case. `decode` False: no image is opened.
    """
    from ..base.progress import RowProgress

    cores = cores_for_each()
    with RowProgress(console, name) as progress:

        def look(part: Dataset, measure: int | None, process: int, processes: int) -> Findings:
            def tell(doing: str, done: int, of: int, what: str) -> None:
                progress.tell(doing, done * processes, of * processes, what, about=processes > 1)

            return look_over(
                part,
                collator,
                measure=measure,
                decode=data.decode_rows if decode else 0,
                seed=seed,
                share=(process, processes),
                cores=cores,
                tick=tell,
            )

        # One source after the other, so that of several errors the one that is raised is the first in their order.
        counts = [None if number in whole or not sampled else data.measure_rows for number in range(len(parts))]
        return [
            Findings.of_shares(share_work(partial(look, part, count)))
            for part, count in zip(parts, counts, strict=True)
        ]
