"""Keeps a page of runs true while they go on: as a file and, where asked for, on a port of this machine alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..base.errors import UserError
from ..base.names import RUN_PAGE
from ..base.whole_files import write_whole
from ..base.words import reason_of
from .page import run_page
from .runs import read_runs

LOOPBACK = "127.0.0.1"


def watch(
    folders: Sequence[str],
    output: str | None,
    every: int,
    once: bool,
    port: int | None,
    say: Callable[[str], None],
) -> Path:
    """Writes the page, and writes it again until no run goes on.

    Args:
        folders: Of the runs.
        output: The page; default `run.html` in the folder of the first.
        every: Seconds between two pages.
        once: One page alone.
        port: Serve it on this port of the loopback address, until Ctrl-C; 0 for a free one.
        say: Told where the page is.

    Returns:
        The page.

    Raises:
        UserError: A folder is no run, the page cannot be written, or the port is taken.
    """
    runs = read_runs(folders)
    target = Path(output).expanduser() if output else runs[0].folder / RUN_PAGE
    alive = not once and any(run.state == "running" for run in runs)
    _write(target, run_page(runs, every if alive or port is not None else None))
    say(f"The page of {len(runs)} runs: {target}" if len(runs) > 1 else f"The run's page: {target}")
    server = None if port is None else _serve(folders, every, port)
    try:
        if server is not None:
            address = f"{LOOPBACK}:{server.server_address[1]}"
            say(f"Also at http://{address}/ – from another machine: ssh -L {address.rpartition(':')[2]}:{address} HOST")
        if alive:
            say(f"Written again every {every} s while the run goes on; Ctrl-C ends this, and not the run.")
        while alive or (server is not None and not once):
            time.sleep(every)
            runs = read_runs(folders)
            alive = any(run.state == "running" for run in runs)
            _write(target, run_page(runs, every if alive or server is not None else None))
    except KeyboardInterrupt:
        pass
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    return target


def _write(target: Path, page: str) -> None:
    try:
        # What is half a character becomes a question mark: no file can hold it.
        write_whole(target, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({reason_of(error)}): give another --output.") from None


def _serve(folders: Sequence[str], every: int, port: int) -> ThreadingHTTPServer:
    """A server in the background that makes the page anew for each request."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site must not read this one under a name of its own.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if self.path != "/" or host not in (LOOPBACK, "localhost"):
                self.send_error(404)
                return
            try:
                body = run_page(read_runs(folders), every).encode("utf-8", "replace")
            except UserError as error:
                self.send_error(503, "the run cannot be read", str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Says nothing of each request."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Page)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port {port} cannot be used ({reason_of(error)}); take another, or 0 for a free one."
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="watch", daemon=True).start()
    return server
