"""`vlm-sft serve`: bundles behind an address, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..base.console import make_console, say
from ..base.errors import UserError
from ..base.limits import READERS
from ..base.names import Options
from ..base.words import reason_of
from ..inference.settings import check_options
from .access import VARIABLE, is_local, read_key
from .app import Server
from .bundles import load_bundles
from .meters import Meters
from .pool import Pool
from .prepare import Rules

PATIENCE = 30.0  # seconds for answers that are being written when the server is told to end


def serve(
    bundles: Sequence[str],
    rules: Rules,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 16,
    queue: int = 256,
    key_file: str | None = None,
    options: Options | None = None,
    trust_remote_code: bool = False,
    patience: float = PATIENCE,
) -> None:
    """Answers until it is told to end; then what is being written is finished, within `patience` seconds.

    Args:
        bundles: Folders, or repositories of the Hub.
        rules: Bounds on requests.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        batch_size: Answers written at a time.
        queue: Questions that may wait beside them.
        key_file: File with the key that clients must send; else the environment may say one.
        options: For transformers' `generate`, over the recipes' `generation`.
        trust_remote_code: See `vlm_sft.load`.
        patience: Seconds.

    Raises:
        UserError: A bundle, an option, the key or the address is wrong.
    """
    check_options(options or {})
    key = read_key(key_file)
    console = make_console(highlight=False, soft_wrap=True)
    with listening(host, port) as heard:
        with console.status("Loading"):
            served = load_bundles(bundles, options or {}, trust_remote_code, lambda text: say(console, text))
        if beams := [each.name for each in served.values() if (each.own.get("num_beams") or 1) > 1]:
            say(console, f"{', '.join(beams)}: answers are written with one beam here, not the recipe's num_beams.")
        meters = Meters()
        server = Server(served, Pool(batch_size, queue, meters), meters, rules, key, is_local(host))
        at = f"http://{f'[{host}]' if ':' in host else host}:{heard.getsockname()[1]}"
        say(console, f"{', '.join(served)}: {at}/v1 answers as OpenAI's API does. Ctrl-C stops it.")
        if key is None and not server.local:
            say(
                console,
                f"Everyone who reaches {host} can ask, because there is no key: set {VARIABLE} or --api-key-file, or "
                "listen on 127.0.0.1.",
            )
        run_until_told(server.app(), server, heard, patience, lambda text: say(console, text))


def run_until_told(
    app: ASGIApp,
    server: Server,
    heard: socket.socket,
    patience: float,
    told: Callable[[str], None],
    end: Callable[[], None] = lambda: None,
) -> None:
    """Answers at a socket until SIGTERM or Ctrl-C; then what is being written is finished, within `patience` seconds.

    Args:
        app: What answers.
        server: Its pool, and whether it is stopping.
        heard: The socket.
        patience: Seconds.
        told: Is told what happens at the end.
        end: Called when it is told to end, for what `app` would keep open.
    """
    config = uvicorn.Config(
        app, http=punctual(server.rules.seconds), log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=round(patience) + 10, timeout_keep_alive=30, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    _Uvicorn(config, server, patience, told, end).run([heard])
    server.pool.close()
    server.pool.join(patience)


def punctual(seconds: float) -> type[H11Protocol]:
    """The protocol of uvicorn, which waits without end for the head of a request, with an end to that.

    Args:
        seconds: In which the head must have come, from the connection or the answer before it on. What a client has
            connected and does not ask, takes one of the files that this process may open.
    """

    class Punctual(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._since = self.loop.time()
            if len(self.connections) > READERS.connections:
                transport.abort()
                return
            self._look()

        def on_response_complete(self) -> None:
            self._since = self.loop.time()
            super().on_response_complete()

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            waits = self.cycle is None or self.cycle.response_complete
            left = self._since + seconds - self.loop.time() if waits else seconds
            if left <= 0:
                self.transport.abort()
                return
            self.loop.call_later(left, self._look)

    return Punctual


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, taken before weights are read.

    Raises:
        UserError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as heard:
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            heard.bind((host, port))
        except (OSError, OverflowError) as error:
            unknown = isinstance(error, socket.gaierror)
            mend = "correct --host" if unknown else "choose another --port, or 0 for a free one"
            raise UserError(f"{host}, port {port}, cannot be listened on ({reason_of(error)}): {mend}.") from None
        yield heard


class _Uvicorn(uvicorn.Server):
    """Ends when answers have ended: new questions are refused at once, and what is written has so many seconds."""

    def __init__(
        self,
        config: uvicorn.Config,
        server: Server,
        patience: float,
        told: Callable[[str], None],
        end: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._answers, self._patience, self._told, self._end = server, patience, told, end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but the signal is not raised again: a server that was told to end has not failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for an end, a second one wants it now."""
        if self._answers.stopping:
            self._answers.pool.close()
        else:
            self._answers.stopping = True
            timer = threading.Timer(self._patience, self._answers.pool.close)
            timer.daemon = True
            timer.start()
            self._end()
        self.should_exit = True
