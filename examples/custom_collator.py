"""Two collators of your own, each one override. A recipe names one by `module:Class`:

    collator: examples.custom_collator:ShortAnswerCollator
    collator_args: {typical: 12, most: 4.0}

or

    collator: examples.custom_collator:ReasoningMaskCollator
    collator_args: {tag: think}

The module is looked for where Python looks and in the folder that training starts from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlm_sft import MultimodalCollator, RenderedChat, Sample, UserError, VLMProcessor


class ShortAnswerCollator(MultimodalCollator):
    """Gives short answers more weight, so that long ones do not drown them.

    The loss is a mean over tokens, so a description of 200 tokens counts as much as a hundred answers like "two" or
    "三个". Here each token of an answer of n tokens weighs typical / n: every answer counts alike, whatever its length,
    within the bounds 1 / most and most. With `typical` at the mean length of your answers the loss keeps its scale.

    Args:
        processor: The stack's processor.
        typical: Tokens of an answer whose weight is 1, its end token included.
        most: Largest weight of a token; 1 / most is the smallest.
        **options: Of `MultimodalCollator`.

    Raises:
        UserError: An argument is out of its range.
    """

    def __init__(self, processor: VLMProcessor, typical: float = 16, most: float = 4.0, **options: Any) -> None:
        super().__init__(processor, **options)
        if typical <= 0 or most < 1:
            raise UserError(f"collator_args: typical must be above 0 and most at least 1, not {typical} and {most}.")
        self.typical = typical
        self.most = most

    def encode(self, row: dict[str, Any], with_images: bool = True) -> Sample:
        """One row, with a weight for each of its tokens."""
        sample = super().encode(row, with_images)
        weights = [1.0] * len(sample.chat.labels)
        for start, end in answers(sample.chat.labels):
            weight = min(max(self.typical / (end - start), 1 / self.most), self.most)
            weights[start:end] = [weight] * (end - start)
        return replace(sample, loss_weights=weights)


class ReasoningMaskCollator(MultimodalCollator):
    """Keeps reasoning inside answers as context, but out of the loss: `<think>…</think>` and white space behind it.

    For data whose reasoning another model wrote: what follows is learned given the reasoning, the reasoning itself is
    not imitated. A block that is never closed reaches to the end of its answer.

    Args:
        processor: The stack's processor.
        tag: Name of the tag around the reasoning.
        **options: Of `MultimodalCollator`.
    """

    def __init__(self, processor: VLMProcessor, tag: str = "think", **options: Any) -> None:
        super().__init__(processor, **options)
        name = re.escape(tag)
        # White space behind a block belongs to it, unless it ends the answer: a line break there may be the end token.
        self.block = re.compile(rf"<{name}>.*?(?:</{name}>(?:\s+(?=\S))?|\Z)", re.DOTALL)

    def render(self, messages: Sequence[dict[str, Any]]) -> RenderedChat:
        """The same text, with the reasoning cut out of the supervised spans."""
        chat = super().render(messages)
        spans = []
        for start, end in chat.spans:
            learned = start
            for block in self.block.finditer(chat.text[:end], start):
                if chat.text[learned : block.start()].strip():
                    spans.append((learned, block.start()))
                learned = block.end()
            spans.append((learned, end))
        return replace(chat, spans=[(start, end) for start, end in spans if start < end])


def answers(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of the answers among labels: what is not -100, in a row."""
    learned = [False, *(label != -100 for label in labels), False]
    starts = [i for i in range(len(labels)) if learned[i + 1] and not learned[i]]
    ends = [i + 1 for i in range(len(labels)) if learned[i + 1] and not learned[i + 2]]
    return list(zip(starts, ends, strict=True))
