"""The console command `vlm-sft`. Parses and delegates; torch and transformers are imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import UserError, exit_on_user_error
from ..base.names import PREFLIGHT_PAGE
from .data import data_app
from .recipes import recipes_app

app = typer.Typer(
    help="Instruction tuning for vision-language models: train, chat, generate, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships.", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Set any key of the recipe.")]


def _bundle(value: str) -> str:
    """Says that a folder is no bundle before torch is imported, which takes seconds."""
    from ..bundle.run_folder import find_manifest

    if Path(value).exists() or value.partition("@")[0].count("/") != 1:  # else it may be on the Hub
        find_manifest(value)
    return value


def _local_bundle(value: str) -> str:
    from ..bundle.run_folder import find_manifest

    find_manifest(value)
    return value


def _run(value: str) -> str:
    from ..bundle.run_folder import find_records

    find_records(value)
    return value


Bundle = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        callback=_bundle,
        help="Folder that a training run wrote, or name/repository[@revision] on the Hub.",
        show_default=False,
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let base pieces run Python code that they bring.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Generation setting, like max_new_tokens=64; may be repeated."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.command(short_help="Train one stage, as a recipe describes it.")
def train(
    recipe: Recipe,
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
    trust_remote_code: Trust = False,
) -> None:
    """Train one stage in this process; for several, use: accelerate launch -m vlm_sft.train RECIPE."""
    from ..train import main as train_main

    flags = [*(["--dry-run"] if dry_run else []), *(["--resume"] if resume else [])]
    flags += ["--trust-remote-code"] if trust_remote_code else []
    flags += ["--accelerate-config", accelerate_config] if accelerate_config else []
    train_main([recipe, *(overrides or []), *flags])


@app.command(short_help="Look at data and model before the GPU hour; write a page.")
def preflight(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The page to write.")] = PREFLIGHT_PAGE,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Look at rows and sizes alone; read no weights.")
    ] = False,
    accelerate_config: Annotated[
        str | None, typer.Option(help="Estimate time and memory for the processes of this config file of accelerate.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Look at the data, take a real step, and write a page with what will be trained on; exit code 1 if it fails."""
    from ..preflight.preflight import run_preflight

    run_preflight(
        recipe,
        overrides or [],
        output=output,
        with_model=not no_model,
        accelerate_config=accelerate_config,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def chat(
    bundle: Bundle,
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="Ask this and exit; without it, a conversation starts.", show_default=False
        ),
    ] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="Image to talk about; may be repeated.")] = None,
    options: Options = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk about images. In the conversation: /image PATH, /reset, /quit."""
    from ..base.console import quiet_libraries

    quiet_libraries()  # before the first heavy import
    from ..inference.chat import chat as run

    settings = _settings(options)
    run(bundle, images=image or [], question=question, options=settings, trust_remote_code=trust_remote_code)


@app.command()
def generate(
    bundle: Bundle,
    questions: Annotated[str, typer.Argument(metavar="QUESTIONS", help="File of questions.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL file, one answer a line; a rerun resumes it.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    images: Annotated[str | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    options: Options = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a file of questions in batches."""
    from ..base.console import quiet_libraries

    quiet_libraries()
    from ..inference.answer_file import generate as run

    run(
        bundle,
        input=questions,
        output=output,
        batch_size=batch_size,
        images=images,
        options=_settings(options),
        trust_remote_code=trust_remote_code,
    )


@app.command()
def evaluate(
    bundle: Bundle,
    split: Annotated[str, typer.Option(help="Which of the recipe's data to use: test or eval.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Default: eval.json in the bundle.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each source.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the data from this recipe, not the bundle's own.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a bundle on held-out data."""
    from ..inference.evaluate import run

    run(
        bundle,
        split=split,
        batch_size=batch_size,
        output=output,
        max_rows=max_rows,
        recipe=recipe,
        trust_remote_code=trust_remote_code,
    )


@app.command("debug-batch", short_help="Show the rows of a step that went wrong, one by one.")
def debug_batch(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", callback=_run, help="A run's output_dir.", show_default=False)
    ],
    step: Annotated[int | None, typer.Option(help="Which step; default the last one that was written down.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Bundle to look with; default the newest before it.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show the rows of a step whose loss was not finite or jumped, one by one."""
    from ..base.console import quiet_libraries

    quiet_libraries()
    from ..training.debug_batch import run

    run(folder, step=step, checkpoint=checkpoint, trust_remote_code=trust_remote_code)


@app.command(short_help="Write a bundle for transformers or vLLM, LoRA merged.")
def export(
    bundle: Bundle,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="transformers, vllm or bundle-merged.")] = "transformers",
    keep_adapter: Annotated[bool, typer.Option("--keep-adapter", help="Leave LoRA unmerged, in OUT/adapter.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as in training.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a bundle as a native checkpoint, LoRA merged; its logits are compared in a fresh process."""
    from ..base.console import quiet_libraries

    quiet_libraries()
    from ..export.export import export as run

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype must be float32, bfloat16 or float16, not {dtype}.")
    found = run(bundle, out, to, keep_adapter=keep_adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    typer.echo(
        f"{out}: logits of {found['positions']} positions, compared in a fresh process, differ from the bundle's by at "
        f"most {found['max_difference']:.2g} (allowed {found['tolerance']:.2g})."
    )


@app.command("apply-delta", short_help="Make a language model from a published delta.")
def apply_delta(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the delta was made from.", show_default=False)],
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What is published.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    tables: Annotated[
        str | None,
        typer.Option(
            help="Embeddings and head of the delta: whole (Ziya) or sum (Vicuna). Unset: compared with the base."
        ),
    ] = None,
) -> None:
    """Put a language model together that is published as a delta (Ziya-LLaMA, Vicuna), shard by shard."""
    from ..pieces.delta import apply_delta as run

    done = run(base, delta, out, tables, say=typer.echo)
    how = "the delta's own, not added" if done["tables"] == "whole" else "added, as everything else"
    rows = "".join(f"; {name} has {more} rows more than the base" for name, more in done["rows_added"].items())
    typer.echo(
        f"{out}: {done['tensors']} tensors, {done['summed']} of them base + delta; embeddings and head: {how}{rows}; "
        f"{done['left_out']} computed tables left out; {done['bytes'] / 1e9:.2f} GB in {done['shards']} shards."
    )


@app.command()
def push(
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE", callback=_local_bundle, help="Folder that a training run wrote.", show_default=False
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="name/repository on the Hub.", show_default=False)],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default as your account has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="What the commit says.")] = None,
) -> None:
    """Put a bundle on the Hugging Face Hub, with its card."""
    from ..base.console import quiet_libraries

    quiet_libraries()
    from huggingface_hub.utils import enable_progress_bars

    from ..bundle.hub import push_bundle

    enable_progress_bars() if sys.stderr.isatty() else None
    typer.echo(push_bundle(bundle, repo, private=private, revision=revision, message=message))


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """`["max_new_tokens=64"]` → `{"max_new_tokens": 64}`, values read as in a recipe."""
    from ..recipe.yaml_file import parse_assignment

    settings = {}
    for assignment in assignments or []:
        if "=" not in assignment:
            raise UserError(f"--set {assignment} is not understood; write KEY=VALUE, like --set max_new_tokens=64.")
        path, value = parse_assignment(assignment)
        settings[".".join(map(str, path))] = value
    return settings


def main() -> None:
    """Entry point of the console command: a `UserError` becomes one line on stderr and exit code 2."""
    with exit_on_user_error():
        app()


if __name__ == "__main__":
    main()
