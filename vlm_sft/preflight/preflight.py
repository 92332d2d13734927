"""`vlm-sft preflight RECIPE`: before any GPU hour, one page that shows what will be trained on, and a real step."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.console import for_a_program, make_console, say
from ..base.errors import UserError
from ..base.names import PREFLIGHT_PAGE

if TYPE_CHECKING:
    from rich.console import Console
    from trl import SFTConfig

    from ..batch.collator import MultimodalCollator
    from ..data.look_alikes import LookAlikes
    from ..families.kind import Composed
    from ..recipe.schema import Recipe
    from ..training.run_rows import RunRows
    from .checks import Evidence
    from .freeze_proof import Proof
    from .launch import Launch
    from .page import Report


def preflight(recipe: Recipe, launch: Launch, console: Console, *, output: Path, with_model: bool = True) -> Report:
    """Looks at rows and model of a recipe, and writes what it found.

    Args:
        recipe: A validated recipe. Nothing is written into its `sft.output_dir`.
        launch: The processes that will train it, for time and memory; preflight itself is one process.
        console: Told how far it is.
        output: The page.
        with_model: Reads the weights and takes real steps.

    Returns:
        What the page shows; its `verdict` is `error` where the training will go wrong.

    Raises:
        UserError: The recipe is wrong, a source or a piece cannot be had, or the page cannot be written.
    """
    from ..base.progress import waiting
    from ..bundle.handover import settle_adapter
    from ..data.dataset import load_source
    from ..recipe.libraries import build_sft_config, validate_libraries
    from ..training.build_trainer import build_collator
    from .checks import Evidence, check
    from .dry_run import on_any_machine
    from .page import Report, render_page
    from .pairs import compare_looks, show_pairs
    from .samples import look_at, shares_of_languages, shares_of_sources, show_samples

    _check_output(output)
    validate_libraries(recipe)
    recipe = settle_adapter(recipe, planned=True)
    # Wrong rows are left out here and judged by the recipe's own threshold, so that the page shows all of them.
    tolerant = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_rejected": 1.0})})
    args = build_sft_config(recipe if with_model else on_any_machine(recipe))
    composed = _compose(recipe, args.max_length)
    collator = build_collator(tolerant, composed.processor, args)
    evidence = Evidence()
    name = Path(recipe.path).stem if recipe.path else "recipe"
    report = Report(name, recipe.to_yaml(), evidence=evidence, max_length=args.max_length)
    rows = _load(tolerant, recipe, collator, args, evidence, console)
    if rows is not None:
        # Training never reads the rows of `data.test`.
        test = (load_source(source, seed=args.seed, reject=lambda error: None) for source in recipe.data.test)
        train, held_out = rows[0], [*([rows[1]] if rows[1] else []), *test]
        with waiting(console, "Looking at texts and images"):
            look_at(evidence, collator, train, held_out, recipe.data.train)
            every = train if recipe.data.streaming is False else evidence.rows
            evidence.look_alikes = compare_looks(every, held_out, recipe.data.look_images, args.seed)
            report.pairs = show_pairs(evidence.look_alikes)
            report.samples = show_samples(evidence.rows, collator)
        report.sources = shares_of_sources(recipe.data, evidence.ledgers["train"], evidence.rows)
        report.languages = shares_of_languages(recipe.data, evidence.rows)
    report.lengths = _lengths(recipe, collator, args.seed, console)
    settled = _weigh(recipe, launch, report, console)
    if rows is not None and with_model:
        _take_steps(tolerant.model_copy(update={"sft": settled.sft}), collator, composed, evidence, console)
        report.time = _time(evidence.proof, args, launch, rows) if evidence.proof else []
    report.left_out += _left_out(recipe, rows is not None, with_model, evidence.look_alikes)
    report.findings = check(evidence)
    output.write_text(render_page(report), encoding="utf-8")
    return report


def _compose(recipe: Recipe, max_length: int | None) -> Composed:
    """The model before any weight is read, which rows, answers and LoRA of the recipe suit."""
    from ..bundle.handover import check_adapter
    from ..stack.fit import check_texts
    from ..stack.kinds import compose

    composed = compose(recipe)
    check_texts(composed.config, composed.processor, max_length)
    check_adapter(recipe, composed)
    return composed


def _load(
    tolerant: Recipe,
    recipe: Recipe,
    collator: MultimodalCollator,
    args: SFTConfig,
    evidence: Evidence,
    console: Console,
) -> RunRows | None:
    """The rows, and the ledgers by the recipe's own threshold; None where no row of a source is left."""
    from ..data.ledger import Ledger
    from ..training.run_rows import load_rows

    seen: dict[str, Ledger] = {}
    rows = None
    try:
        rows = load_rows(tolerant, collator, args, console, seen)
    except UserError as error:
        if not any(source.lost for ledger in seen.values() for source in ledger.sources.values()):
            raise
        evidence.failed = str(error)
    evidence.ledgers = {name: Ledger(recipe.data.max_rejected, ledger.sources) for name, ledger in seen.items()}
    return rows


