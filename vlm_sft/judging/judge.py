"""A judge: many prompts at a time, each asked for once, and what that cost."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from rich.console import Console

from ..base.errors import RowError, UserError
from ..base.names import Json, Options, Values
from ..base.progress import RowProgress
from .server import ChatServer, Message, Reply
from .verdicts import Kept, key_of

PATIENCE = 8  # prompts that may be refused before one is answered: then the fault is not theirs


@dataclass
class Judge:
    """Who judges, and how it is asked.

    Attributes:
        url: See `ChatServer`.
        model: Its name there.
        key: See `ChatServer`.
        price: Of a million tokens asked, and of a million answered; None where nobody said.
        requests: How many at a time.
        settings: For the server, over those of the benchmark; None leaves one out.
    """

    url: str
    model: str
    key: str | None = None
    price: tuple[float, float] | None = None
    requests: int = 8
    settings: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks at the address and the key before anything else is done."""
        with closing(ChatServer(self.url, self.model, self.key)) as server:
            self.shown = server.shown


@dataclass
class Cost:
    """What verdicts cost.

    Attributes:
        asked: Sent to the server now.
        kept: Found on the disk.
        prompt_tokens: Of all, as the server counted them.
        completion_tokens: Of all.
        paid_prompt_tokens: Of those sent now.
        paid_completion_tokens: Of those sent now.
        uncounted: Verdicts of which the server did not say it.
    """

    asked: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    paid_prompt_tokens: int = 0
    paid_completion_tokens: int = 0
    uncounted: int = 0

    def add(self, reply: Reply, now: bool) -> None:
        """Counts one."""
        tokens, said = reply.prompt_tokens or 0, reply.completion_tokens or 0
        self.asked, self.kept = self.asked + now, self.kept + (not now)
        self.prompt_tokens += tokens
        self.completion_tokens += said
        self.paid_prompt_tokens += tokens * now
        self.paid_completion_tokens += said * now
        self.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None

    def report(self, price: tuple[float, float] | None) -> Json:
        """As it is written: with `cost`, of all verdicts, and `paid`, of those sent now, in the money of the prices."""
        found: Json = dict(vars(self))
        if price is not None:
            found["cost"] = _money(self.prompt_tokens, self.completion_tokens, price)
            found["paid"] = _money(self.paid_prompt_tokens, self.paid_completion_tokens, price)
        return found


def _money(asked: int, said: int, price: tuple[float, float]) -> float:
    return round((asked * price[0] + said * price[1]) / 1e6, 6)


def ask_all(
    judge: Judge, prompts: Sequence[Sequence[Message]], settings: Values, path: Path, console: Console
) -> tuple[list[Reply | RowError], Cost]:
    """What a judge says to each of many prompts.

    Args:
        judge: Who is asked.
        prompts: Messages of each; alike ones are asked once.
        settings: Of the benchmark.
        path: File of verdicts: those in it are not asked for again, and new ones are added as they come.
        console: Where to say how far it is.

    Returns:
        The reply to each, or why the server refuses it; and the cost of the different ones.

    Raises:
        UserError: The server cannot be asked, or refuses everything.
    """
    settings = {**settings, **judge.settings}
    keys = [key_of(judge.model, messages, settings) for messages in prompts]
    wanted = dict(zip(keys, prompts, strict=True))
    refused: dict[str, RowError] = {}
    cost = Cost()
    with Kept(path) as kept, RowProgress(console, "judge") as progress:
        missing = {key: messages for key, messages in wanted.items() if key not in kept.replies}
        for key in wanted.keys() - missing.keys():
            cost.add(kept.replies[key], now=False)
        count = progress.counter("judged", len(missing), "answers")
        server = ChatServer(judge.url, judge.model, judge.key)
        with closing(ask_together(server, missing, settings, judge.requests)) as replies:
            for key, found in replies:
                count(1)
                if isinstance(found, RowError):
                    refused[key] = found
                    if len(refused) >= PATIENCE and not cost.asked:
                        raise UserError(str(found))
                else:
                    kept.add(key, judge.model, found)
                    cost.add(found, now=True)
        if refused and not kept.replies.keys() & wanted.keys():
            raise UserError(str(next(iter(refused.values()))))
        return [refused.get(key) or kept.replies[key] for key in keys], cost


def ask_together(
    server: ChatServer, prompts: Mapping[str, Sequence[Message]], settings: Values, most: int
) -> Generator[tuple[str, Reply | RowError]]:
    """Asks several prompts at a time, and gives each reply as it comes, or why the server refuses it.

    Args:
        server: Asked, and closed at the end.
        prompts: Key → messages.
        settings: For the server.
        most: How many at a time.

    Raises:
        UserError: It cannot be asked.
    """
    todo: SimpleQueue[tuple[str, Sequence[Message]]] = SimpleQueue()
    done: SimpleQueue[tuple[str, Reply | BaseException]] = SimpleQueue()

    def work() -> None:
        with suppress(Empty):
            while True:
                key, messages = todo.get_nowait()
                try:
                    done.put((key, server.complete(messages, settings)))
                except RowError as error:
                    done.put((key, error))
                except BaseException as error:  # it is raised where somebody waits for it
                    done.put((key, error))
                    return

    for item in prompts.items():
        todo.put(item)
    for _ in range(min(most, len(prompts))):
        # A program that ends waits for none of them: a server may take minutes to answer what nobody waits for.
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in prompts:
            key, found = done.get()
            if isinstance(found, BaseException) and not isinstance(found, RowError):
                raise found
            yield key, found
    finally:
        server.close()  # what was not asked yet is not asked any more
