"""VCR's questions as a VLE reads them: four texts of one picture, whose things have a token and a type each.

Upstream: `VLEForVCRQ2APipeline` and `VLEForVCRQA2RPipeline` of iflytek/VLE's `models/VLE/pipeline_vle.py`.

Legend of shapes: B questions, C choices, L text tokens, N things of a choice, P patches of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase

from ..base.errors import RowError, UserError, row_error
from ..base.names import IGNORED, Json, Options, Row
from ..batch.encoding import EncodedChat
from ..rows.messages import Message
from ..vcr.choices import CHOICES, TASKS, boxes_beside
from .encoder import Encoder
from .processor import EncoderProcessor

Word = tuple[int, int]
"""Id of a token, and the number of the thing that it names, or `NOTHING`."""
NOTHING = -1
SHORTEST = 8  # tokens: begin, ends, a word before and of the choice
LONGEST = 80  # as upstream, in training and after it
FIRST_TYPE = 2  # of a thing: 0 is text, 1 the picture
NAMED = 8  # things that a full choice names


class Asked(NamedTuple):
    """A question of VCR.

    Attributes:
        ids: Of each choice, with all that stands before it.
        types: Token types of these.
        things: Of each choice, the patches of each thing that it names, in the order of their types.
        right: Number of the right choice.
        task: Number in `TASKS`.
        cut: Whether words were left out.
    """

    ids: list[list[int]]
    types: list[list[int]]
    things: list[list[list[int]]]
    right: int
    task: int
    cut: bool


class VCRProcessor(EncoderProcessor):
    """Of a VLE that chooses answers and reasons.

    Attributes:
        side: Patches of a side of an image.
        most_things: That a choice may name: so many types its model has for them.
    """

    cuts_answers = False
    side: int
    most_things: int

    def facts(self, row: Row, room: int | None, where: str) -> Asked:
        """See `EncoderProcessor.facts`."""
        found = _choices(row["messages"], where)
        if found["boxes"] is None:
            picture = row["images"][0]
            found = {**found, "boxes": boxes_beside(picture["path"], found, where)}
        return self.ask(found, room, where)

    def encode_question(
        self, messages: Sequence[Message], room: int | None, with_answer: bool = True
    ) -> tuple[EncodedChat, bool]:
        """The longest choice with what stands before it; nothing of it is learned by token."""
        asked = self.ask({**_choices(messages, ""), "boxes": []}, room)
        ids = max(asked.ids, key=len)
        return EncodedChat(list(ids), [IGNORED] * len(ids), 1, [0] * len(ids)), asked.cut

    def ask(self, found: Json, room: int | None, where: str = "") -> Asked:
        """What `vcr.choices` found → tokens; words of the longer side are left out until all fit, as upstream does.

        Args:
            found: One of `choices_of`; without any `boxes` no thing has a place in the picture.
            room: Tokens of a choice, `[CLS]` and all `[SEP]` included; None: `LONGEST`.
            where: The row's place in words.

        Raises:
            UserError: They hold no word.
            RowError: A choice names more things than the model has types for.
        """
        names, room = found["names"], min(room or LONGEST, self.longest)
        if room < SHORTEST:
            raise UserError(f"{room} tokens hold no choice with what stands before it; set sft.max_length=80.")
        before = [_words(self.tokenizer, words, names) for words in found["before"]]
        choices = [_words(self.tokenizer, words, names) for words in found["choices"]]
        whole = sum(map(len, chain(before, choices)))
        for choice in choices:
            while sum(map(len, before)) + len(choice) > room - 2 - len(before):
                longer = [each for each in before if len(each) > 1][:1] or before[-1:]
                # Of equal lengths upstream cuts an answer, and what stands before a reason.
                (choice if len(choice) + (len(before) == 1) > sum(map(len, before)) else longer[0]).pop()
        begin, end = (self.tokenizer.cls_token_id, NOTHING), (self.tokenizer.sep_token_id, NOTHING)
        ids, types, things = [], [], []
        for choice in choices:
            words = [begin, *chain.from_iterable([*each, end] for each in (*before, choice))]
            named = sorted({thing for _, thing in words} - {NOTHING})
            if len(named) > self.most_things:
                what = f"a choice and what stands before it name {len(named):,} things"
                mend = f"the model tells {self.most_things:,} apart; set sft.max_length=80, or leave the row out"
                raise row_error(where, what, mend, "too many things")
            kinds = {thing: FIRST_TYPE + number for number, thing in enumerate(named)}
            ids.append([token for token, _ in words])
            types.append([kinds.get(thing, 0) for _, thing in words])
            things.append([_patches(found["boxes"][thing], self.side) for thing in named] if found["boxes"] else [])
        cut = sum(map(len, chain(before, choices))) < whole
        return Asked(ids, types, things, found["right"], TASKS.index(found["task"]), cut)

    def batch(self, rows: Sequence[EncodedChat], side: str = "right", multiple_of: int | None = None) -> BatchFeature:
        """(B, C, L) `input_ids`, each row for each of its choices, as wide as they become; `targets` has their own."""
        made = super().batch(rows, side, multiple_of)
        wide = {name: made[name][:, None].repeat(1, CHOICES, 1) for name in ("input_ids", "attention_mask")}
        labels = torch.zeros(len(rows), dtype=torch.long)
        return BatchFeature({**wide, "labels": labels, "tasks": labels.clone()})

    def targets(self, given: Sequence[Asked]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """B questions → what the model reads beside their pictures.

        Returns:
            `input_ids` and `attention_mask` (B, C, L), `labels` and `tasks` (B,), and of the B·C choices
            `box_patches` (B·C, N, P), `box_types` (B·C, N) and `text_types` (B·C, L).
        """
        if not all(isinstance(each, Asked) for each in given):  # `batch` has them without their questions
            return {}
        ids = [row for asked in given for row in asked.ids]
        length = max(map(len, ids))
        things = [row for asked in given for row in asked.things]
        most = max(map(len, things))
        patches = torch.zeros(len(things), most, self.side**2, dtype=torch.bool)
        types = torch.zeros(len(things), most, dtype=torch.long)
        for row, places in enumerate(things):
            for number, covered in enumerate(places):
                patches[row, number, covered] = True
                types[row, number] = FIRST_TYPE + number

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        made = {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        return {
            **{name: tensor.view(len(given), CHOICES, length) for name, tensor in made.items()},
            "labels": torch.tensor([asked.right for asked in given]),
            "tasks": torch.tensor([asked.task for asked in given]),
            "box_patches": patches,
            "box_types": types,
            "text_types": padded([row for asked in given for row in asked.types], 0),
        }

    def fullest(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Questions whose choices are all as long, and name many things; see `EncoderProcessor.fullest`."""
        ids, types = [[self.tokenizer.unk_token_id] * length] * CHOICES, [[0] * length] * CHOICES
        return self.targets([Asked(ids, types, [[[0]] * NAMED] * CHOICES, 0, 0, False)] * rows)

    def reads(self, length: int, patches: int) -> dict[str, int]:
        """See `EncoderProcessor.reads`: its image is seen once, and fused with each choice."""
        found = super().reads(length, patches + NAMED)
        return {part: tokens * (1 if part == "vision_tower" else CHOICES) for part, tokens in found.items()}

    def choose(
        self, model: PreTrainedModel, images: Sequence[Image.Image], rows: Sequence[Row], settings: Options
    ) -> list[str]:
        """The likeliest choice of each row; one whose picture was blanked has no boxes either."""
        asked, said = [], []
        for row in rows:
            where = f"row {row['id']}" if "id" in row else ""
            found = _choices(row["messages"], where)
            said.append(found["said"])
            if not isinstance(row["images"][0], dict):
                found = {**found, "boxes": []}
            asked.append(self.facts({**row, "messages": [{"choices": found}]}, None, where))
        inputs = {**self.targets(asked), **self.image_inputs(images)}
        with torch.inference_mode():
            logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
        return [texts[number] for texts, number in zip(said, logits.argmax(-1).tolist(), strict=True)]

    def asker(self, model: PreTrainedModel) -> Encoder:
        """Nobody: a question has its choices in its row.

        Raises:
            RowError: Always.
        """
        raise RowError("This model chooses among what a row of VCR gives it; measure it with `vlm-sft evaluate`.")


def _choices(messages: Sequence[Message], where: str) -> Json:
    found: Json | None = next((message["choices"] for message in messages if message.get("choices")), None)
    if found is None:
        place = where and f"{where}: "
        sentence = f"{place}the question has no choices; give rows of the formats vcr, vcr_q2a or vcr_qa2r."
        raise RowError(sentence, where=where, reason="no choices")
    return found


def _words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str | list[int]], names: Sequence[str]) -> list[Word]:
    """Tokens of each word by itself, and of the names of things, with the things that they name."""
    found: list[Word] = []
    for word in words:
        pieces = [(word, NOTHING)] if isinstance(word, str) else [(names[thing], thing) for thing in word]
        for number, (text, thing) in enumerate(pieces):
            if number:
                found += [(token, NOTHING) for token in tokenizer("and", add_special_tokens=False)["input_ids"][:1]]
            found += [(token, thing) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return found


def _patches(box: Sequence[float], side: int) -> list[int]:
    """Numbers of the patches that a box touches, of shares of the picture."""
    left, top, right, bottom = (int(share * side) for share in box)
    columns = range(max(left, 0), min(right + 1, side))
    return [side * row + column for row in range(max(top, 0), min(bottom + 1, side)) for column in columns]
