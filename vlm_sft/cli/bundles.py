"""The commands on a bundle: ask it, measure it, look into its run, export it, share it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from ..base.console import for_a_program, make_console, quiet_libraries, tell
from ..base.errors import UserError
from ..train import Json, Trust
from .arguments import Boxes, Bundle, ImageFolders, LocalBundle, Options, RunFolder, settings_of

bundles_app = typer.Typer()


@bundles_app.command()
def chat(
    bundle: Bundle,
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="Ask this and exit; without it, a conversation starts.", show_default=False
        ),
    ] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="Image to talk about; may be repeated.")] = None,
    boxes: Boxes = None,
    video: Annotated[list[str] | None, typer.Option("--video", help="Video to talk about; may be repeated.")] = None,
    options: Options = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Talk about images and videos. In the conversation: /image PATH, /video PATH, /reset, /quit."""
    quiet_libraries()  # before the first heavy import
    from ..inference.chat import chat as run

    if as_json and question is None:
        raise UserError("--json prints the answer to one question; give a QUESTION, or leave --json out.")
    with for_a_program(as_json) as give:
        answer = run(
            bundle,
            images=image or [],
            question=question,
            options=settings_of(options),
            trust_remote_code=trust_remote_code,
            boxes=boxes,
            videos=video or [],
        )
        give({"question": question, "answer": answer})


@bundles_app.command()
def generate(
    bundle: Bundle,
    questions: Annotated[str, typer.Argument(metavar="QUESTIONS", help="File of questions.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL file, one answer a line; a rerun resumes it.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    images: Annotated[str | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    image_folder: ImageFolders = None,
    boxes: Boxes = None,
    options: Options = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a file of questions in batches."""
    quiet_libraries()
    from ..inference.answer_file import generate as run

    with for_a_program(as_json) as give:
        give(
            run(
                bundle,
                input=questions,
                output=output,
                batch_size=batch_size,
                images=images,
                image_folders=image_folder or (),
                options=settings_of(options),
                trust_remote_code=trust_remote_code,
                boxes=boxes,
            )
        )


@bundles_app.command("debug-batch", short_help="Show the rows of a step that went wrong, one by one.")
def debug_batch(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option(help="Which step; default the last one that was written down.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Bundle to look with; default the newest before it.")] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show the rows of a step whose loss was not finite or jumped, one by one."""
    quiet_libraries()
    from ..recipe.left_out import leave_out_bitsandbytes_of

    leave_out_bitsandbytes_of(checkpoint or folder)
    from ..watching.debug_batch import run

    with for_a_program(as_json) as give:
        give(run(folder, step=step, checkpoint=checkpoint, trust_remote_code=trust_remote_code))


@bundles_app.command(short_help="Write a bundle for transformers, vLLM or llama.cpp.")
def export(
    bundle: Bundle,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="transformers, vllm, gguf or bundle-merged.")] = "transformers",
    keep_adapter: Annotated[bool, typer.Option("--keep-adapter", help="Leave LoRA unmerged, in OUT/adapter.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default as in training, of gguf float16.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of gguf, the language model in fewer bits, like q4_k_m.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a bundle as a native checkpoint, LoRA merged; its logits are compared in a fresh process."""
    quiet_libraries()
    from ..base.progress import waiting
    from ..export.export import export as run

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype must be float32, bfloat16 or float16, not {dtype}.")
    with waiting(make_console(), f"Writing {out} and comparing its logits"):
        found = run(bundle, out, to, keep_adapter=keep_adapter, dtype=dtype, quantize=quantize,
                    trust_remote_code=trust_remote_code)  # fmt: skip
    if as_json:
        with for_a_program(as_json) as give:
            give({"out": out, **found})
        return
    for line in found.get("differences", []):
        tell(line, stderr=True)
    tell(
        f"{out}: logits of {found['positions']} positions, compared in a fresh process, differ from the bundle's by at "
        f"most {found['max_difference']:.2g} (allowed {found['tolerance']:.2g})."
    )
    if rounded := found.get("quantised"):
        tell(
            f"In {rounded['name']} the language model has {rounded['bytes'] / 1e9:.3g} GB in place of "
            f"{rounded['bytes_before'] / 1e9:.3g}; llama.cpp then picks the bundle's token at {rounded['same']} of "
            f"{rounded['of']} of an answer about one picture (mean KL divergence {rounded['kl']:.2g})."
        )


@bundles_app.command()
def push(
    bundle: LocalBundle,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="name/repository on the Hub.", show_default=False)],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default as your account has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="What the commit says.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Push questions and answers of the test set too.")] = False,
    as_json: Json = False,
) -> None:
    """Put a bundle on the Hugging Face Hub, with its card."""
    quiet_libraries()
    from huggingface_hub.utils import enable_progress_bars

    from ..base.progress import waiting
    from ..bundle.hub import push_bundle

    enable_progress_bars() if sys.stderr.isatty() else None
    # At the terminal the Hub's own bars are shown.
    with for_a_program(as_json) as give:
        with nullcontext() if sys.stderr.isatty() else waiting(make_console(), f"Pushing to {repo}"):
            address = push_bundle(bundle, repo, private=private, revision=revision, message=message, rows=rows)
        tell(address)
        give({"address": address})
