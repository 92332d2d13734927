"""A model that is being trained, asked something: it answers as a finished one does, and goes on as if nobody had."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import DistributedType

from ..base.errors import RowError, UserError
from ..base.names import ImageEntry, Options, Row
from ..base.processes import share_work
from ..cache.prefix import FEATURES, PIXELS
from ..evaluation.pictures import EncodedOnce
from ..inference.confidence import Said
from ..inference.generation import answer_each

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..batch.collator import MultimodalCollator
    from ..batch.processor import VLMProcessor
    from ..cache.prefix import Prefix
    from ..training.part_trainer import PartTrainer


class InTraining:
    """The model of a run, between two of its steps.

    Args:
        trainer: What trains it.
    """

    def __init__(self, trainer: PartTrainer) -> None:
        self.trainer = trainer
        self.processor = trainer.processing_class

    @property
    def mute(self) -> str:
        """Why it cannot answer, or ""."""
        split = self.trainer.is_fsdp_enabled or self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        return "its weights are split" if split else ""

    @property
    def model(self) -> PreTrainedModel:
        """The model, without what shares it between processes."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)  # type: ignore[no-any-return]

    @contextmanager
    def aside(self) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode, and what is drawn always the same; afterwards all is as it was.

        Layers that are compiled for training run as they are: a cache of tokens would have each compiled anew.
        """
        model = self.model
        modes = [(module, module.training) for module in model.modules()]
        drawn, drawn_by_numpy, device = random.getstate(), np.random.get_state(), model.device
        devices: Options = {"devices": []}
        if device.type != "cpu":
            devices = {"devices": [device.index or 0], "device_type": device.type}
        with torch.random.fork_rng(**devices), torch.compiler.set_stance("force_eager"):
            seed = self.trainer.args.seed
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            model.eval()
            try:
                yield model
            finally:
                for module, mode in modes:
                    module.training = mode
                random.setstate(drawn)
                np.random.set_state(drawn_by_numpy)

    def answers(self, rows: Sequence[Row], batch_size: int, settings: Options) -> list[Said | RowError]:
        """An answer to each row, or why it cannot be asked; every process asks a share, and all have all answers.

        Args:
            rows: Each `{"messages", "images", "id"}`, as `answer` takes them.
            batch_size: Rows at a time.
            settings: For `generate`.

        Raises:
            UserError: In every process: `generate` refuses the settings, or the GPU's memory does not hold a batch.
        """

        def share(process: int, processes: int) -> list[Said | RowError]:
            mine, found = rows[process::processes], []
            with self.shared() as shared:
                for start in range(0, len(mine), batch_size):
                    found += self._answers(mine[start : start + batch_size], settings, shared)
            return found

        with self.aside():
            shares = share_work(share)
        return [shares[number % len(shares)][number // len(shares)] for number in range(len(rows))]

    def _answers(self, rows: Sequence[Row], settings: Options, shared: EncodedOnce) -> list[Said | RowError]:
        try:
            return answer_each(self.model, self.processor, shared.stand_ins(rows), **settings)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU's memory does not hold {len(rows)} questions beside the training; lower "
                "`evaluation.batch_size`."
            ) from None
        except RowError as error:
            if len(rows) == 1:
                return [error]
        return [found for row in rows for found in self._answers([row], settings, shared)]

    def shared(self) -> EncodedOnce:
        """A context in which each picture goes through the tower once, or not at all where the run has a cache."""
        if self.trainer.prefix is None:
            return EncodedOnce(self.model, self.processor)  # type: ignore[arg-type]
        return FromCache(self.model, self.processor, self.trainer.data_collator, self.trainer.prefix)  # type: ignore[arg-type]


class FromCache(EncodedOnce):
    """The same for a model whose vision tower, and maybe resampler, a cache stands in for.

    Args:
        model: The composed model.
        processor: Its processor.
        collator: Decodes pictures as those that are kept were.
        prefix: Has their features, or computes them. What only answers need is not kept on the disk.
    """

    def __init__(
        self, model: torch.nn.Module, processor: VLMProcessor, collator: MultimodalCollator, prefix: Prefix
    ) -> None:
        super().__init__(model, processor)
        self._collator, self._prefix = collator, prefix
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def encode(self, new: Mapping[bytes, tuple[ImageEntry, Row]]) -> None:
        """Keeps the features of pictures: key → picture, and a row that has it."""
        for key, (image, row) in new.items():
            decode = partial(self._collator.decode, image, f"row {row['id']}")
            made = self._prefix.kept.image_inputs(self._processor, [self._prefix.kept.picture(image, decode)], [])
            features = made.get(FEATURES)
            found = self._prefix.compute(made[PIXELS].to(self._device)) if features is None else features
            self._kept[key] = found[0].to(self._device)
            self.encoded += features is None