def _lengths(recipe: Recipe, collator: MultimodalCollator, seed: int, console: Console) -> list[int]:
    """Uncut lengths of the first rows of each training source, also of rows that are too long to be used."""
    from ..base.progress import waiting
    from ..data.dataset import load_source
    from .samples import MEASURED, whole_lengths

    found: list[int] = []
    for source in recipe.data.train:
        first = source.model_copy(update={"max_rows": min(source.max_rows or MEASURED, MEASURED)})
        try:
            rows = load_source(first, seed=seed, reject=lambda error: None)
        except UserError:
            continue  # none of its first rows can be read, which the ledger says
        with waiting(console, f"Measuring rows of {source.name}"):
            found += whole_lengths(list(rows), collator)
    return found


def _weigh(recipe: Recipe, launch: Launch, report: Report, console: Console) -> Recipe:
    """Fills in freeze plan and memory, from sizes alone; gives the recipe with its checkpointing settled by them."""
    from ..base.progress import waiting
    from .dry_run import memory_here, settle_checkpointing, weigh

    with waiting(console, "Counting the memory of a step"):
        recipe, decided = settle_checkpointing(recipe, launch, memory_here())
        weighed = weigh(recipe, launch)
    if decided:
        say(console, decided)
    report.plan, report.memory = weighed.rows, weighed.estimate
    if (room := memory_here()) is not None:
        report.evidence.memory = (weighed.estimate.total, room)
    return recipe


