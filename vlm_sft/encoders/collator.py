"""Rows → batches of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.names import Inputs, Row
from ..batch.collator import MultimodalCollator
from ..batch.encoding import Sample
from ..batch.pictures import name_of
from ..reading.video import Films
from ..rows.messages import unpacked
from .processor import EncoderProcessor, question_of

LEARNED = "learned"  # under `Sample.extra`: what `EncoderProcessor.facts` gave


class EncoderCollator(MultimodalCollator):
    """Makes batches of rows that ask one question about one picture; see `MultimodalCollator`."""

    processor: EncoderProcessor

    def encode(self, row: Row, with_images: bool = True) -> Sample:
        """One row → ids of its question, its answers and its picture; a question that is too long is cut.

        Raises:
            RowError: It is not one question about one picture, its answers are none of the model's, or the picture is
                broken.
        """
        row = unpacked(row)
        where = f"row {row['id']}"
        question_of(row["messages"], where)
        (image,) = row["images"]  # as many as its text has marks for: one
        learned = self.processor.facts(row, self.max_length, where)
        chat, cut = self.processor.encode_question(row["messages"], self.max_length)
        with Films() as self._films:
            decoded = [self._picture(image, where)] if with_images else []
        self._films = None
        names = [name_of(image)]
        return Sample(chat, decoded, str(row["id"]), turns_lost=int(cut), extra={LEARNED: learned}, names=names)

    def collate(self, samples: Sequence[Sample]) -> Inputs:
        """Samples → questions and pixels, and what is learned of them."""
        batch = super().collate(samples)
        return {**batch, **self.processor.targets([sample.extra[LEARNED] for sample in samples])}
