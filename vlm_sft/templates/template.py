"""What is known of a chat template before it is used: whether it can be trained on, and how an answer ends."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..base.errors import UserError
from ..rows.messages import Message
from .process import ask
from .render import RenderedChat, render, resolve
from .sandbox import HOW_TO_MARK, RefusedError


def load_template(template: str | Path) -> str:
    """Returns the jinja source of a template that has been tried out on one turn.

    Args:
        template: A name in `chat_templates/`, a path, or jinja source.

    Raises:
        UserError: It is unknown, has no `{% generation %}` markers, does not compile or run, loses the image or the
            answer, or asks for an answer in other words than it is trained on.
    """
    source, label = resolve(template)
    ask("check", source, label)
    turn = _probe()
    try:
        prompt, full = render(turn[:1], template, True), render(turn, template)
    except RefusedError:  # it wants another kind of conversation (a system text, say), which is its right
        return source
    _affixes(full, label)
    if full.text[: full.spans[0][0]] != prompt.text:
        raise UserError(
            f"{label} asks for an answer with {prompt.text[-40:]!r} (add_generation_prompt) but trains it after "
            f"{full.text[: full.spans[0][0]][-40:]!r}; make both the same."
        )
    return source


def end_of_answer(template: str | Path, *, bos_token: str | None = "", eos_token: str | None = "</s>") -> str:
    """What a template puts after an answer inside the supervised span, such as "</s>", "\\n", "###" or "<|im_end|>".

    Generation stops there. It may begin with a space ("␣</s>" in llava_llama_2) and is "" for a template that never
    teaches the model to stop.

    Args:
        template: A name in `chat_templates/`, a path, or jinja source.
        bos_token: As the template will be rendered with.
        eos_token: As the template will be rendered with.

    Raises:
        UserError: As `load_template`.
    """
    return _end_of_answer(template, *resolve(template), bos_token, eos_token)


@lru_cache(maxsize=64)  # this is asked for every answer; by its source too, for a file may be changed
def _end_of_answer(template: str | Path, source: str, label: str, bos_token: str | None, eos_token: str | None) -> str:
    chat = render(_probe(), template, bos_token=bos_token, eos_token=eos_token)
    return _affixes(chat, label)[1]


def owns_bos(template: str | Path) -> bool:
    """Whether a template places the BOS token itself (its code, not a comment, uses `bos_token`).

    Where it does not, BOS is the processor's to prepend.
    """
    source, label = resolve(template)
    ask("check", source, label)
    return "bos_token" in ask("variables", source, label)


def learns_last_alone(template: str | Path) -> bool:
    """Whether a template has only the last answer of a conversation in the loss (GLM's: the others are its prompt)."""
    try:
        return len(render(_probe() + _probe(), template).spans) == 1
    except UserError:  # the template is made for one turn
        return False


def _probe() -> list[Message]:
    question = [{"type": "image"}, {"type": "text", "text": "question"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "answer"}]


def _affixes(probe: RenderedChat, label: str) -> tuple[str, str]:
    """What stands before and after the answer in the span of a rendered `_probe()`."""
    before, found, after = "".join(probe.supervised).partition("answer")
    if not found:
        raise UserError(f"{label} prints the answer outside its generation markers; {HOW_TO_MARK}.")
    return before, after
