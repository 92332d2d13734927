"""The command that puts bundles behind an address."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ..base.console import quiet_libraries
from ..base.errors import UserError
from ..train import Trust
from .arguments import ImageFolders, Options, bundle_of, settings_of

serving_app = typer.Typer()


@serving_app.command(short_help="Answer as OpenAI's API does.")
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE…", help="Folders that training runs wrote, or repositories of the Hub.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the key; or set VLM_SFT_API_KEY.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Questions that may wait beside them.")] = 256,
    image_folder: ImageFolders = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images of public http(s) URLs.")] = False,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a request's images together.")] = 50_000_000,
    max_request_mb: Annotated[int, typer.Option(min=1, help="Most megabytes of a request.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    patience: Annotated[float, typer.Option(min=0, help="Seconds that answers have to end after SIGTERM.")] = 30.0,
    engine: Annotated[
        str, typer.Option(help="own; or vllm or transformers, started on a folder that `export` wrote.")
    ] = "own",
    options: Options = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer as OpenAI's API does: chat completions with images, on this machine alone unless told otherwise."""
    from ..export.servers import ENGINES, start
    from ..serving.access import is_local, read_key

    if engine not in ENGINES:
        raise UserError(f"--engine must be one of {', '.join(ENGINES)}, not {engine}.")
    if engine != "own":
        if len(bundles) > 1 or options:
            what = "several folders" if len(bundles) > 1 else "--set"
            raise UserError(f"--engine {engine} takes no {what} from here: leave it out, or start {engine} yourself.")
        start(engine, bundles[0], host, port, read_key(api_key_file), local=is_local(host), images=max_images,
              batch_size=batch_size, allow_urls=allow_urls,
              image_folders=tuple(image_folder or ()), trust_remote_code=trust_remote_code)  # fmt: skip
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise UserError("The server needs two more packages: pip install 'vlm-sft[serve]'.")
    for each in bundles:
        bundle_of(each)
    quiet_libraries()
    from ..serving.prepare import Rules, fetcher
    from ..serving.serve import serve as run

    rules = Rules(tuple(image_folder or ()), fetcher() if allow_urls else None, max_images, max_pixels,
                  max_request_mb * 2**20, tokens=max_tokens)  # fmt: skip
    run(bundles, rules, host, port, batch_size, queue, api_key_file, settings_of(options), trust_remote_code, patience)


@serving_app.command(short_help="Ask bundles about pictures in a browser; keep answers.")
def web(
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE", help="Folder that a training run wrote, or a repository of the Hub.", show_default=False
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="A second one, asked the same beside it.", show_default=False)
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="FOLDER", help="Data set for the answers that you keep, with their pictures.")
    ] = "kept",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the browser's password; or set VLM_SFT_API_KEY.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Questions that may wait beside them.")] = 32,
    max_images: Annotated[int, typer.Option(min=1, help="Most pictures of a question.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a question's pictures together.")] = 50_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    options: Options = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page where people ask about pictures, see the answer with and without them, compare two bundles and keep
    answers as rows to train on; on this machine alone unless told otherwise."""
    if find_spec("gradio") is None:
        raise UserError("The page needs Gradio, which is not installed: pip install 'vlm-sft[web]'.")
    bundles = [bundle_of(each) for each in (bundle, other) if each is not None]
    quiet_libraries()
    from ..web.kept import folder_for
    from ..web.serve import web as run

    run(bundles, folder_for(keep), host, port, batch_size, queue, api_key_file, settings_of(options), trust_remote_code,
        max_images, max_pixels, max_tokens)  # fmt: skip
