"""The program that `accelerate launch -m vlm_sft.train RECIPE [key.path=value …]` runs: one recipe, one stage."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .base.assets import list_recipes
from .base.console import for_a_program, make_console, say, tell
from .base.errors import UserError, exit_on_user_error, first_to_say
from .base.interrupts import Interrupts
from .base.names import CURVES, METRICS
from .base.processes import (
    SPLITTING,
    hold_folder,
    leave_process_group,
    let_threads_sleep,
    on_first_process,
    refuse_split_rows,
    refuse_strangers,
)
from .base.whole_files import read_text, write_json
from .spoken.catalogue import translated

if TYPE_CHECKING:
    from rich.console import Console
    from trl import SFTConfig

    from .batch.collator import MultimodalCollator
    from .families.kind import Composed
    from .recipe.schema import Recipe
    from .training.part_trainer import PartTrainer
    from .training.pushes import PushCallback


def _recipes(incomplete: str) -> list[str]:
    """What a shell proposes for a recipe: those that ship, and YAML files."""
    files = sorted(glob.glob(f"{glob.escape(incomplete)}*.yaml")) + sorted(glob.glob(f"{glob.escape(incomplete)}*/"))
    return [name for name in list_recipes() if name.startswith(incomplete)] + files


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a recipe that ships.",
        show_default=False,
        autocompletion=_recipes,
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Set any key of the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, for a program.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let base pieces run Python code that they bring.")]


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Runs the stage that a recipe describes and writes its bundle.

    What is cheap to check is checked first; weights are read when recipe, folders and every row are in order.

    Args:
        recipe: A validated recipe.
        resume: Go on from the newest whole checkpoint in `sft.output_dir`; start where there is none.

    Returns:
        The folder of the bundle.

    Raises:
        UserError: Anything a user can mend.
    """
    from .base.progress import waiting
    from .bundle.handover import settle_adapter
    from .bundle.hub import check_access
    from .bundle.run_folder import settle_resume, sweep
    from .during.while_training import WhileTraining
    from .machine.activations import settle_activations
    from .preflight.samples import glance
    from .training.build_trainer import build_collator, build_trainer
    from .training.checkpointing import check_resumption
    from .training.run_rows import load_rows

    with _own_folder(recipe) as (args, console):
        settle_resume(args, resume=resume, say=partial(say, console))
        recipe = settle_adapter(recipe, args.resume_from_checkpoint)
        if args.resume_from_checkpoint:
            check_resumption(recipe, args.resume_from_checkpoint, partial(say, console))
        on_first_process(partial(sweep, args.output_dir))
        if recipe.hub:
            on_first_process(partial(check_access, recipe.hub.repo_id))
        during = WhileTraining(recipe, partial(say, console))
        composed = _compose(recipe, args)
        collator = build_collator(recipe, composed.processor, args)
        rows = load_rows(recipe, collator, args, console)
        for finding in on_first_process(partial(glance, rows[0], composed.processor, recipe.data.train)):
            say(console, str(finding))
        settle_activations(recipe, args, partial(say, console))
        with waiting(console, "Loading the pieces"):
            trainer = build_trainer(recipe, args, collator, rows, composed, partial(say, console))
        console.print(trainer.plan.table(trainer.model))
        during.attach(trainer)
        pushes = _pushes(recipe, trainer, console)
        with _progress(trainer, console):
            with _until_a_signal(trainer, pushes):
                trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or None)
            if trainer.eval_dataset is not None and args.eval_strategy == "no" and not trainer.save_points.evaluated:
                trainer.save_points.save_bundle()  # first: a run that is killed in its evaluation is not lost
                trainer.evaluate()
        folder = during.finish(finish(trainer, collator, console))
        if pushes is not None and trainer.is_world_process_zero():
            pushes.finish(folder)
        return folder


def _compose(recipe: Recipe, args: SFTConfig) -> Composed:
    """The model before any weight is read, which answers, LoRA and what is saved at the end suit."""
    from .bundle.handover import check_adapter
    from .bundle.save import check_savable
    from .stack.fit import check_texts
    from .stack.kinds import compose

    composed = compose(recipe)
    check_texts(composed.config, composed.processor, args.max_length)
    check_adapter(recipe, composed, args.resume_from_checkpoint)
    check_savable(composed.processor)
    return composed


def finish(trainer: PartTrainer, collator: MultimodalCollator, console: Console) -> Path:
    """Writes bundle, metrics and curves, then proves in a fresh process that the bundle gives the same logits."""
    from .base.progress import waiting
    from .batch.collator import REJECTED, SEEN
    from .bundle.card import write_card
    from .bundle.curves import draw_curves
    from .bundle.parity import check_parity, probe_logits
    from .data.streaming import first_rows

    folder = Path(trainer.args.output_dir)
    trainer.save_points.save_bundle()
    model = trainer.accelerator.unwrap_model(trainer.model)
    collator.kept = None  # what is proven is the bundle, which has no cache
    batch = collator(first_rows(trainer.train_dataset, 4))  # of the first training rows
    batch = {name: value for name, value in batch.items() if name not in (REJECTED, SEEN)}
    probe = batch if trainer.prefix is None else trainer.prefix.for_parity(batch, trainer.args.device)
    logits = probe_logits(model, probe)  # on every process: each may hold a share of the weights
    if trainer.prefix is not None:
        trainer.prefix.release()
    trainer.release()  # the fresh process needs the room
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        write_json(folder / METRICS, history, indent=1)
        curves = draw_curves(history, folder / CURVES, title=folder.name)
        with waiting(console, "Loading the bundle in a fresh process to compare its logits"):
            parity = check_parity(folder, model, batch, logits)
        write_card(folder)
        difference = f"largest difference of a logit {parity['max_difference']:.2g}"
        say(console, f"Parity: reloaded in a fresh process, {parity['positions']} positions, {difference}.")
        say(console, f"Bundle: {folder}\nCurves: {curves}")
    trainer.accelerator.wait_for_everyone()
    return folder


