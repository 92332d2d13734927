"""How likely a model finds an answer: the probability of each of its tokens, without writing any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..base.errors import UserError
from ..base.names import IGNORED, Row
from ..batch.pictures import Pictures, image_inputs, load_picture, name_of, picture_sizes
from ..batch.processor import VLMProcessor
from .generation import check_length, encode_question, with_boxes_written


class Likelihood(NamedTuple):
    """An answer to a conversation.

    Attributes:
        tokens: Its tokens as text, with the end of the answer.
        logs: The logarithm of the probability of each, after the conversation and the tokens before.
        greedy: Whether each is what the model would have written there.
        ids: Its tokens.
    """

    tokens: list[str]
    logs: list[float]
    greedy: bool = False
    ids: Sequence[int] = ()

    @property
    def log(self) -> float:
        """The logarithm of the probability of the whole answer."""
        return sum(self.logs)


@torch.inference_mode()
def likelihoods(model: PreTrainedModel, processor: VLMProcessor, conversations: Sequence[Row]) -> list[Likelihood]:
    """How likely the last message of each conversation is, which is the assistant's.

    Args:
        model: The model, on its device, in evaluation mode.
        processor: Its processor.
        conversations: Each `{"messages", "images", "id"}`, as `prompt_batch` takes them.

    Raises:
        UserError: As `prompt_batch`; a conversation is longer than the language model can read; the model chooses.
    """
    if processor.chooses:
        raise UserError(
            "VLE and mPLUG answer as a whole and give no probability of a text's words: leave out what compares "
            "options by likelihood (--likelihood) or asks how sure each word was (--confidence)."
        )
    if not conversations:
        return []
    encoded, pictures = [], []
    for row in conversations:
        where = f"row {row['id']}"
        row = with_boxes_written(processor, row, where)
        sizes = picture_sizes(processor, row["images"], where=where)
        chat = processor.encode_chat(row["messages"], sizes=sizes)
        check_length(model, len(chat.input_ids), where)
        # Of earlier answers in the conversation nobody asks.
        asked = len(encode_question(processor, row, where).input_ids)
        chat.labels[:asked] = [IGNORED] * asked
        encoded.append(chat)
        loaded = [load_picture(processor, image, where=where) for image in row["images"]]
        said = processor.instructions(row["messages"])
        pictures.append(Pictures(loaded, said, where, [name_of(image) for image in row["images"]]))
    batch = processor.batch(encoded, side="right")
    batch.update(image_inputs(processor, pictures))
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    output = model(**inputs, supervised_only=True, use_cache=False)  # the head reads no other position
    ids = [[label for label in chat.labels[1:] if label != IGNORED] for chat in encoded]
    losses, hits = (found.tolist() for found in (output.token_losses.float(), output.token_hits))
    ends = list(accumulate(map(len, ids), initial=0))
    return [
        Likelihood(
            [processor.tokenizer.decode([token]) for token in own],
            [-loss for loss in losses[start:end]],
            all(hits[start:end]),
            own,
        )
        for own, (start, end) in zip(ids, pairwise(ends), strict=True)
    ]
