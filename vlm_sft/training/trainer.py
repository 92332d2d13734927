"""The trainers: TRL's `SFTTrainer` for what writes its answers, and transformers' own for encoders.

What both need to train parts stands in `part_trainer`; here is their loss: over supervised positions alone on every
device, or over rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ..base.names import Inputs
from ..model.freeze import is_quantised
from ..model.losses import VLMOutput
from ..model.modeling import VLMForConditionalGeneration
from ..stack.lora import add_adapter
from .meters import exact
from .part_trainer import PartTrainer
from .watch import ROW_IDS

if TYPE_CHECKING:
    from ..batch.collator import MultimodalCollator
    from ..batch.processor import VLMProcessor


class VLMSFTTrainer(PartTrainer, SFTTrainer):
    """Trains a composed stack, or an existing VLM.

    Args:
        model: The composed model.
        args: TRL's own configuration, unchanged.
        data_collator: Makes the batches.
        train_dataset: Rows `{"messages", "images", "source", "id"}`.
        processing_class: The stack's processor.
        peft_config: PEFT's own configuration, or None for no adapter.
        image_use: Measures at each evaluation how much the loss depends on the image (a second forward pass).
        **kwargs: Those of `PartTrainer`, and what is passed on to `SFTTrainer`.
    """

    def __init__(
        self,
        model: VLMForConditionalGeneration,
        args: SFTConfig,
        data_collator: MultimodalCollator,
        train_dataset: Any,
        processing_class: VLMProcessor,
        peft_config: LoraConfig | None = None,
        *,
        image_use: bool = True,
        **kwargs: Any,
    ) -> None:
        # Images can be exchanged only where each takes as many tokens as any other.
        self.image_use = image_use and not processing_class.reads_sizes
        if args.ddp_find_unused_parameters is None:
            # Every batch gives every trained parameter a gradient (VLMModel.embed), so there is nothing to search;
            # but a tower's pooling head, and its layers behind `feature_layer`, are never reached.
            args.ddp_find_unused_parameters = "vision_tower" in kwargs["plan"].train
        if peft_config is not None and is_quantised(model):
            model, peft_config = add_adapter(model, peft_config), None
        super().__init__(model, args, data_collator, train_dataset, processing_class, peft_config=peft_config, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Loss over supervised positions alone; the full (B, S, vocabulary) logits never exist."""
        with self.watch.naming(inputs):
            outputs = model(**inputs, supervised_only=True, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counts the tokens of every rank, and DDP averages the gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        self.meters.add_batch("train" if self.model.training else "eval", inputs, outputs)
        if self.is_in_train and self.model.training:
            self.watch.add(loss)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluation loss of a batch and, where it has images, the loss with images of other samples."""
        self.rows_met.take(inputs, seen=False)
        inputs.pop(ROW_IDS, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            self.meters.add("eval", loss=exact(loss) * outputs.token_hits.numel())
            if self.image_use:
                self.meters.add_image_use(model, inputs, outputs.token_losses, self.processing_class)
        return loss.detach(), None, None


class EncoderTrainer(PartTrainer):
    """Trains an encoder: its forward gives the mean loss over the rows of a batch, and which are right.

    Args:
        model: A model of `encoders`.
        args: As `PartTrainer`.
        *others: As `PartTrainer`.
        **kwargs: As `PartTrainer`.
    """

    def __init__(self, model: PreTrainedModel, args: SFTConfig, *others: Any, **kwargs: Any) -> None:
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # published checkpoints hold layers that are never run
        super().__init__(model, args, *others, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Rows of a step, on all devices where they are averaged over all."""
        rows = torch.tensor(sum(len(batch["pixel_values"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(rows).sum() if self.args.average_tokens_across_devices else rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The mean over the rows of a step, however they are divided into batches and among devices."""
        with self.watch.naming(inputs):
            outputs = model(**inputs)
        loss = outputs.loss
        if num_items_in_batch is not None:
            share = len(inputs["pixel_values"]) / num_items_in_batch
            loss = loss * share * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
        mode: Literal["train", "eval"] = "train" if self.model.training else "eval"
        self.meters.add_batch(mode, inputs, VLMOutput(token_hits=outputs.hits))
        if self.is_in_train and self.model.training:
            self.watch.add(loss)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluation loss of a batch."""
        self.rows_met.take(inputs, seen=False)
        inputs.pop(ROW_IDS, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            self.meters.add("eval", loss=exact(loss) * outputs.hits.numel())
        return loss.detach(), None, None
