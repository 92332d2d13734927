"""What stands between rows and an encoder: a question becomes ids, a picture pixels, and answers what is learned."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..base.errors import RowError
from ..base.names import ANSWER_LIST, IGNORED, IMAGE_TOKEN, Options, Row
from ..batch.encoding import EncodedChat, pad
from ..batch.processor import VLMProcessor
from ..rows.messages import Message, given_answers
from ..templates.notations import DEFAULT
from ..templates.render import RenderedChat
from .answers import AnswerList
from .encoder import Encoder, ReadsQuestions

# What `EncoderProcessor.render` does, for those who look at a template.
TEMPLATE = """{%- for message in messages -%}
{%- for part in message['content'] -%}{{- image_token if part['type'] == 'image' -}}{%- endfor -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ text }}{%- endgeneration -%}{%- else -%}{{ text + '\n' }}
{%- endif -%}{%- endfor -%}
"""


class EncoderProcessor(ReadsQuestions, VLMProcessor):
    """Tokenizer and image processor of an encoder, and the answers that it chooses from, if it does.

    Args:
        image_processor: Of its images.
        tokenizer: Of its texts.
        chat_template: Shows a row to people; the model gets the question alone.
        longest: Tokens of the longest question that it reads.

    Attributes:
        known: The answers there are, in the order of its head; none for one that writes them.
    """

    asks: ClassVar[type[Encoder]]
    chooses = True
    longest: int

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = TEMPLATE,
        longest: int = 512,
    ) -> None:
        self.longest = longest
        self.num_image_tokens, self.image_token, self.image_token_id = 0, IMAGE_TOKEN, -1  # no token is an image
        self.pad_to_square, self.system, self.box_notation = False, None, DEFAULT
        self.qformer_tokenizer, self.added_tokens = None, []
        self.known = AnswerList([])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> RenderedChat:
        """A row as people see it: the question, a line break and the answer; no text but these is the model's."""
        text, spans, places = "", [], []
        for message in messages:
            for part in message["content"]:
                if not isinstance(part, str) and part["type"] == "image":
                    places.append((len(text), len(text) + len(self.image_token)))
                    text += self.image_token
            start, text = len(text), text + text_of(message)
            if message["role"] == "assistant":
                spans.append((start, len(text)))
            else:
                text += "\n"
        return RenderedChat(text, spans, places)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """None: nothing is written around a question."""
        return ()

    @property
    def end_of_answer(self) -> str:
        """Nothing: an answer is a whole."""
        return ""

    # -- questions --------------------------------------------------------------------------------------------------

    def question_ids(self, text: str, room: int | None = None) -> tuple[list[int], bool]:
        """Ids of a question, and whether it was cut to fit."""
        room = min(room or self.longest, self.longest)
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) <= room:
            return ids, False
        return self.tokenizer(text, truncation=True, max_length=room)["input_ids"], True

    def cut_question(self, text: str) -> str:
        """A question that the model reads: one that is too long loses its end, as in training."""
        ids, cut = self.question_ids(text)
        return self.tokenizer.decode(ids, skip_special_tokens=True) if cut else text

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> EncodedChat:
        """The question, and as what is learned the answer, as the tokenizer writes both.

        Raises:
            RowError: There is not one question.
        """
        return self.encode_question(messages, None, not add_generation_prompt)[0]

    def encode_question(
        self, messages: Sequence[Message], room: int | None, with_answer: bool = True
    ) -> tuple[EncodedChat, bool]:
        """As `encode_chat`, with a question of at most `room` tokens, and whether it was cut."""
        ids, cut = self.question_ids(question_of(messages), room)
        chat = EncodedChat(list(ids), [IGNORED] * len(ids), 1, [0] * len(ids))
        if with_answer and messages[-1]["role"] == "assistant":
            learned = self.tokenizer(text_of(messages[-1]), add_special_tokens=False)["input_ids"]
            chat.extend(learned, list(learned))
        return chat, cut

    def encode_rendered(self, chat: RenderedChat, sizes: Sequence[tuple[int, int]] = ()) -> EncodedChat:
        """Room for the images of a rendered conversation, which take no token."""
        return EncodedChat([], [], len(chat.image_spans))

    def batch(self, rows: Sequence[EncodedChat], side: str = "right", multiple_of: int | None = None) -> BatchFeature:
        """Pads questions to (B, L) `input_ids` and `attention_mask`, with what is learned of rows without answers.

        Args:
            rows: Encoded rows; what is learned is left out, of a row that is more than that.
            side: Always right.
            multiple_of: Rounds L up to a multiple, as far as there are positions.
        """
        asked = [[i for i, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED] for row in rows]
        asked = [ids or row.input_ids for ids, row in zip(asked, rows, strict=True)]
        longest = max(map(len, asked))
        longest = min(-(-longest // (multiple_of or 1)) * (multiple_of or 1), self.longest)
        real = np.arange(longest) < np.array([[len(ids)] for ids in asked])
        batch = {
            "input_ids": pad(asked, longest, self.tokenizer.pad_token_id),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
        }
        return BatchFeature({**batch, **self.targets([[""]] * len(rows))})

    # -- answers ----------------------------------------------------------------------------------------------------

    def facts(self, row: Row, room: int | None, where: str) -> Any:
        """What of a row is learned, as `targets` takes it: here what each annotator answered.

        Args:
            row: With its last message, the answer.
            room: Tokens of the longest question.
            where: The row, in words.

        Raises:
            RowError: Nothing can be learned from it.
        """
        given = [answer.strip() for answer in given_answers(row["messages"][-1])]
        self.check_answers(given, where)
        return given

    def check_answers(self, given: Sequence[str], where: str) -> None:
        """Looks that a row can be learned from.

        Raises:
            RowError: The model has none of its answers.
        """

    @abstractmethod
    def targets(self, given: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """What the model takes beside questions and images to learn.

        Args:
            given: What the annotators of each row answered.
        """

    def fullest(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """What is learned of so many rows where there is much of it, for a count of memory; the numbers mean nothing.

        Args:
            rows: How many.
            length: Tokens of a question.
        """
        return self.targets([[""]] * rows)

    def reads(self, length: int, patches: int) -> dict[str, int]:
        """Part → tokens of it that a row of `fullest` has, whose image is of so many patches."""
        return {"vision_tower": patches, "text_encoder": length, "fusion": length + patches, "head": 1}

    def choose(
        self, model: PreTrainedModel, images: Sequence[Image.Image], rows: Sequence[Row], settings: Options
    ) -> list[str]:
        """The likeliest answer to each of N questions about N images; `settings` as `Encoder.answers`."""
        questions = [self.cut_question(question_of(row["messages"])) for row in rows]
        found = self.asker(model).answers(images, questions, 1, self.candidates, settings)
        return [answers[0].answer for answers in found]

    def asker(self, model: PreTrainedModel) -> Encoder:
        """What asks a model; it is put to work as it is, on its device."""
        return self.asks(model, self.tokenizer, self.image_processor)

    @property
    def writes(self) -> bool:
        """Whether it writes its answers, in place of choosing them."""
        return False

    @property
    def candidates(self) -> Sequence[str]:
        """What answers are chosen from, where the model does not have them in its head."""
        return ()

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes tokenizer, image processor and template, and the answers there are."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.known.answers:
            text = json.dumps(self.known.answers, ensure_ascii=False, indent=0)
            (Path(save_directory) / ANSWER_LIST).write_text(text + "\n", encoding="utf-8")
        return saved


def text_of(message: Message) -> str:
    """What a message says; what stands before and after an image is joined by a space."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"].strip() for part in content if part["type"] == "text" and part["text"])


def question_of(messages: Sequence[Message], where: str = "") -> str:
    """The text of a conversation that asks once, about one image.

    Raises:
        RowError: It has several turns, no text, or not one image.
    """
    turns = [message for message in messages if message["role"] == "user"]
    place = where and f"{where}: "
    if len(turns) != 1:
        sentence = f"{place}an encoder answers one question, and here are {len(turns)}: give each a row of its own."
        raise RowError(sentence, where=where, reason="several turns")
    content = turns[0]["content"]
    parts = [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]
    if len(parts) != 1:
        sentence = f"{place}an encoder reads one image with a question, and here are {len(parts)}: give it one."
        raise RowError(sentence, where=where, reason="marks differ")
    text = text_of(turns[0]).strip()
    if not text:
        raise RowError(f"{place}the question is empty: write one.", where=where, reason="no question")
    return text
