"""The two steps between a bundle's model and what is written: LoRA is merged, and weights are rounded to their type.

A merge is compared in fp32, where it differs by almost nothing, and so is what is written, by a fresh process: rounding
to 16 bits comes between, is judged by itself, and hides neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import nn

from ..base.errors import UserError
from ..base.names import Json
from ..base.progress import steps
from ..model.freeze import is_adapter
from ..model.parts import passes
from ..stack.judge import judge, layers_of, measure

REFUSED = "{} gives another model, which is not written: {}."


class Comparison:
    """The logits of a bundle's model, and how far each step leads from them.

    Args:
        model: The model in fp32, with or without an adapter.
        logits: Computes the logits of a model that are compared; called again after each step.

    Attributes:
        wanted: Logits of the bundle, in fp32 and with LoRA unmerged.
        without: The same with the adapter off; None without one.
        found: What was seen so far: `merge_difference`, `type_difference` and `type_kl`.
    """

    def __init__(self, model: nn.Module, logits: Callable[[nn.Module], torch.Tensor]) -> None:
        self._logits, self._layers = logits, layers_of(model)
        self.found: dict[str, float] = {}
        self.wanted, self.without = self._compute(model), None
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                self.without = self._compute(model)

    @torch.inference_mode()
    def _compute(self, model: nn.Module) -> torch.Tensor:
        with passes(model):
            return self._logits(model).clone()

    def merge(self, model: nn.Module) -> nn.Module:
        """The model with LoRA merged into its weights (itself, where it has none).

        Raises:
            UserError: The merged model is not the same up to rounding.
        """
        if not isinstance(model, PeftModel):
            return model
        merged = model.merge_and_unload(safe_merge=True)
        found = measure(self.wanted, self._compute(merged), self.without)
        self.found["merge_difference"] = self._judged("Merging LoRA", found, torch.float32)["max_difference"]
        return merged

    def round(self, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """Rounds all weights but an adapter's to a type, keeps them in fp32, and returns the logits then.

        Raises:
            UserError: The type changes what the model says, for instance because its weights overflow in it.
        """
        if dtype != torch.float32:
            for name, tensor in steps(model.state_dict(keep_vars=True).items(), "rounded", "weights"):
                if tensor.is_floating_point() and not is_adapter(name):
                    tensor.data = tensor.data.to(dtype).to(tensor.dtype)
        logits = self._compute(model)
        self.accept(logits, dtype)
        return logits

    def accept(self, logits: torch.Tensor, dtype: torch.dtype) -> None:
        """Judges logits of the model in the type that is written.

        Raises:
            UserError: The type changes what the model says.
        """
        if dtype == torch.float32:
            return
        found = self._judged(f"Writing in {str(dtype).removeprefix('torch.')}", measure(self.wanted, logits), dtype)
        self.found |= {"type_difference": found["max_difference"], "type_kl": found["kl"]}

    def _judged(self, step: str, measured: Json, dtype: torch.dtype) -> Json:
        found = judge(measured, dtype, self._layers, "the bundle's")
        if not found["equal"]:
            raise UserError(REFUSED.format(step, found["why"]))
        return found
