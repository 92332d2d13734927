"""What a language model makes of a text set: how likely it finds the texts, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from ..base.errors import RowError, UserError
from ..base.names import IGNORED, Json
from ..base.progress import steps
from ..batch.encoding import EncodedChat
from ..inference.generation import answer_each, position_limit
from ..inference.settings import ignores_text
from .texts import TextSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..batch.processor import VLMProcessor

MOST_TOKENS = 512  # tokens of a text that are looked at
NEW_TOKENS = 32  # tokens of an answer
AT_ONCE = 8

State = Json
"""`texts` (mark of the set), `loss` (mean over all tokens), `perplexity` (by language), and `answers`, one a question,
or None where they were not asked for or the chat template shows the model no words."""


def measure(model: PreTrainedModel, processor: VLMProcessor, texts: TextSet, answers: bool = True) -> State:
    """Measures a model in evaluation mode.

    Args:
        model: On its device.
        processor: Its processor.
        texts: What it is shown: texts without a chat template, questions in that of the processor.
        answers: Ask the questions too.

    Raises:
        UserError: It takes no text without a picture.
    """
    sums = {language: _losses(model, processor, some) for language, some in texts.texts.items()}
    count = sum(tokens for _, tokens in sums.values())
    asked = answers and texts.questions and not ignores_text(processor)
    return {
        "texts": texts.mark,
        "loss": sum(loss for loss, _ in sums.values()) / count,
        "perplexity": {language: math.exp(min(loss / tokens, 80.0)) for language, (loss, tokens) in sums.items()},
        "answers": _answers(model, processor, texts) if asked else None,
    }


@torch.inference_mode()
def _losses(model: PreTrainedModel, processor: VLMProcessor, texts: list[str]) -> tuple[float, int]:
    """Sum of the losses of the tokens of texts, and how many there are."""
    most = min(position_limit(model) or MOST_TOKENS, MOST_TOKENS)
    total, count = 0.0, 0
    for start in steps(range(0, len(texts), AT_ONCE), "read", f"lots of {AT_ONCE} texts"):
        chats = []
        for text in texts[start : start + AT_ONCE]:
            # What looks like a control token in a text is text.
            ids = processor.tokenizer(text, split_special_tokens=True)["input_ids"][:most]
            chats.append(EncodedChat(ids, [IGNORED, *ids[1:]], 0, [0] * len(ids)))
        chats = [chat for chat in chats if len(chat.input_ids) > 1]
        if not chats:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in processor.batch(chats).items()}
        try:
            losses = model(**inputs, supervised_only=True, use_cache=False).token_losses
        except (ValueError, TypeError) as error:
            raise UserError(f"the model reads no text without a picture ({error}).") from error
        total, count = total + losses.double().sum().item(), count + losses.numel()
    if not count:
        raise UserError("the texts are too short to be measured: each needs two tokens at least.")
    return total, count


def _answers(model: PreTrainedModel, processor: VLMProcessor, texts: TextSet) -> list[str]:
    said = [[{"type": "text", "text": asked.question}] for asked in texts.questions]
    rows = [
        {"messages": [{"role": "user", "content": text}], "images": [], "id": str(n)} for n, text in enumerate(said)
    ]
    found: list[str] = []
    for start in steps(range(0, len(rows), AT_ONCE), "asked", f"lots of {AT_ONCE} questions"):
        some = rows[start : start + AT_ONCE]
        answers = answer_each(model, processor, some, do_sample=False, max_new_tokens=NEW_TOKENS)
        found += ["" if isinstance(each, RowError) else str(each) for each in answers]
    return found


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it was before its LoRA; that of an earlier stage, which was merged, stays."""
    if not isinstance(model, PeftModel):
        yield model
        return
    with model.disable_adapter():
        yield model
