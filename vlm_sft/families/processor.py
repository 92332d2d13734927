"""The processor of an existing VLM, behind the interface of ours: its own image processor says what an image becomes.

The chat template makes text and mask; then each image's placeholder is replaced by what the model's own processor puts
there for an image of that size, and the spans of the mask move along.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ..base.errors import RowError, UserError
from ..base.limits import limits
from ..base.names import IGNORED, Inputs, Options
from ..batch.box_text import Seen
from ..batch.encoding import EncodedChat, in_loss, pad, supervised_characters
from ..batch.pictures import why
from ..batch.processor import VLMProcessor, check_fast
from ..batch.typed_text import control_tokens, tokenize_chat
from ..templates.render import RenderedChat
from .table import Family

# What image processors give for their own processors, and no model takes.
ONLY_COUNTS = ("rows", "cols", "num_patches", "num_crops")
# Two shapes, and one that a processor that cuts images into tiles would cut.
SHAPES = ((96, 64), (64, 96), (1600, 400))
# Sizes of which the text is remembered; that of one large image has 200,000 characters.
MOST_SIZES = 256


class FamilyProcessor(VLMProcessor):
    """Processor of a model of one of the `FAMILIES`.

    Args:
        image_processor: The model's own.
        tokenizer: The model's own.
        chat_template: Jinja source with `{% generation %}` markers.
        native: The model's own processor, which holds both.
        family: What the model needs beside it.
        place_id: Id of the token that an image feature replaces.
        system: System text for conversations that bring none; None leaves the template's own.
        box_notation: How boxes are written, a key of `NOTATIONS`; None: as the family has it.

    Attributes:
        num_image_tokens: Tokens of an image, or 0 where they, or what stands between them, depend on its size.
        one_shape: Whether the pixels of images that are as many tokens have one shape, so that one can stand for
            another.
    """

    one_shape = True

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        native: ProcessorMixin,
        family: Family,
        place_id: int,
        system: str | None = None,
        box_notation: str | None = None,
    ) -> None:
        check_fast(tokenizer, "model.pretrained")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        if tokenizer.pad_token is None:  # a token of our own would have no row among the embeddings
            tokenizer.pad_token = tokenizer.eos_token
        self.native, self.family, self.system = native, family, system
        self.box_notation = box_notation or family.boxes
        self.image_token, self.image_token_id = self._placeholder(), place_id
        self.pad_to_square, self.qformer_tokenizer, self.added_tokens = False, None, []
        self.one_image = family.one_image
        self._expansions: dict[tuple[int, int], str] = {}
        # Its arithmetic may not know an option of its processor, and then only pictures say the truth.
        self._counts = bool(family.counted) and all(self._count(shape) == self._look(shape) for shape in SHAPES)
        counts = [self.count_image_tokens(shape) for shape in SHAPES]
        self._bound(max(counts))
        # As many tokens may stand in other rows and columns.
        alike = self.one_shape and len({self.expansion(shape) for shape in SHAPES}) == 1
        self.num_image_tokens = counts[0] if alike else 0
        self.reads_sizes = not self.num_image_tokens

    # -- text -----------------------------------------------------------------------------------------------------

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """See `VLMProcessor.control_tokens`; with those that the model's own processor writes around images."""
        own = (value for name, value in vars(self.native).items() if name.endswith("_token") and isinstance(value, str))
        return control_tokens(self.tokenizer, self._template(), own)

    def expansion(self, size: tuple[int, int]) -> str:
        """What the model's own processor writes in place of an image's placeholder.

        Args:
            size: (width, height) in pixels: no processor looks at more.

        Raises:
            RowError: The model's own processor takes no image of that shape.
        """
        if size not in self._expansions:
            if len(self._expansions) == MOST_SIZES:
                self._expansions.pop(next(iter(self._expansions)))  # the oldest goes
            try:
                self._expansions[size] = self._count(size) if self._counts else self._look(size)
            except Exception as error:  # image processors raise anything
                raise _refused(size, error) from error
        return self._expansions[size]

    def _look(self, size: tuple[int, int]) -> str:
        """`expansion`, asked with a blank image of that size."""
        text = self._read([Image.new("RGB", size)])[1][0]
        self._bound(text.count(self.image_token))
        return text

    def _bound(self, tokens: int) -> None:
        """Refuses an image that is too many tokens, before they are made or encoded."""
        if tokens > (most := limits().image_tokens):
            raise UserError(
                f"model: an image becomes {tokens:,} tokens, but `limits.image_tokens` is {most:,}; let the processor "
                f"make a smaller one (`model.processor`), or raise the limit."
            )

    def _count(self, size: tuple[int, int]) -> str:
        """`expansion`, by the arithmetic of the model's own classes that `Family.counted` names."""
        width, height = size
        if self.family.counted == "tokens":
            (tokens,) = self.native._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
            self._bound(tokens)
            return self.native.image_token * tokens
        found = self.image_processor.get_number_of_image_patches(height, width, self._image_options())
        self._bound(math.prod(found[1:]) if isinstance(found, tuple) else found)
        if self.family.counted == "patches":
            return self.native.replace_image_token({"num_patches": [found]}, 0)
        _, rows, columns = found
        return self.native.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """Places for features that an image of (width, height) pixels has."""
        chat = RenderedChat(self.image_token, [], [(0, len(self.image_token))])
        return sum(self._encode(chat, [self.expansion(size)]).places)

    def encode_rendered(self, chat: RenderedChat, sizes: Sequence[tuple[int, int]] = ()) -> EncodedChat:
        """Ids and labels of a rendered conversation; see `VLMProcessor.encode_rendered`.

        Raises:
            UserError: The number of an image's tokens depends on its size, and there are fewer sizes than images.
        """
        images = len(chat.image_spans)
        if not self.reads_sizes:
            sizes = [SHAPES[0]] * images
        if len(sizes) < images:
            raise UserError(
                f"the conversation has places for {images} images, but the sizes of {len(sizes)} are given: how many "
                f"tokens an image becomes depends on its size here, so give encode_rendered the size of each."
            )
        return self._encode(chat, [self.expansion(size) for size in sizes[:images]])

    def _encode(self, chat: RenderedChat, expansions: Sequence[str]) -> EncodedChat:
        chat = expand(chat, expansions)
        encoded = EncodedChat([], [], len(chat.image_spans))
        if self._adds_bos(chat):
            encoded.append(self.tokenizer.bos_token_id)
        supervised = supervised_characters(chat)
        starts = [start for start, _ in chat.image_spans]
        seen = [0] * len(starts)
        tokens = tokenize_chat(self.tokenizer, chat, supervised, {self.image_token_id})
        for token, (start, end) in zip(*tokens, strict=True):
            learned = end > start and in_loss(supervised[start])
            image = bisect_right(starts, start) - 1
            if image >= 0 and start < chat.image_spans[image][1]:
                token, place = self._image_token(token, seen[image])
                seen[image] += 1
                encoded.append(token, place=place)
            else:
                encoded.append(token, learned)
        return encoded

    # -- images ---------------------------------------------------------------------------------------------------

    def seen(self, size: tuple[int, int]) -> Seen:
        """See `VLMProcessor.seen`; of a processor that cuts images into tiles, all of the picture in its own size."""
        if self._makes_one_picture:
            return super().seen(size)
        images = self.image_processor
        if not type(images).__name__.startswith("Qwen2VL"):  # others resize otherwise, also where they merge patches
            return Seen.whole(size)
        bounds = dict(images.size)
        try:
            height, width = smart_resize(
                size[1], size[0], images.patch_size * images.merge_size, bounds["shortest_edge"], bounds["longest_edge"]
            )
        except ValueError as error:
            raise _refused(size, error) from error
        return Seen.whole((width, height))

    def check_seen(self) -> None:
        """See `VLMProcessor.check_seen`; what is cut into tiles is the whole picture."""
        if self._makes_one_picture:
            super().check_seen()

    @property
    def _makes_one_picture(self) -> bool:
        """Whether every image becomes one picture of a fixed size, and is neither cut into tiles nor kept as it is."""
        return not self.reads_sizes and not self.family.counted

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """What the model takes for RGB images, as its own processor names it."""
        if not images:
            return {}
        inputs, _ = self._read(images)
        unused = {*ONLY_COUNTS, *self.native.unused_input_names}
        return {name: torch.as_tensor(value) for name, value in inputs.items() if name not in unused}

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """The pixel values of RGB images, in the shape that the model takes, or None for none."""
        return self.image_inputs(images).get("pixel_values")

    @property
    def needed_side(self) -> int | None:
        """None: it may cut a large image into tiles, and then needs all of its pixels."""
        return None

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `VLMProcessor.grown_size`; who makes pictures of many sizes bounds them itself."""
        return size if self.reads_sizes else super().grown_size(size)

    def batch(self, rows: Sequence[EncodedChat], side: str = "right", multiple_of: int | None = None) -> BatchFeature:
        """Pads rows, and adds the column that the model reads; see `VLMProcessor.batch`."""
        batch = super().batch(rows, side, multiple_of)
        if self.family.column:
            written = set(getattr(self.native, "image_token_ids", ()))
            columns = [_column(row, self.family.counts, written) for row in rows]
            batch[self.family.column] = pad(columns, batch["input_ids"].shape[1], 0, side)
        if self.family.frames:
            framed = [[int(any(row.places[max(i - 1, 0) : i + 2])) for i in range(len(row.places))] for row in rows]
            batch[self.family.frames] = pad(framed, batch["input_ids"].shape[1], 0, side)
        return batch

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes the model's own processor, with our template."""
        self.native.chat_template = self.chat_template
        return self.native.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # -- what differs between models --------------------------------------------------------------------------------

    def _placeholder(self) -> str:
        return self.native.image_token

    def _read(self, images: Sequence[Image.Image]) -> tuple[Inputs, list[str]]:
        """Tensors of images, and what stands for each in the text."""
        return self.native._process_images(list(images), **self._image_options())

    def _image_options(self) -> Options:
        return self.native._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, return_tensors="pt")[
            "images_kwargs"
        ]

    def _image_token(self, token: int, position: int) -> tuple[int, bool]:
        """(id, whether a feature goes there) of a token of an image's expansion, counted from its start."""
        return token, token == self.image_token_id


