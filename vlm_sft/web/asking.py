"""A question of the page → answers as they are written, by a server's pool: of each bundle, with pictures and blind."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..evaluation.pictures import grey
from ..rows.messages import image_part, text_part
from ..serving.app import Server, refusal_of
from ..serving.asked import Asked
from ..serving.prepare import prepare
from ..serving.writing import End, Piece, Writing
from .kept import check_text


@dataclass
class Said:
    """An answer on its way.

    Attributes:
        name: Of the bundle.
        blank: Whether the pictures were blanked.
        text: So far.
        reason: Why it has ended, as `End` has it; None while it goes on.
        fault: What went wrong, in a sentence.
    """

    name: str
    blank: bool
    text: str = ""
    reason: str | None = None
    fault: str = ""

    def take(self, what: Piece | End) -> None:
        """Goes on by a piece, or ends."""
        if isinstance(what, Piece):
            self.text += what.text
        else:
            self.reason = what.reason
            self.fault = str(refusal_of(what.error)) if what.error is not None else ""


async def ask(server: Server, question: str, pictures: Sequence[Path], blank: bool) -> AsyncIterator[list[Said]]:
    """Asks every bundle, and gives all answers each time that one of them goes on.

    Whoever closes the iterator before its end frees the places of the answers.

    Args:
        server: Bundles, pool and bounds.
        question: Text.
        pictures: Files; in front of the question.
        blank: Whether each is asked a second time, with grey pictures; nothing where there are no pictures.
    """
    said = [
        Said(name, blind) for name in server.served for blind in ((False, True) if blank and pictures else (False,))
    ]
    events: asyncio.Queue[tuple[Said, Piece | End]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    writings: list[Writing] = []

    def hand_over(each: Said, what: Piece | End) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(events.put_nowait, (each, what))

    try:
        for each in said:
            try:
                served = server.served[each.name]
                asked = _asked(question, pictures, each.blank)
                writing = await asyncio.to_thread(prepare, served, asked, server.rules, partial(hand_over, each))
                server.pool.ask(served, writing)
                writings.append(writing)
            except UserError as error:
                each.take(End("error", error))
                for number, picture in enumerate(pictures, 1):  # where it lies here is nobody's business
                    each.fault = each.fault.replace(f"the image {picture}", f"picture {number}, {picture.name},")
        yield said
        while any(each.reason is None for each in said):
            changed = [await events.get()]
            while not events.empty():
                changed.append(events.get_nowait())
            for each, what in changed:
                each.take(what)
            yield said
    finally:
        for writing in writings:
            server.pool.leave(writing)


def _asked(question: str, pictures: Sequence[Path], blank: bool) -> Asked:
    check_text(question, "The question")
    content = [*(image_part() for _ in pictures), *([text_part(question)] if question else [])]
    images: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        url = _GREY if blank else picture.as_uri()
        images.append({"url": url, "where": f"picture {number}"})
    return Asked(None, [{"role": "user", "content": content}], images)


_GREY = "data:image/png;base64," + base64.b64encode(grey()["bytes"]).decode()
