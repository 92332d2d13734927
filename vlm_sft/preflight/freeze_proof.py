"""Real steps that prove the freeze plan: each trained tensor moved, each frozen one is the same bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from ..base.names import Options
from ..base.progress import Steps, steps
from ..model.freeze import NEW_ROWS

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..training.part_trainer import PartTrainer

# LoRA's B is zero at first, so A has no gradient before the second step; a loss scaled for fp16 may skip a step or two.
FEWEST, MOST = 2, 4

# What a proof changes of `sft:`. The schedule must not start at zero, and weight decay would move what has no gradient.
SETTINGS: Options = {
    "max_steps": MOST, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "gradient_accumulation_steps": 1, "logging_steps": 1, "logging_strategy": "steps", "logging_first_step": False,
    "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "report_to": "none",
    "disable_tqdm": True, "push_to_hub": False, "resume_from_checkpoint": None,
}  # fmt: skip


@dataclass
class Proof:
    """What some real steps showed.

    Attributes:
        steps: Steps taken.
        losses: Loss of each.
        moved: Trained tensors that changed.
        still: Trained tensors that did not → why.
        unused: Trained tensors that the forward pass does not use; nothing can move them.
        frozen: Tensors that must not change, buffers of the model included.
        changed: Those of them that did.
        rows: Rows of a step.
        tokens_per_second: Tokens by the time of the last step, data and optimizer left out.
        seconds_per_step: Time of the last step, optimizer included.
        device: Where it ran.
        peak_bytes: Most memory of the GPU that was taken; None on a CPU.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    still: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    frozen: int = 0
    changed: list[str] = field(default_factory=list)
    rows: int = 0
    tokens_per_second: float = 0.0
    seconds_per_step: float = 0.0
    device: str = ""
    peak_bytes: int | None = None

    @property
    def finite(self) -> bool:
        """Whether every loss was a number."""
        return all(math.isfinite(loss) for loss in self.losses)


class Witness(TrainerCallback):
    """Compares fingerprints of tensors around the steps, and ends the training once every trained one has moved.

    Args:
        model: The model as the trainer has it; on one process.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        others = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.frozen = {name: tensor for name, tensor in others.items() if name not in self.trained}
        every = {**self.trained, **self.frozen}
        self.before = {
            name: fingerprint(tensor) for name, tensor in steps(every.items(), "read", "weights", len(every))
        }
        self.gradients: dict[str, float] = {}
        self.moved: dict[str, None] = {}
        self.seconds = 0.0
        self.steps = Steps("taken", MOST, "steps")
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._began = _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Notes the largest gradient of each trained tensor, of those that got any."""
        for name, tensor in self.trained.items():
            if tensor.grad is not None:
                largest = float(tensor.grad.abs().max()) if tensor.grad.numel() else 0.0
                self.gradients[name] = max(largest, self.gradients.get(name, 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes what moved."""
        self.seconds = _now() - self._began
        self.steps.n += 1
        waiting = {name: tensor for name, tensor in self.trained.items() if name not in self.moved}
        self.moved |= {name: None for name, tensor in waiting.items() if fingerprint(tensor) != self.before[name]}
        reached = [name for name in waiting if name in self.gradients and name not in self.moved]
        if state.global_step >= FEWEST and not reached:
            control.should_training_stop = True

    def is_idle(self, name: str) -> bool:
        """Whether a tensor holds new words of which no row had any: nothing could move it."""
        return NEW_ROWS in name and name not in self.moved and self.gradients.get(name) == 0

    def still(self) -> dict[str, str]:
        """Trained tensors that got a gradient and did not move → why."""
        found = {}
        for name, largest in self.gradients.items():
            if name in self.moved or self.is_idle(name):
                continue
            if largest == 0:
                found[name] = "its gradient is zero"
            else:
                kind = str(self.trained[name].dtype).removeprefix("torch.")
                found[name] = f"its gradient is not zero, but {kind} cannot hold a step this small: raise its rate"
        return found


def prove(trainer: PartTrainer) -> Proof:
    """Trains a few steps and says what moved.

    Args:
        trainer: The trainer of the recipe, built with `SETTINGS`, not yet started; it is used up.
    """
    witness = Witness(trainer.model)
    trainer.add_callback(witness)
    trainer.remove_callback(PrinterCallback)
    if on_gpu := trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with witness.steps:
        trainer.train()
    frozen = steps(witness.frozen.items(), "compared", "weights", len(witness.frozen))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Proof(
        steps=trainer.state.global_step,
        losses=[entry["loss"] for entry in logs],
        moved=list(witness.moved),
        still=witness.still(),
        unused=[name for name in witness.trained if name not in witness.gradients or witness.is_idle(name)],
        frozen=len(witness.frozen),
        changed=[name for name, tensor in frozen if fingerprint(tensor) != witness.before[name]],
        rows=trainer.args.train_batch_size,
        tokens_per_second=logs[-1].get("tokens_per_second", 0.0) if logs else 0.0,
        seconds_per_step=witness.seconds,
        device=torch.cuda.get_device_name() if on_gpu else "the CPU",
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def fingerprint(tensor: torch.Tensor) -> bytes:
    """Sixteen bytes that are the same only for the same bits; a copy of all weights would double the memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy(), digest_size=16).digest()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run behind the program
    return time.perf_counter()
