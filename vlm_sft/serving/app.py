"""The server's addresses: `/v1/models`, `/v1/chat/completions`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..base.console import tell
from ..base.errors import UserError
from .access import check_host, check_key
from .asked import Asked, as_refusal, read_body
from .bundles import Served
from .meters import Meters
from .pool import Pool
from .prepare import Rules, find, prepare
from .refusal import Refusal, busy, closing
from .replies import Reply, dumped, event, listed, usage_of
from .writing import End, Piece, Share, Writing

Events = asyncio.Queue[Piece | End]
JSON = "application/json"
OPEN = 8  # all open requests together may hold so many times what one may have


@dataclass
class Server:
    """What the addresses share.

    Attributes:
        served: Bundles by name.
        pool: Answers.
        meters: Counts.
        rules: Bounds on requests.
        key: That clients must send; None: none.
        local: Whether it listens on this machine alone.
        stopping: Whether it is told to end.
        inside: Requests that are read, wait or are answered.
        held: Bytes of their bodies.
    """

    served: Mapping[str, Served]
    pool: Pool
    meters: Meters
    rules: Rules
    key: str | None = None
    local: bool = True
    stopping: bool = False
    inside: int = field(default=0, init=False)
    held: int = field(default=0, init=False)

    def app(self) -> Starlette:
        """For uvicorn."""
        routes = [
            Route("/health", self._guarded(self.health, key=False), methods=["GET"]),
            Route("/metrics", self._guarded(self.metrics), methods=["GET"]),
            Route("/v1/models", self._guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self.models), methods=["GET"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_address})
        app.router.redirect_slashes = False
        return app

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]], key: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                if self.local:
                    check_host(request.headers)
                if key:
                    check_key(request.headers, self.key)
                return await answer(request)
            except ClientDisconnect as error:
                if not isinstance(error, _Left):
                    self.meters.gone()
                return Response(status_code=499)
            except Exception as error:
                return refused(error)

        return guarded

    async def health(self, request: Request) -> Response:
        """Whether questions are answered: for whoever starts and stops servers."""
        if self.stopping or not self.pool.alive:
            raise closing()
        return Response(dumped({"status": "ok"}), media_type=JSON)

    async def metrics(self, request: Request) -> Response:
        """The counts."""
        return Response(self.meters.text(*self.pool.counts()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """All bundles, or one."""
        if name := request.path_params.get("name"):
            found = find(self.served, name)
            return Response(dumped(listed(found.name, found.began)), media_type=JSON)
        told = [listed(each.name, each.began) for each in self.served.values()]
        return Response(dumped({"object": "list", "data": told}), media_type=JSON)

    async def chat(self, request: Request) -> Response:
        """A question and its answer."""
        began, model, status = time.monotonic(), "", 499
        most = self.pool.queue + self.pool.batch_size
        if self.stopping or self.inside >= most:
            full = busy(f"{most:,} requests are open already: ask again in some seconds.", 2)
            refusal = closing() if self.stopping else full
            self.meters.answered(model, refusal.status, 0.0)
            raise refusal
        self.inside += 1
        handed_on, data = False, bytearray()

        def done(code: int) -> None:
            self.inside -= 1
            self.held -= len(data)
            self.meters.answered(model, code, time.monotonic() - began)

        try:
            await self._read(request, data)
            asked = await asyncio.to_thread(read_body, bytes(data))
            served = find(self.served, asked.model)
            model = served.name
            answer = await self._begin(request, served, asked, began)
            if asked.stream:
                await answer.first()
                handed_on = True
                return Stream(answer.events(), self.rules.seconds, (answer.close, partial(done, 200)))
            try:
                response = Response(dumped(await answer.whole()), media_type=JSON)
            finally:
                answer.close()
            status = 200
            return response
        except Exception as error:
            status = refusal_of(error).status if not isinstance(error, ClientDisconnect) else 499
            raise
        finally:
            if not handed_on:
                done(status)

    async def _read(self, request: Request, data: bytearray) -> None:
        """Reads the body of a request, of which no more is held than may be.

        Raises:
            Refusal: It is too large, comes too slowly, or is called something other than JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:  # which a page in a browser cannot send here without being asked whether it may
            raise Refusal(f"The body is called {kind[:40] or 'nothing'}: send it as Content-Type: {JSON}.", 415)
        most, told = self.rules.body_bytes, request.headers.get("content-length", "")
        too_large = told.isdecimal() and len(told) < 20 and int(told) > most
        chunks = request.stream()
        try:
            async with asyncio.timeout(self.rules.seconds):
                while not too_large and (chunk := await anext(chunks, None)) is not None:
                    if too_large := len(data) + len(chunk) > most:
                        break
                    if self.held + len(chunk) > OPEN * most:
                        raise busy("The bodies of the open requests are too large together: ask again later.", 5)
                    self.held += len(chunk)
                    data += chunk
        except TimeoutError:
            said = f"The body has not come within {self.rules.seconds:g} seconds: send it again."
            raise Refusal(said, 408) from None
        if too_large:
            raise Refusal(f"The body has more than {most:,} bytes: send fewer or smaller images.", 413)

    async def _begin(self, request: Request, served: Served, asked: Asked, began: float) -> Answer:
        events: Events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_over(what: Piece | End) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, what)

        writing = await asyncio.to_thread(prepare, served, asked, self.rules, hand_over)
        answer = Answer(self, served, asked, writing, events, began)
        self.pool.ask(served, writing)
        answer.watch = asyncio.create_task(answer.wait_for_leaving(request))
        return answer