def _take_steps(
    recipe: Recipe, collator: MultimodalCollator, composed: Composed, evidence: Evidence, console: Console
) -> None:
    """Trains some steps through the trainer of the recipe, into a folder that is removed."""
    import pyarrow as pa
    from datasets import Dataset, Features, Value

    from ..base.console import quiet_libraries
    from ..base.progress import waiting
    from ..data.dataset import ROW_FEATURES
    from ..recipe.libraries import build_sft_config
    from ..rows.messages import IN_EXTRAS, each_once, packed
    from ..training.build_trainer import build_trainer
    from ..training.run_rows import RunRows
    from .freeze_proof import MOST, SETTINGS, prove

    folder = tempfile.TemporaryDirectory(prefix="vlm-sft-preflight-", ignore_cleanup_errors=True)
    with folder as output_dir, waiting(console, "Loading the pieces and taking real steps"):
        settings = {name: value for name, value in recipe.sft.items() if name != "warmup_ratio"}
        sft = {**settings, **SETTINGS, "output_dir": output_dir}
        # A tower that is proven frozen must be there, so no cache stands in for it.
        changed = recipe.model_copy(update={"sft": sft, "cache": None})
        args = build_sft_config(changed)
        args._n_gpu = min(args.n_gpu, 1)  # preflight is one process on one GPU, whatever there is
        quiet_libraries()
        # Without an image nothing reaches the projector; a mixture has rows without, and any batch may be of these.
        shown = [row for row in evidence.rows if row["images"]] or evidence.rows
        count = MOST * args.train_batch_size
        some = [shown[i * max(1, len(shown) // count) % len(shown)] for i in range(count)]
        features = Features({**ROW_FEATURES, IN_EXTRAS: Value("string")})
        kept = [{**each_once(row), IN_EXTRAS: row.get(IN_EXTRAS) or packed(each_once(row))} for row in some]
        rows = Dataset(pa.Table.from_pylist(kept, schema=features.arrow_schema))  # without what `extras` say
        try:
            trainer = build_trainer(changed, args, collator, RunRows(rows, None, {}), composed, partial(say, console))
            evidence.proof = prove(trainer)
        except UserError as error:
            evidence.stopped = str(error)


def _time(proof: Proof, args: SFTConfig, launch: Launch, rows: RunRows) -> list[str]:
    """How long the run would take at the speed of the last real step."""
    from ..batch.by_length import pack

    batch = args.train_batch_size * args.gradient_accumulation_steps * launch.processes
    given = args.max_steps > 0
    unit, count = "rows", 0 if given else len(rows.train)
    if args.packing:
        unit, count = "packs", len(pack(rows.lengths or [], args.max_length))
    steps = args.max_steps if given else math.ceil(math.ceil(count / batch) * args.num_train_epochs)
    seconds = steps * args.gradient_accumulation_steps * proof.seconds_per_step
    return [
        f"About {_duration(seconds)} for {steps:,} steps of {batch:,} {unit} on {launch}, if each process is as fast "
        f"as this machine: a pass of {proof.rows} {unit} took {proof.seconds_per_step:.3g} s on {proof.device} "
        f"({proof.tokens_per_second:,.0f} tokens a second), measured in step {proof.steps} of this preflight; "
        f"evaluations, saves and the wait for other processes come on top."
    ]


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h` or `2.1 days`."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _left_out(recipe: Recipe, has_rows: bool, with_model: bool, look_alikes: LookAlikes | None) -> list[str]:
    """Sentences on what was not looked at."""
    found = []
    if not has_rows:
        found.append("No row was left to look at, so samples, lengths and real steps are left out.")
    elif not with_model:
        found.append("--no-model: no weight was read and no step was taken, so nothing is proven of the freeze plan.")
    if has_rows and recipe.data.streaming:
        found.append("data.streaming: only the first rows of the stream were looked at, also for shared images.")
    if has_rows and recipe.data.eval + recipe.data.test:
        if look_alikes is None:
            found.append("data.look_images: 0: images were compared byte for byte and not by look.")
        else:
            found += look_alikes.left_out()
    return found


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output / PREFLIGHT_PAGE}.")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist; make it first.")


def run_preflight(
    recipe: str,
    overrides: list[str],
    *,
    output: str = PREFLIGHT_PAGE,
    with_model: bool = True,
    accelerate_config: str | None = None,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Runs preflight and prints what it found.

    Args:
        recipe: A YAML file, or the name of a recipe that ships.
        overrides: `key.path=value` each.
        output: Where the page goes.
        with_model: Reads the weights and takes real steps.
        accelerate_config: The processes that will train.
        as_json: Prints verdict, findings and time as JSON, on standard output.
        trust_remote_code: Lets base pieces run the Python code that they bring, where the recipe asks for it.

    Raises:
        SystemExit: With code 1 where the training will go wrong.
    """
    from ..recipe.opening import open_recipe
    from .launch import read_launch

    loaded = open_recipe(recipe, overrides, trust_remote_code)
    console = make_console()
    page = Path(output)
    report = preflight(loaded, read_launch(accelerate_config), console, output=page, with_model=with_model)
    for line in [*map(str, report.findings), *report.time, f"Page: {page}"]:
        say(console, line)
    with for_a_program(as_json) as give:
        found = [asdict(finding) for finding in report.findings]
        memory = report.memory.total if report.memory else None
        give({"verdict": report.verdict, "findings": found, "time": report.time, "memory": memory, "page": str(page)})
    if report.verdict == "error":
        raise SystemExit(1)
