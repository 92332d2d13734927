"""TRL's `SFTTrainer` with what vision-language training needs, and nothing else.

Added: learning rates by part, a loss that scores only supervised positions on every device, throughput and data-wait
metrics, the image-use metric at every evaluation, and a bundle at every save.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from peft import LoraConfig
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.trainer import SCHEDULER_NAME
from trl import SFTConfig

from ..base.names import IGNORED
from ..batch.collator import REJECTED, SEEN
from ..batch.image_swap import with_other_images
from ..bundle.load import load_trained
from ..bundle.manifest import Provenance, held_parts
from ..bundle.save import save_bundle
from ..data.ledger import Ledger
from ..model.freeze import FreezePlan, is_adapter, is_quantised, part_of
from ..model.modeling import VLMForConditionalGeneration
from ..model.sharding import gather, repeated_layers
from ..stack.lora import add_adapter
from .watch import WatchedTrainer

if TYPE_CHECKING:
    from datasets import Dataset

    from ..batch.collator import MultimodalCollator
    from ..batch.processor import VLMProcessor

# What is added up over the batches since the last log, on every process.
COUNTERS = (
    *("hits", "supervised", "loss", "tokens", "samples", "wait_seconds", "step_seconds"),
    *("own_loss", "other_loss", "image_tokens"),
)


class VLMSFTTrainer(WatchedTrainer):
    """Trains a composed stack.

    Args:
        model: The composed model.
        args: TRL's own configuration, unchanged.
        data_collator: Makes the batches.
        train_dataset: Rows `{"messages", "images", "source", "id"}`.
        processing_class: The stack's processor.
        peft_config: PEFT's own configuration, or None for no adapter.
        plan: The freeze plan; applied after the adapters are in, asserted on the optimizer.
        eval_dataset: Rows like the training rows, or None.
        provenance: What a bundle says about where it came from; None saves trained weights and processor alone.
        image_use: Measures at each evaluation how much the loss depends on the image (a second forward pass).
        **kwargs: Passed on to `WatchedTrainer` and `SFTTrainer`.
    """

    def __init__(
        self,
        model: VLMForConditionalGeneration,
        args: SFTConfig,
        data_collator: MultimodalCollator,
        train_dataset: Dataset,
        processing_class: VLMProcessor,
        peft_config: LoraConfig | None = None,
        *,
        plan: FreezePlan,
        eval_dataset: Dataset | None = None,
        provenance: Provenance | None = None,
        image_use: bool = True,
        **kwargs: Any,
    ) -> None:
        self.plan = plan
        self.provenance = provenance
        # Images can be exchanged only where each takes as many tokens as any other.
        self.image_use = image_use and bool(processing_class.num_image_tokens)
        self._sums: dict[str, defaultdict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._last_images: torch.Tensor | None = None
        self._rejected: list[tuple[str, str, str, str]] = []
        self._seen: Counter[str] = Counter()
        self.ledgers = ledgers_of(provenance)
        args.remove_unused_columns = False  # the collator needs every column
        if args.ddp_find_unused_parameters is None:
            # Every batch gives every trained parameter a gradient (VLMModel.embed), so there is nothing to search;
            # but a tower's pooling head, and its layers behind `feature_layer`, are never reached.
            args.ddp_find_unused_parameters = "vision_tower" in plan.train
        if peft_config is not None and is_quantised(model):
            model, peft_config = add_adapter(model, peft_config), None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        plan.apply(self.model)  # PEFT froze everything but its own weights
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or repeated_layers(self.model)
            # autocast alone decides what is computed in bf16, as on one GPU: FSDP would cast the fp32 Q-Former too.
            plugin.mixed_precision_policy = MixedPrecisionPolicy()

    # -- learning rates ---------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Also spares norms of every class: transformers misses RMS norms called `norm1` or `ln_q` (Qwen2.5-VL)."""
        norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        return [name for name in super().get_decay_parameter_names(model) if name.rpartition(".")[0] not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that transformers builds, its groups split so that each part learns at its own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            target = self.model if model is None else model
            self.plan.split_by_rate(optimizer, target)
            self.plan.check_optimizer(optimizer.param_groups, target)
        return optimizer

    # -- loss and metrics -------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Loss over supervised positions alone; the full (B, S, vocabulary) logits never exist."""
        outputs = model(**inputs, supervised_only=True, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The divisor counts the tokens of every rank, and DDP averages the gradients over the ranks.
            loss = loss * self.accelerator.num_processes
        sums = self._sums["train" if self.model.training else "eval"]
        sums["hits"] += float(outputs.token_hits.sum())
        sums["supervised"] += outputs.token_hits.numel()
        sums["tokens"] += float(inputs["attention_mask"].sum())
        sums["samples"] += inputs["input_ids"].shape[0]
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetches the next batches and measures how long the trainer waited for them."""
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._sums["train"]["wait_seconds"] += time.perf_counter() - start
        for batch in batches[0]:
            self._rejected += batch.pop(REJECTED, [])
            self._seen.update(batch.pop(SEEN, {}))
        return batches

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, timed."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._sums["train"]["step_seconds"] += time.perf_counter() - start
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluation loss of a batch and, where it has images, the loss with images of other samples."""
        self._rejected += inputs.pop(REJECTED, [])
        inputs.pop(SEEN, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            self._sums["eval"]["loss"] += float(loss) * outputs.token_hits.numel()
            if self.image_use:
                self._measure_image_use(model, inputs, outputs.token_losses)
        return loss.detach(), None, None

    def _measure_image_use(self, model: nn.Module, inputs: dict[str, Any], own: torch.Tensor) -> None:
        """Adds the losses of the rows whose images could all be exchanged, with own and with other images."""
        images, processor = inputs.get("pixel_values"), self.processing_class
        inputs, complete = with_other_images(
            inputs, processor.image_token_id, processor.ids_per_image, self._last_images
        )
        self._last_images = self._last_images if images is None else images
        # Where weights are sharded, a forward pass takes every process, also those that have nothing to measure.
        if not self._on_any_process(bool(complete.any())):
            return
        other = model(**inputs, supervised_only=True, use_cache=False).token_losses
        rows = (inputs["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        chosen = complete[rows]
        sums = self._sums["eval"]
        sums["own_loss"] += float(own[chosen].sum())
        sums["other_loss"] += float(other[chosen].sum())
        sums["image_tokens"] += int(chosen.sum())

    def _on_any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds our metrics, summed over all processes since the last log, and hands on to transformers."""
        mode = "train" if self.model.training else "eval"
        if "train_loss" in logs:  # the last one, on the whole run: what is left of a few steps says nothing of it
            self._sums[mode].clear()
        sums = self._reduced(mode)
        prefix = "" if mode == "train" else "eval_"
        if sums["supervised"]:
            logs[f"{prefix}token_accuracy"] = sums["hits"] / sums["supervised"]
        if "eval_loss" in logs and sums["supervised"]:  # every token alike, whatever the batch size
            logs["eval_loss"] = sums["loss"] / sums["supervised"]
        busy = (sums["step_seconds"] + sums["wait_seconds"]) / self.accelerator.num_processes
        if mode == "train" and busy and sums["samples"]:
            logs["tokens_per_second"] = sums["tokens"] / busy
            logs["samples_per_second"] = sums["samples"] / busy
            logs["data_wait_share"] = sums["wait_seconds"] / self.accelerator.num_processes / busy
        if mode == "train" and "learning_rate" in logs:  # which is the first group's
            rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups if "part" in group}
            logs.update({f"learning_rate_{part}": rate for part, rate in rates.items()} if len(rates) > 1 else {})
        if sums["image_tokens"]:
            own, other = sums["own_loss"] / sums["image_tokens"], sums["other_loss"] / sums["image_tokens"]
            logs.update(eval_loss_own_image=own, eval_loss_other_image=other, eval_image_use=other - own)
        self._sums[mode].clear()
        self._last_images = None  # an evaluation does not depend on the one before
        super().log(logs, start_time)
        self._enter_rejected(mode)

    def _enter_rejected(self, mode: str) -> None:
        """Enters the rows that all processes left out since the last log; too many stop all of them alike."""
        rejected, self._rejected = self._rejected, []
        seen, self._seen = [dict(self._seen)], Counter()
        if self.accelerator.num_processes > 1:
            rejected, seen = gather_object(rejected), gather_object(seen)
        if (rejected or any(seen)) and mode in self.ledgers and self.provenance is not None:
            ledger = self.ledgers[mode]
            for counts in seen:
                for name, rows in counts.items():
                    ledger.see(name, rows)
            for row in rejected:
                ledger.meet(*row)
            self.provenance.notes["ledger"][mode] = ledger.as_dict()
            ledger.check(Console(stderr=True, quiet=not self.is_world_process_zero()), mode)

    def _reduced(self, mode: str) -> defaultdict[str, float]:
        local = torch.tensor([self._sums[mode][name] for name in COUNTERS], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            local = self.accelerator.reduce(local.float().to(self.accelerator.device), reduction="sum").double().cpu()
        return defaultdict(float, zip(COUNTERS, local.tolist(), strict=True))

    def counters(self) -> dict[str, Any]:
        """Also what is added up over the batches since the last log, and the rows rejected so far."""
        ledger = {name: ledger.as_dict() for name, ledger in self.ledgers.items()}
        return {**super().counters(), "sums": dict(self._sums["train"]), "rejected": self._rejected,
                "seen": self._seen, "ledger": ledger}  # fmt: skip

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Puts back what `counters` gave."""
        super().set_counters(saved)
        self._sums["train"].update(saved["sums"])
        self._rejected, self._seen = saved["rejected"], Counter(saved["seen"])
        for name, ledger in self.ledgers.items():
            ledger.sources = Ledger.from_dict(saved["ledger"][name]).sources

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the bundle. Every process must call it: each may hold a share of what is saved.

        transformers would gather the whole model, frozen weights and all, or save nothing under
        `fsdp_state_dict_type: SHARDED_STATE_DICT`.
        """
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Every save is a bundle: trained parameters, adapter, processor, provenance; no frozen weight, no pickle."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        held = held_parts(self.plan, self.provenance.pieces if self.provenance else {})
        gathered = gather(model, lambda name: is_adapter(name) or part_of(name) in held)
        if self.args.should_save:
            save_bundle(folder, model, self.processing_class, self.plan, self.provenance, state_dict=gathered)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP the optimizer's state without the model: the bundle holds what was trained, and no pickle."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(Path(resume_from_checkpoint), model or self.accelerator.unwrap_model(self.model), self.plan)

    def _load_best_model(self) -> None:
        # transformers looks for whole weights, finds none in a bundle and would go on with the last ones.
        load_trained(Path(self.state.best_model_checkpoint), self.accelerator.unwrap_model(self.model), self.plan)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card names the wrong task; the bundle writes its own."""


def ledgers_of(provenance: Provenance | None) -> dict[str, Ledger]:
    """`train` and `eval` → their ledgers, out of the notes that `load_rows` gave."""
    saved = provenance.notes.get("ledger", {}) if provenance else {}
    return {name: Ledger.from_dict(ledger) for name, ledger in saved.items()}