class Answer:
    """An answer on its way to its client."""

    def __init__(
        self, server: Server, served: Served, asked: Asked, writing: Writing, events: Events, began: float
    ) -> None:
        self._server, self._served, self._asked, self._writing = server, served, asked, writing
        self._events, self._began = events, began
        self._reply = Reply(served.name)
        self._next: Piece | End | None = None
        self.watch: asyncio.Task[None] | None = None

    async def wait_for_leaving(self, request: Request) -> None:
        """Frees the place of an answer whose client has left."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._server.pool.leave(self._writing)
        self._events.put_nowait(End("gone", _Left()))

    async def first(self) -> None:
        """Waits for the first piece, so that what goes wrong before it has a status of its own.

        Raises:
            Exception: What went wrong.
        """
        self._next = await self._take()

    async def _take(self) -> Piece | End:
        what, self._next = (self._next, None) if self._next is not None else (await self._events.get(), None)
        if self._began and isinstance(what, Piece):
            self._server.meters.first(time.monotonic() - self._began)
            self._began = 0.0
        if isinstance(what, End) and what.error is not None:
            self.close()
            raise what.error
        return what

    async def whole(self) -> dict[str, object]:
        """The answer at once."""
        texts: list[str] = []
        shares: list[Share] = []
        while isinstance(what := await self._take(), Piece):
            texts.append(what.text)
            shares += what.shares
        likely = None if self._asked.likely is None else shares
        return self._reply.whole("".join(texts), what.reason, self._usage(), likely)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it is written."""
        try:
            yield event(self._reply.piece({"role": "assistant", "content": ""}))
            while isinstance(what := await self._take(), Piece):
                likely = None if self._asked.likely is None else what.shares
                yield event(self._reply.piece({"content": what.text}, shares=likely))
            yield event(self._reply.piece({}, what.reason))
            if self._asked.usage:
                yield event(self._reply.counts(self._usage()))
        except ClientDisconnect:
            return
        except Exception as error:
            yield event(refusal_of(error).body())
        yield b"data: [DONE]\n\n"

    def _usage(self) -> dict[str, object]:
        return usage_of(len(self._writing.chat.input_ids), len(self._writing.ids))

    def close(self) -> None:
        """The end, whatever it was."""
        if self.watch is None:
            return
        self.watch.cancel()
        self.watch = None
        if self._writing.gone or self._writing.ended is None:
            self._server.meters.gone()
        self._server.pool.leave(self._writing)
        self._server.meters.tokens(self._served.name, len(self._writing.chat.input_ids), len(self._writing.ids))


class _Left(ClientDisconnect):
    """A client that left while its answer was written, which is counted where that ends."""


class Stream(Response):
    """Events of a stream, each sent when it is there.

    Args:
        events: What is sent.
        seconds: In which a client must have taken an event; one that reads no more is taken for gone.
        done: Called at the end, whatever it was.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], seconds: float, done: Sequence[Callable[[], None]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._done = events, seconds, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for each in self._events:
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return
        finally:
            for end in self._done:
                end()


def refusal_of(error: Exception) -> Refusal:
    """What a client hears of an error; what is a fault of the program is told where the server runs."""
    if isinstance(error, UserError):
        return as_refusal(error)
    tell("".join(traceback.format_exception(error)), stderr=True)
    return Refusal("The server has failed on this question; its log says at what.", 500)


def refused(error: Exception) -> Response:
    """An error as a response."""
    said = refusal_of(error)
    headers = said.headers() | ({"connection": "close"} if said.status in (408, 413) else {})
    return Response(dumped(said.body()), said.status, headers, JSON)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "There is nothing at this address" if error.status_code == 404 else "This address is not asked in this way"
    return refused(Refusal(f"{what}: ask POST /v1/chat/completions or GET /v1/models.", error.status_code))
