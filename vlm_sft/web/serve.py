"""`vlm-sft web`: bundles of a server behind a page, until it is told to end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.console import make_console, say
from ..inference.settings import check_options
from ..serving.access import VARIABLE, is_local, read_key
from ..serving.app import Server
from ..serving.bundles import load_bundles
from ..serving.meters import Meters
from ..serving.pool import Pool
from ..serving.prepare import Rules
from ..serving.serve import PATIENCE, listening, run_until_told

PICTURE_BYTES = 32 * 2**20


def web(
    bundles: Sequence[str],
    keep: Path,
    host: str = "127.0.0.1",
    port: int = 7860,
    batch_size: int = 8,
    queue: int = 32,
    key_file: str | None = None,
    options: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    max_images: int = 8,
    max_pixels: int = 50_000_000,
    max_tokens: int = 1024,
) -> None:
    """Shows the page until it is told to end; pictures that were uploaded are removed then.

    Args:
        bundles: One or two; folders, or repositories of the Hub.
        keep: Folder for the rows that people keep.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        batch_size: Answers written at a time.
        queue: Questions that may wait beside them.
        key_file: File with the key that a browser must send as its password; else the environment may say one.
        options: For transformers' `generate`, over the recipes' `generation`.
        trust_remote_code: See `vlm_sft.load`.
        max_images: The most of a question.
        max_pixels: The most of all pictures of a question.
        max_tokens: The most of an answer.

    Raises:
        UserError: A bundle, an option, the key or the address is wrong.
    """
    check_options(options or {})
    key = read_key(key_file)
    console = make_console(highlight=False, soft_wrap=True)
    with listening(host, port) as heard, tempfile.TemporaryDirectory(prefix="vlm-sft-web-") as uploads:
        folder = Path(uploads).resolve()
        # Before it is imported: Gradio reads them then, and asks its makers' hosts for its newest version otherwise.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.as_posix()}
        with console.status("Loading"):
            served = load_bundles(bundles, options or {}, trust_remote_code, lambda text: say(console, text))
        meters = Meters()
        rules = Rules((folder.as_posix(),), None, max_images, max_pixels, tokens=max_tokens)
        server = Server(served, Pool(batch_size, queue * 4, meters), meters, rules, key, is_local(host))
        app, end = make_app(server, keep, folder, batch_size, queue)
        at = f"http://{f'[{host}]' if ':' in host else host}:{heard.getsockname()[1]}/"
        say(console, f"{', '.join(served)}: open {at} in a browser. Ctrl-C stops it. Answers that you keep: {keep}")
        if not server.local:
            who = f"Everyone who reaches {host} can ask and keep answers, because there is no key: set {VARIABLE} or "
            asks = "The browser asks for a name and a password: any name, and the key."
            say(console, asks if key else who + "--api-key-file, or listen on 127.0.0.1.")
        run_until_told(app, server, heard, PATIENCE, lambda text: say(console, text), end)


def make_app(server: Server, keep: Path, uploads: Path, batch_size: int, queue: int) -> tuple[Any, Any]:
    """The page as an application of ASGI, and what ends the connections that it holds open.

    `GRADIO_TEMP_DIR` must lead to `uploads`.
    """
    import gradio as gr
    from fastapi import FastAPI
    from starlette.routing import Mount

    from .guard import Guard
    from .kept import Kept
    from .page import FONTS, STYLE, make_page

    page, words = make_page(server, Kept(keep), batch_size, queue)
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, "/", i18n=words, theme=theme, css=STYLE,
        footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        max_file_size=PICTURE_BYTES, show_error=True,
    )  # fmt: skip
    mounted: Any = next(route.app for route in app.routes if isinstance(route, Mount))
    return Guard(app, uploads, server.key, server.local), mounted.stop_event.set