def check_processes(args: SFTConfig) -> None:
    """Refuses to run several times beside each other into one folder, where the processes did not find each other.

    Raises:
        UserError: The launcher started several processes, but there is one to train with; or none was used where there
            are several GPUs, of which torch would make one with `DataParallel`; or they would share single rows out.
    """
    said = {name: os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") for name in SPLITTING}
    refuse_split_rows(said, "parallelism_config of `accelerate launch`")
    if args.n_gpu > 1:
        raise UserError(
            f"There are {args.n_gpu} GPUs but no launcher, so one process would share its batches out; use `accelerate "
            f"launch -m vlm_sft.train RECIPE`, or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    refuse_strangers(args.world_size)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, freeze plan and memory; read no weights.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; start if none is there.")
    ] = False,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Dry run: for the processes of this config file of accelerate.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train one stage in this process; for several, use: accelerate launch -m vlm_sft.train RECIPE."""
    from .recipe.opening import open_recipe

    if accelerate_config and not dry_run:
        raise UserError("--accelerate-config belongs to --dry-run; to train, use: accelerate launch --config_file.")
    stage = open_recipe(recipe, overrides, trust_remote_code)
    if dry_run:
        from .preflight.dry_run import dry_run as show
        from .preflight.launch import read_launch

        with for_a_program(as_json) as give:
            give(show(stage, read_launch(accelerate_config), make_console(stderr=False)))
        return
    try:
        with for_a_program(as_json) as give:
            folder = train(stage, resume)
            if as_json:
                give({"bundle": str(folder), **_last_numbers(folder)})
    except KeyboardInterrupt:
        sentence = "Stopped at once; what was saved before is whole: go on with --resume."
        if first_to_say(sentence):
            tell(translated(sentence), stderr=True)
        raise SystemExit(130) from None
    leave_process_group()


def _last_numbers(folder: Path) -> dict[str, float]:
    """The last of each number that a run wrote down, as `metrics.json` beside its bundle names them."""
    last: dict[str, float] = {}
    for row in json.loads(read_text(folder / METRICS)):
        last |= row
    return last


def launcher(command: Callable[..., None], name: str) -> Callable[..., None]:
    """A program for `accelerate launch` that runs one command of `vlm-sft`.

    It takes arguments (default: those of the process), and raises SystemExit where the command does not end well; with
    code 2 for what the user can mend.

    Args:
        command: With the annotations of typer.
        name: What its help calls it.
    """

    def main(argv: list[str] | None = None) -> None:
        let_threads_sleep()
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command()(command)
        with exit_on_user_error():
            try:
                app(argv, prog_name=name)
            except SystemExit as ended:
                if ended.code:
                    raise

    return main


main = launcher(run, "python -m vlm_sft.train")


@contextmanager
def _own_folder(recipe: Recipe) -> Iterator[tuple[SFTConfig, Console]]:
    """The settings of a run and its console, while no other run may write to its folder."""
    from .recipe.libraries import build_sft_config, validate_libraries

    console = make_console()
    validate_libraries(recipe)
    args = build_sft_config(recipe)
    if recipe.sft.get("bf16") is None and not args.fp16:
        can = "this device can" if args.bf16 else "this device has no bf16"
        say(console, f"Computing in {'bf16' if args.bf16 else 'fp32'}: the recipe does not say sft.bf16, and {can}.")
    check_processes(args)
    with ExitStack() as held:
        on_first_process(partial(held.enter_context, hold_folder(args.output_dir, partial(say, console))))
        yield args, console


def _pushes(recipe: Recipe, trainer: PartTrainer, console: Console) -> PushCallback | None:
    """What pushes the saves of a run to the Hub, where the recipe asks for it."""
    if recipe.hub is None:
        return None
    from .training.pushes import PushCallback

    options = recipe.hub.model_dump(include={"every_save", "private", "revision", "message"})
    pushes = PushCallback(recipe.hub.repo_id, partial(say, console), **options)
    trainer.add_callback(pushes)
    return pushes


@contextmanager
def _progress(trainer: PartTrainer, console: Console) -> Iterator[None]:
    """Our progress bar in place of transformers'; an error leaves the terminal as it was."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from .during.run_log import RunLog
    from .training.progress import RichProgress

    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    bar = RichProgress(console)
    trainer.add_callback(bar)
    trainer.add_callback(RunLog(trainer))
    try:
        yield
    finally:
        bar.close()


@contextmanager
def _until_a_signal(trainer: PartTrainer, pushes: PushCallback | None) -> Iterator[None]:
    """What trains inside is saved and stopped by Ctrl-C (exit code 130) or SIGTERM (143).

    Args:
        trainer: What trains.
        pushes: What pushes to the Hub, if anything does; after a signal it has a last, bounded attempt.
    """
    from .bundle.run_folder import PREFIX

    with Interrupts() as trainer.interrupts:
        yield
        step = trainer.state.global_step
        if trainer.interrupted and trainer.is_world_process_zero():
            tell(f"Saved at step {step:,}; go on with --resume.", stderr=True)
            if pushes is not None:
                pushes.stop(Path(trainer.args.output_dir) / f"{PREFIX}{step}", step)
    if trainer.interrupted:
        trainer.accelerator.wait_for_everyone()  # a process that ended first would make the launcher end the others
        leave_process_group()
        raise SystemExit(trainer.interrupts.exit_code)


if __name__ == "__main__":
    main()
