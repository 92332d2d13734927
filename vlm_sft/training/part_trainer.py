"""What `Trainer` of transformers needs to train some parts of a model, and some of them faster than others.

Added: learning rates by part, and a bundle at every save. What is measured stands in `meters`, what is noticed of a
step that goes wrong in `watch`, and how a run is left and gone on with in `checkpointing`; each keeps its own state,
and `counters` gathers what a checkpoint must hold of it.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer, TrainerControl
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig

from ..base.errors import UserError
from ..base.interrupts import Interrupts, workers_end_with_errors
from ..base.names import Inputs, Json
from ..batch.by_length import GroupsByLength
from ..bundle.load import load_trained
from ..bundle.manifest import Provenance, held_parts
from ..bundle.save import save_bundle
from ..cache.prefix import UsesPrefix
from ..data.ledger import Ledger
from ..model.freeze import FreezePlan, is_adapter, part_of
from ..model.sharding import gather, repeated_layers
from .ahead import Ahead, can_be_made_ahead, draws_nothing
from .checkpointing import EvaluatesWithoutRows, SavePoints
from .meters import Meters, RowsMet, ledgers_of
from .watch import ROW_IDS, Collator, Watch, dead_worker, gone_workers

if TYPE_CHECKING:
    from datasets import Dataset

    from ..batch.collator import MultimodalCollator
    from ..batch.processor import VLMProcessor


class PartTrainer(EvaluatesWithoutRows, GroupsByLength, UsesPrefix, Trainer):
    """Trains the parts of a model that a freeze plan names.

    Args:
        model: The model.
        args: TRL's own configuration, unchanged.
        data_collator: Makes the batches.
        train_dataset: Rows `{"messages", "images", "source", "id"}`.
        processing_class: The model's processor.
        plan: The freeze plan; applied after any adapters are in, asserted on the optimizer.
        eval_dataset: Rows like the training rows, or None.
        provenance: What a bundle says about where it came from; None saves trained weights and processor alone.
        nonfinite: What happens when a loss or gradient is not finite: `stop`, or `skip` the step.
        jump: How far a loss may jump, in spreads; None for no limit. See `watch.Losses`.
        **kwargs: Passed on to the trainer below.

    Attributes:
        interrupts: Where signals are remembered; None to leave them alone.
        interrupted: The training was saved and stopped because of one.
    """

    interrupts: Interrupts | None = None
    interrupted = False
    control: TrainerControl
    data_collator: Collator

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        data_collator: MultimodalCollator,
        train_dataset: Dataset,
        processing_class: VLMProcessor,
        *,
        plan: FreezePlan,
        eval_dataset: Dataset | None = None,
        provenance: Provenance | None = None,
        nonfinite: Literal["stop", "skip"] = "stop",
        jump: float | None = 10.0,
        **kwargs: Any,
    ) -> None:
        self.plan = plan
        self.provenance = provenance
        self.ledgers = ledgers_of(provenance)
        self._notes: str | None = None  # where data-loader workers note the rows that they have in hand
        self._ahead: Ahead | None = None  # the batches of this epoch, where a thread makes them
        args.remove_unused_columns = False  # the collator needs every column
        args = self.take_packing(args)
        # As TRL has it: else accelerate cuts all that a stream's batch has to as many as it has rows, answers too.
        args.accelerator_config.dispatch_batches = args.accelerator_config.dispatch_batches or False
        args.accelerator_config.non_blocking |= args.dataloader_pin_memory  # pinned batches go over meanwhile
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.meters, self.rows_met = Meters(self.accelerator), RowsMet(self.accelerator)
        self.watch = Watch(self, nonfinite, jump)
        self.save_points = SavePoints(self)
        self.add_callback(self.watch)
        self.add_callback(self.save_points)
        self.accelerator.ddp_handler.gradient_as_bucket_view = True  # not copied into the buckets that are sent
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

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; a data-loader worker that dies ends it with its rows named.

        Raises:
            UserError: A worker died, or a loss is not finite and `nonfinite` is `stop`.
        """
        notes = tempfile.TemporaryDirectory(prefix="vlm_sft-", ignore_cleanup_errors=True)
        with notes as self._notes, workers_end_with_errors():  # workers first: they write there as long as they live
            try:
                try:
                    return super().train(*args, **kwargs)
                except ConnectionError as error:
                    # What a dead worker sent cannot be read; torch says so when the signal of its death comes, once.
                    time.sleep(5)
                    if gone := gone_workers(Path(self._notes)):
                        raise RuntimeError(gone) from error
                    raise
            except RuntimeError as error:
                if sentence := dead_worker(str(error), Path(self._notes)):
                    raise UserError(sentence) from error
                raise
            finally:
                self._notes = None
                if self._ahead is not None:
                    self._ahead.close()
                    self._ahead = None

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        own = self.data_collator
        if self.is_in_train:
            token = getattr(self.model.config, "image_token_id", None)
            # A copy where a thread may make batches, as an evaluation makes others meanwhile.
            made_by = copy.copy(own) if draws_nothing(own) else own
            self.data_collator = self.watch.collator(made_by, self._notes, token)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = own

    def _init_training_state(
        self, max_steps: int, steps_in_epoch: int, epochs: int, resumed_from: str | None, trial: Any
    ) -> tuple[int, int]:
        self.save_points.resumed_from = resumed_from
        done, batches = super()._init_training_state(max_steps, steps_in_epoch, epochs, resumed_from, trial)
        if self.state.global_step >= self.state.max_steps:
            # Killed between the last save and the end: transformers would do one step more.
            done, batches = epochs, 0
        self.save_points.epoch = done
        return done, batches

    def get_batch_samples(self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device) -> Any:
        """Fetches the next batches, measures how long that takes, and takes out of them what is not for the model."""
        began = time.perf_counter()
        batches, items = super().get_batch_samples(self._made_ahead(epoch_iterator, num_batches), num_batches, device)
        self.meters.add_wait(began)
        for batch in batches:
            self.rows_met.take(batch)
        self.watch.coming = deque(batch.pop(ROW_IDS, []) for batch in batches)
        return batches, items

    def _made_ahead(self, batches: Iterator[Inputs], room: int) -> Iterator[Inputs]:
        """An epoch's batches, those of the next step made meanwhile where no worker does it and a thread may."""
        if self._ahead is None or self._ahead.batches is not batches:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            if not can_be_made_ahead(self.callback_handler.train_dataloader, self.data_collator):
                return batches
            self._ahead = Ahead(batches, room, self.args.device)
        return self._ahead

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: the scaler skips such steps itself
        self.watch.gradient = None if scaled else norm
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds our metrics, summed over all processes since the last log, and hands on to transformers."""
        mode: Literal["train", "eval"] = "train" if self.model.training else "eval"
        self.meters.enter(logs, mode, self.optimizer.param_groups if self.optimizer else [])
        if "train_loss" in logs:  # the mean of the whole run, not only of the part after a resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)
        if mode in self.ledgers and self.provenance is not None:
            self.rows_met.enter(mode, self.ledgers[mode], self.provenance.notes["ledger"])

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if not self.interrupted:
            return super()._finalize_training(trial, num_train_samples, start_time)
        # No loading of the best weights, and no deletion of the checkpoint that was just saved.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    # -- what transformers does not save ----------------------------------------------------------------------------

    def counters(self) -> Json:
        """What this process adds up between logs, and the rows that it has met, as JSON can hold it."""
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "recent": list(self.watch.losses.recent),
            "sums": self.meters.own("train"),
            "rejected": self.rows_met.rejected,
            "seen": self.rows_met.seen,
            "ledger": {name: ledger.as_dict() for name, ledger in self.ledgers.items()},
        }

    def set_counters(self, saved: Json) -> None:
        """Puts back what `counters` gave."""
        self._tr_loss += saved["loss"]
        self._total_loss_scalar = saved["logged_loss"]
        self._globalstep_last_logged = saved["logged_step"]
        self.watch.losses.recent.extend(saved["recent"])
        self.meters.sums["train"] = dict(saved["sums"])
        self.rows_met.rejected, self.rows_met.seen = saved["rejected"], Counter(saved["seen"])
        for name, ledger in self.ledgers.items():
            ledger.sources = Ledger.from_dict(saved["ledger"][name]).sources

    # -- saving -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.save_points.beside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_points.write(partial(super()._save_checkpoint, model, trial))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the one part of a save that every process does
        self.save_points.write_counters(output_dir)

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
        self.save_points.forget_bundle()

    def release(self) -> None:
        """Gives back what only training needs: gradients, optimizer, schedule, batches, and memory that is cached.

        The weights stay; nothing can be trained any more.
        """
        self.model.zero_grad(set_to_none=True)
        self.model_wrapped = self.model  # DDP keeps room for every gradient
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.callback_handler.train_dataloader = self.callback_handler.eval_dataloader = None
        self.accelerator.free_memory()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card names the wrong task; the bundle writes its own."""
