"""A question of a client → an answer that can be written: its bundle, its pictures, its prompt, its bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..base.errors import UserError
from ..base.limits import limits
from ..base.names import ImageEntry, Options
from ..base.words import closest, counted, short
from ..batch.pictures import picture_size
from ..inference.generation import PromptTooLongError, check_length, encode_question, position_limit
from ..inference.settings import DEFAULTS, check_options
from ..reading.fetch import Fetcher
from ..reading.image_refs import Folders, is_url, resolve_image
from .asked import Asked
from .bundles import Served
from .refusal import Refusal
from .writing import End, Piece, Writing, how_drawn

LETTERS = 16  # characters of a token on average, at most
_ENCODING = threading.Lock()  # `Served.reader` is asked by one thread at a time


@dataclass(frozen=True)
class Rules:
    """Bounds on requests.

    Attributes:
        image_folders: In which files may be named; none: no file may.
        fetch: Gives the file of a URL; None: no URL may be named.
        images: The most of a request.
        pixels: The most of all images of a request.
        body_bytes: The most of a request; of all that are open, `OPEN` times as many.
        seconds: In which a body must have come.
        tokens: The most of an answer.
    """

    image_folders: tuple[str, ...] = ()
    fetch: Callable[[str], str] | None = None
    images: int = 16
    pixels: int = 50_000_000
    body_bytes: int = 64 * 2**20
    seconds: float = 60.0
    tokens: int = 4096


def fetcher() -> Callable[[str], str]:
    """What fetches the images of URLs, for `Rules`."""
    return Fetcher()


def find(served: Mapping[str, Served], name: str | None) -> Served:
    """The bundle of a name; without one, the only one there is.

    Raises:
        Refusal: There is none of that name, or there are several.
    """
    if name in served:
        return served[str(name)]
    there = ", ".join(served)
    if name is None:
        if len(served) == 1:
            return next(iter(served.values()))
        raise Refusal(f"model is missing: there are {there}.", param="model")
    near = closest(name, served)
    meant = f"did you mean {near}?" if near else f"there is {there}."
    raise Refusal(f"There is no model {short(name)!r}; {meant}", 404, param="model", code="model_not_found")


def prepare(served: Served, asked: Asked, rules: Rules, tell: Callable[[Piece | End], None]) -> Writing:
    """An answer to be written.

    Args:
        served: Who is asked.
        asked: What.
        rules: Bounds.
        tell: See `Writing`.

    Raises:
        UserError: It cannot be asked.
    """
    if len(asked.images) > rules.images:
        shown = counted(len(asked.images), "image")
        raise Refusal(f"The messages show {shown}; at most {rules.images:,} are taken: leave some out.")
    most = served.own.get("max_new_tokens") or served.answers.max_new_tokens or DEFAULTS["max_new_tokens"]
    most = min(most, rules.tokens) if asked.most is None else asked.most
    if most > rules.tokens:
        raise Refusal(f"max_tokens is {most:,}; at most {rules.tokens:,} are written.", param="max_tokens")
    settings = _drawn(served, asked)
    row = {"messages": asked.messages, "images": [_image(entry, rules) for entry in asked.images]}
    pixels = sum(width * height for width, height in map(picture_size, row["images"]))
    if pixels > (allowed := min(rules.pixels, limits().image_pixels)):
        raise Refusal(f"The images have {pixels:,} pixels together; at most {allowed:,} are taken: send smaller ones.")
    limit = position_limit(served.model)
    said = sum(len(part["text"] or "") for message in asked.messages for part in message["content"])
    if limit is not None and said > LETTERS * limit:  # told without counting tokens, which takes seconds of millions
        what = f"The messages have {said:,} characters, but the language model reads at most {limit:,} tokens"
        raise Refusal(f"{what}: shorten them.", code="context_length_exceeded")
    with _ENCODING:
        chat = encode_question(served.reader, row)
    if chat.num_images < len(row["images"]):
        raise Refusal("This model's prompts have no place for all of the images: give fewer.")
    try:
        check_length(served.model, len(chat.input_ids))
    except PromptTooLongError as error:
        raise Refusal(str(error), code="context_length_exceeded") from None
    if limit is not None:
        most = min(most, limit - len(chat.input_ids))
    stop = [*served.stops, *asked.stop]
    draw = how_drawn(settings, asked.seed)
    return Writing(chat, row, most, served.processor, tell, stop, draw, asked.likely)


def _drawn(served: Served, asked: Asked) -> Options:
    """What is said about drawing: by the client over the bundle's recipe, as `vlm_sft.answer` understands it."""
    own = {name: value for name, value in served.own.items() if name in SAID}
    if not asked.options:
        return own if own.get("do_sample") or "do_sample" not in own else {"do_sample": False}
    check_options({name: value for name, value in asked.options.items() if value or name == "temperature"})
    return {**own, **asked.options, "do_sample": True}


SAID = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")


def _image(entry: ImageEntry, rules: Rules) -> ImageEntry:
    """An image of a message → one of a row.

    Raises:
        UserError: It may not be read, or is none.
    """
    url, where = entry["url"], entry["where"]
    detail = {"detail": entry["detail"]} if entry.get("detail") is not None else {}
    if is_url(url) and not url.startswith(("file://", "data:")):
        if rules.fetch is None or not url.lower().startswith(("http://", "https://")):
            mend = "send the image itself as data:image/png;base64,…, or start the server with --allow-urls"
            raise Refusal(f"{where} is a URL and no URL is fetched: {mend}.", param=where)
        try:
            found = rules.fetch(url)
        except UserError as error:
            raise Refusal(f"{where}: {error}", param=where) from None
        return resolve_image({"path": found, **detail}, None, where, within=Folders([found.rpartition("/")[0]]))
    if not url.startswith("data:") and not rules.image_folders:
        mend = "send it as data:image/png;base64,…, or start the server with --image-folder"
        raise Refusal(f"{where} is no data URL, and no file is read: {mend}.", param=where)
    if not url.startswith(("data:", "file:///", "file://localhost/")):
        raise Refusal(f"{where} is no URL: write data:image/png;base64,… or file:///…", param=where)
    return resolve_image({"path": url, **detail}, None, where, within=Folders(rules.image_folders))
