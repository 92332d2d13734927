"""Rows → batches. The class to subclass when a batch must be something else.

Three documented points, in the order a row passes them: `render`, `encode`, `collate`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import RowError, UserError
from ..base.limits import limits
from ..base.names import IGNORED, ImageEntry, Inputs, Row
from ..reading.image_refs import SIZES, TIME
from ..reading.video import Films
from ..rows.merging import apart, ids_of
from ..rows.messages import Message, unpacked
from ..templates.render import RenderedChat
from .box_text import write_boxes
from .by_length import numbered
from .encoding import EncodedChat, Sample, pad, rendered_ahead
from .pictures import KeepsFeatures, Pictures, check_frames, check_pictures, load_picture, name_of, picture_sizes
from .processor import VLMProcessor

REJECTED = "rejected_rows"  # a batch's key for the rows that it lost: (source, id, reason, sentence) each
SEEN = "seen_rows"  # and its key for how many rows of each source came, where that is not known before


class MultimodalCollator:
    """Makes batches of rows `{"messages", "images", "source", "id"}`; what their `extras` say is put back first.

    Override `render` to change the text, `encode` to change ids, labels or loss weights of a row, `collate` to change
    the batch; of packs (`by_length.PACK`) it gets each as one sample. Everything runs in the data-loader workers;
    images are decoded here and nowhere earlier.

    Args:
        processor: The stack's processor.
        max_length: Longest row in tokens, image tokens included; None for no limit. A longer conversation loses whole
            turns from its end; one that does not fit with a single turn is an error that names it.
        pad_to_multiple_of: Rounds the padded length up.
        max_pixels: Largest image, in pixels, that is decoded; default `limits.image_pixels`.
        reduce: Decodes a JPEG smaller where it has far more pixels than the image processor needs; see `load_image`.

    Attributes:
        fetch: Gives the file of an image that is a URL; None refuses URLs.
        drop_rejected: Leaves a row that cannot be trained on out of its batch and names it in the batch's
            `rejected_rows`, instead of raising.
        count_rows: Says in each batch's `seen_rows` how many rows of each source came.
        kept: Gives the features of pictures that need not go through the vision tower; None sends all of them.
    """

    fetch: Callable[[str], str] | None = None
    drop_rejected: bool = False
    count_rows: bool = False
    kept: KeepsFeatures | None = None
    _decoded: dict[tuple[Any, ...], Image.Image] | None = None
    _films: Films | None = None  # those of the row that is being encoded

    def __init__(
        self,
        processor: VLMProcessor,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        max_pixels: int | None = None,
        reduce: bool = True,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_pixels = max_pixels or limits().image_pixels
        self.side = processor.needed_side if reduce else None

    def __call__(self, rows: Sequence[Row]) -> Inputs:
        """Batches rows: (B, S) `input_ids`, `attention_mask`, `labels`, and what `image_inputs` makes of images.

        Rows that come in packs stand behind each other, as `VLMProcessor.batch` says; one that is left out leaves no
        gap. An image that several rows show is decoded once.

        Raises:
            RowError: A row cannot be trained on, and `drop_rejected` is off.
            UserError: `drop_rejected` is on and no row of the batch is left.
        """
        samples: list[tuple[Row, Sample]] = []
        rejected: list[tuple[str, str, str, str]] = []

        def reject(row: Row, error: RowError) -> None:
            if not self.drop_rejected:
                raise error
            source = str(row.get("source", ""))
            rejected.extend((source, each, error.reason, str(error)) for each in ids_of(row))

        self._decoded = {}
        try:
            packs = (pack for pack, _ in numbered(rows))
            for pack, row in zip(packs, rendered_ahead(self, (row for _, row in numbered(rows))), strict=True):
                try:
                    row = unpacked(row)
                    if wrong := row.get("rejected"):  # a row of a stream that could not be read says so itself
                        raise RowError(wrong["sentence"], where=row["id"], reason=wrong["reason"])
                    sample = self.sample(row)
                    sample.pack = pack
                    samples.append((row, sample))
                except RowError as error:
                    reject(row, error)
        finally:
            self._decoded = None
        batch = self._collate_accepted(samples, reject)
        if batch is None:
            raise UserError(f"No row of a batch of {len(rows)} can be trained on; the last one: {rejected[-1][3]}")
        seen = {SEEN: dict(Counter(str(row["source"]) for _, row in numbered(rows)))} if self.count_rows else {}
        return {**batch, **seen, REJECTED: rejected} if seen or rejected else batch

    def _collate_accepted(
        self,
        samples: Sequence[tuple[Row, Sample]],
        reject: Callable[[Row, RowError], None],
    ) -> Inputs | None:
        """The batch of rows, or of those whose pictures the image processor takes; None where none is left."""
        try:
            return self.collate(self._packs([sample for _, sample in samples])) if samples else None
        except UserError:
            raise
        except Exception:  # image processors raise anything, and do not say at which row
            accepted = []
            for row, sample in samples:
                try:
                    self.check(sample)
                    accepted.append(sample)
                except RowError as error:
                    reject(row, error)
            if len(accepted) == len(samples):
                raise
            return self.collate(self._packs(accepted)) if accepted else None

    def _packs(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples with those of a pack as one; rows that are longer than they were measured to be make another."""
        found: list[Sample] = []
        for pack, rows in itertools.groupby(samples, lambda sample: sample.pack):
            if pack is None:
                found += rows
                continue
            held: list[Sample] = []
            for row in rows:
                length = sum(len(each.chat.input_ids) for each in (*held, row))
                if held and self.max_length is not None and length > self.max_length:
                    found.append(Sample.packed(held))
                    held = []
                held.append(row)
            found.append(Sample.packed(held))
        return found

    def check(self, sample: Sample) -> None:
        """Sends each picture of a row through the image processor by itself.

        Raises:
            PictureError: It refuses one.
        """
        check_pictures(self.processor, Pictures(sample.images, sample.instructions, f"row {sample.id}", sample.names))

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Messages → text, the places of images in it, and the character spans in the loss. To override."""
        return self.processor.render(messages)

    def sample(self, row: Row, with_images: bool = True) -> Sample:
        """A row as one sample: what `encode` makes of it; of rows that share their images, of each of them.

        Args:
            row: A row of the dataset.
            with_images: As `encode`.

        Raises:
            RowError: As `encode`, or the rows cannot share them.
        """
        rows = apart(unpacked(row))
        if len(rows) == 1:
            return self.encode(rows[0], with_images)
        samples = [self.encode(each, with_images and not number) for number, each in enumerate(rows)]
        return Sample.sharing(samples, self.max_length)

    def encode(self, row: Row, with_images: bool = True) -> Sample:
        """One row → ids, labels and decoded images. To override (call this first, then change the sample).

        Args:
            row: A row of the dataset.
            with_images: False measures a row without opening its images.

        Raises:
            RowError: Marks and images differ in number, nothing is supervised, the row cannot fit, an image is broken.
        """
        row = unpacked(row)
        where = f"row {row['id']}"
        images = row["images"]
        messages = write_boxes(self.processor, row["messages"], images, where, self.fetch)
        marks = sum(
            part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
        )
        if marks != len(images):
            raise RowError(
                f"{where}: its text has room for {marks} images (image marks) but it comes with {len(images)}; "
                f"give each image one mark.",
                where=where,
                reason="marks differ",
            )
        check_frames(self.processor, images, where)
        self._films = Films()
        try:
            limit, fetch, films = self.max_pixels, self.fetch, self._films
            sizes = picture_sizes(self.processor, images, where=where, max_pixels=limit, fetch=fetch, films=films)
            chat, kept = self._fit(messages, where, sizes)
            images = images[: chat.num_images]
            if not any(label != IGNORED for label in chat.labels):
                sentence = f"{where}: no token would be in the loss; give the row an answer from the assistant."
                raise RowError(sentence, where=where, reason="no answer")
            decoded = [self._picture(image, where) for image in images] if with_images else []
        finally:
            self._films.close()
            self._films = None
        lost, instructions = (len(messages) - kept + 1) // 2, self.processor.instructions(messages[:kept])
        names = [name_of(image) for image in images]
        return Sample(chat, decoded, str(row["id"]), turns_lost=lost, instructions=instructions, names=names)

    def _picture(self, image: ImageEntry, where: str) -> Image.Image:
        decode = partial(self.decode, image, where)
        return decode() if self.kept is None else self.kept.picture(image, decode)

    def decode(self, image: ImageEntry, where: str) -> Image.Image:
        """One image of a row as RGB; within a batch, the same picture for the same file or bytes.

        Args:
            image: `{"path", "bytes"}` as rows have it, maybe with sizes.
            where: The row in words, for errors.

        Raises:
            RowError: As `load_picture`.
        """
        file = image.get("path") if image.get("bytes") is None else image["bytes"]
        key = (file, *(image.get(name) for name in (*SIZES, TIME)))
        if self._decoded is not None and key in self._decoded:
            return self._decoded[key]
        loaded = load_picture(
            self.processor,
            image,
            where=where,
            max_pixels=self.max_pixels,
            side=self.side,
            fetch=self.fetch,
            films=self._films,
        )
        if self._decoded is not None:
            self._decoded[key] = loaded
        return loaded

    def _fit(
        self, messages: Sequence[Message], where: str, sizes: Sequence[tuple[int, int]]
    ) -> tuple[EncodedChat, int]:
        """Encodes as many whole turns as fit; returns them and the number of messages kept.

        A conversation that is too long is encoded whole, up to where its answers say that it fits, and a turn further;
        where that guess is wrong, the number of turns is bisected. Both need texts that only grow with the turns: with
        a template that prints something else (an earlier turn's thoughts, say), turns are dropped one by one.
        """
        whole, chat = self._encode_turns(messages, where, sizes)
        if self.max_length is None or len(chat.input_ids) <= self.max_length:
            return chat, len(messages)
        ends = [n for n in range(1, len(messages)) if messages[n - 1]["role"] == "assistant"] + [len(messages)]
        guess = following = max(1, _answers_within(chat.labels, self.max_length))
        fit, best, too_many, grows = 0, chat, len(ends), True
        while too_many - fit > 1:
            turns = following if fit < following < too_many else (fit + too_many) // 2
            turns = turns if grows else too_many - 1
            rendered, fewer = self._encode_turns(messages[: ends[turns - 1]], where, sizes)
            if grows and not whole.text.startswith(rendered.text):
                fit, too_many, grows = 0, len(ends), False
            elif len(fewer.input_ids) <= self.max_length:
                fit, best, following = turns, fewer, guess + 1
            else:
                too_many, chat, following = turns, fewer, guess - 1
        if fit:
            return best, ends[fit - 1]
        raise RowError(
            f"{where}: its first turn alone has {len(chat.input_ids)} tokens ({sum(chat.places)} of them for images) "
            f"but sft.max_length is {self.max_length}; raise max_length or remove the row.",
            where=where,
            reason="too long",
        )

    def _encode_turns(
        self, messages: Sequence[Message], where: str, sizes: Sequence[tuple[int, int]]
    ) -> tuple[RenderedChat, EncodedChat]:
        """A row's messages, or the first of them, as text and as ids; what is wrong with them is the row's error."""
        try:
            rendered = self.render(messages)
            return rendered, self.processor.encode_rendered(rendered, sizes)
        except UserError as error:
            reason = error.reason if isinstance(error, RowError) else "bad conversation"
            raise RowError(f"{where}: {error}", where=where, reason=reason) from error

    def collate(self, samples: Sequence[Sample]) -> Inputs:
        """Samples → one padded batch. To override."""
        chats = [sample.chat for sample in samples]
        batch = dict(self.processor.batch(chats, multiple_of=self.pad_to_multiple_of))
        images = [image for sample in samples for image in sample.images]
        instructions = [text for sample in samples for text in sample.instructions]
        made = self.kept.image_inputs(self.processor, images, instructions) if self.kept else None
        batch.update(self.processor.image_inputs(images, instructions) if made is None else made)
        if any(sample.loss_weights is not None for sample in samples):
            given = [(sample.loss_weights, len(sample.chat.input_ids)) for sample in samples]
            weights = [[1.0] * length if each is None else each for each, length in given]
            if self.processor.answer_start is not None:  # labels are answers alone
                pairs = [zip(row, chat.labels, strict=True) for row, chat in zip(weights, chats, strict=True)]
                weights = [[1.0, *(weight for weight, label in row if label != IGNORED)] for row in pairs]
            batch["loss_weights"] = pad(weights, batch["labels"].shape[1], 0.0)
        return batch


def _answers_within(labels: Sequence[int], length: int) -> int:
    """How many runs of learned tokens end within the first `length` of a row."""
    learned = np.array([*labels, IGNORED]) != IGNORED
    return int((learned[:-1] & ~learned[1:])[:length].sum())