def _refused(size: tuple[int, int], error: Exception) -> RowError:
    return RowError(
        f"an image of {size[0]:,} x {size[1]:,} pixels is refused by the model's own processor "
        f"({why(error)}): cut it or remove the row.",
        reason="image too large",
    )


def expand(chat: RenderedChat, expansions: Sequence[str]) -> RenderedChat:
    """Puts each image's expansion where its placeholder stands, and moves all spans along.

    Args:
        chat: A rendered conversation.
        expansions: One text for each of its image spans.
    """
    pieces, images, last, length = [], [], 0, 0
    borders: list[tuple[int, int]] = []  # (position in the old text, how far what follows has moved)
    for (start, end), text in zip(chat.image_spans, expansions, strict=True):
        pieces += [chat.text[last:start], text]
        length += start - last
        images.append((length, length + len(text)))
        length, last = length + len(text), end
        borders.append((end, length - end))

    def moved(position: int) -> int:
        before = bisect_right(borders, (position, len(chat.text) + length)) - 1
        return position + (borders[before][1] if before >= 0 else 0)

    spans, unlearned = ([(moved(start), moved(end)) for start, end in each] for each in (chat.spans, chat.unlearned))
    typed = [moved(place) for place in chat.typed]
    return RenderedChat("".join([*pieces, chat.text[last:]]), spans, images, unlearned, typed)


def _column(row: EncodedChat, counts: str, written: Collection[int]) -> list[int]:
    """The family's column for one row; `written` are the tokens that its own processor writes for an image."""
    if counts == "images":
        return list(row.places)
    if counts == "written":
        return [int(token in written) for token in row.input_ids]
    found, start = [], 0
    for length in row.lengths or [len(row.labels)]:
        labels = row.labels[start : start + length]
        first = next((i for i, label in enumerate(labels) if label != IGNORED), length)
        found += [int(i >= first) for i in range(length)]
        start += length
    return found
