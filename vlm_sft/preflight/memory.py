"""How much memory a run takes on each device: weights, gradients, optimizer and activations, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from ..base.console import plain_table
from ..base.names import ALL_PARTS
from ..base.words import gib
from ..model.freeze import bytes_of, part_of
from .launch import Launch
from .step_memory import Counted

# Optimizers of transformers (`sft.optim`) → how many numbers they keep for a weight, in the weight's own type.
MOMENTS = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "adamw_torch_xla": 2, "adamw_torch_npu_fused": 2, "sgd": 0, "adagrad": 1,
    "rmsprop": 1,
}  # fmt: skip
# bitsandbytes' → (numbers for a weight, bytes of each). Paged ones lie in memory that the host can take back.
BITSANDBYTES = {
    "adamw_bnb_8bit": (2, 1), "adamw_8bit": (2, 1), "paged_adamw_8bit": (2, 1), "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, 1), "paged_lion_8bit": (1, 1), "lion_32bit": (1, 4), "paged_lion_32bit": (1, 4),
    "rmsprop_bnb": (1, 4), "rmsprop_bnb_8bit": (1, 1), "rmsprop_bnb_32bit": (1, 4),
}  # fmt: skip
# bitsandbytes keeps small tensors in 32 bits, and one fp32 scale for each so many weights of others.
SMALL, BLOCK = 4096, 256
TIGHT = 0.9
"""Share of a device that can be planned with; what is not counted takes the rest."""
NOT_COUNTED = (
    "Not counted: what the GPU's driver and libraries take for themselves (half a GiB to one), what the allocator "
    "cannot use between blocks, and NCCL's buffers."
)


@dataclass
class PartMemory:
    """Bytes of one part on one device."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a run takes on each device.

    Attributes:
        parts: Part → its bytes.
        step: What the forward and backward pass hold; None where it was not counted.
        gathered: Weights of shared-out layers that are put together while they are used.
        launch: The processes.
    """

    parts: dict[str, PartMemory]
    step: Counted | None
    gathered: int
    launch: Launch

    def sum_of(self, what: str) -> int:
        """Bytes of `weights`, `gradients` or `optimizer` of all parts."""
        return sum(getattr(part, what) for part in self.parts.values())

    @property
    def activations(self) -> int:
        """The peak of a step, of which new gradients may be a share."""
        return self.step.peak if self.step else 0

    @property
    def total(self) -> int:
        """The most at any moment, on one device.

        Where nothing is shared out, new gradients are in the peak of the step, and count once.
        """
        fixed = self.sum_of("weights") + self.sum_of("optimizer") + self.gathered
        if self.launch.processes > 1:
            return fixed + self.sum_of("gradients") + self.activations
        return fixed + max(self.sum_of("gradients"), self.activations)

    def table(self) -> Table:
        """Rows for the terminal; 80 columns hold it."""
        table = plain_table(f"Memory of a device ({self.launch})", NOT_COUNTED)
        table.add_column("part", no_wrap=True)
        columns = ("weights", "gradients", "optimizer")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, part in self.parts.items():
            table.add_row(name, *(gib(getattr(part, column)) for column in columns))
        table.add_section()
        if self.gathered:
            table.add_row("gathered layers", gib(self.gathered), "", "")
        if self.step:
            table.add_row("kept by the forward pass", gib(self.step.kept), "", "")
            table.add_row("peak of the passes", gib(self.step.peak), "", "")
        table.add_row("most at any moment", gib(self.total), "", "", style="bold")
        return table


def estimate(
    model: nn.Module,
    step: Counted | None,
    launch: Launch,
    optimizer: str = "adamw_torch_fused",
    computes: torch.dtype = torch.float32,
) -> Estimate:
    """Adds up what a model takes, freeze plan applied; it may lie on the meta device.

    Args:
        model: A composed model, or PEFT's wrapper of one.
        step: What `count_step` found, or None.
        launch: The processes, and what is shared out among them.
        optimizer: As `sft.optim` names it; one that is not known here counts as AdamW.
        computes: Type that the run computes in.
    """
    parts = {name: PartMemory() for name in ALL_PARTS}
    deepspeed = launch.kind == "DeepSpeed"
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        part = parts[part_of(name)]
        size = parameter.numel()
        # DeepSpeed casts the whole model, and trains fp32 copies that lie beside the optimizer's moments.
        cast = deepspeed and parameter.is_floating_point()
        width = computes.itemsize if cast else parameter.element_size()
        part.weights += launch.share("weights", size * width if cast else weight_bytes(parameter))
        if not parameter.requires_grad:
            continue
        # DDP copies gradients into buckets, which stay.
        copies = 2 if launch.kind == "DDP" else 1
        part.gradients += launch.share("gradients", size * width * copies)
        copy = size * 4 if cast and width < 4 else 0
        kept = optimizer_bytes(parameter, optimizer, 4 if cast else width, id(parameter) in embeddings)
        part.optimizer += launch.share("optimizer", kept + copy)
    used = {name: part for name, part in parts.items() if part.weights or part.gradients or part.optimizer}
    gathered = 0
    if launch.stage == 3 and launch.processes > 1:  # of each list of layers, one layer is gathered at a time
        layers = (layer for child in model.modules() if isinstance(child, nn.ModuleList) for layer in child)
        largest = max((sum(weight.numel() for weight in layer.parameters()) for layer in layers), default=0)
        gathered = 2 * largest * computes.itemsize
    return Estimate(used, step, gathered, launch)


def too_large(needs: int, has: int) -> str | None:
    """A sentence where a run takes more memory than a device has, or almost as much; else None.

    Args:
        needs: Bytes that it is estimated to take.
        has: Bytes of the device.
    """
    if needs <= TIGHT * has:
        return None
    how = "which it does not have" if needs > has else f"and only {TIGHT:.0%} can be planned with"
    return (
        f"The run is estimated to take {needs / 2**30:.1f} GiB of {has / 2**30:.1f} GiB, {how}: `vlm-sft fit RECIPE` "
        f"says which settings fit."
    )


def weight_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a weight, of a quantised one with its scales.

    4 bits: one fp32 scale for 64 weights; under double quantisation one byte, and one fp32 scale for 256 of those
    (arXiv 2305.14314). 8 bits: one fp32 scale a row.
    """
    kind, size = type(parameter).__name__, bytes_of(parameter)
    if kind == "Int8Params":
        return size + 4 * parameter.shape[0]
    if kind != "Params4bit":
        return size
    blocks = -(-2 * size // parameter.blocksize)
    return size + (blocks + 4 * -(-blocks // 256) if parameter.compress_statistics else 4 * blocks)


def optimizer_bytes(parameter: nn.Parameter, name: str, width: int, embedding: bool = False) -> int:
    """Bytes that an optimizer keeps for one tensor of weights.

    Args:
        parameter: The tensor.
        name: The optimizer, as `sft.optim` names it.
        width: Bytes of a number of the tensor.
        embedding: Whether it is a table of embeddings, which transformers asks bitsandbytes to keep in 32 bits.
    """
    size, shape = parameter.numel(), parameter.shape
    if name == "adafactor":  # one row and one column of a matrix in place of a matrix (arXiv 1804.04235)
        return 4 * (size // shape[-1] + size // shape[-2] if len(shape) > 1 else size)
    if name in BITSANDBYTES:
        numbers, size_of_each = BITSANDBYTES[name]
        if size_of_each == 1 and size >= SMALL and not embedding:
            return numbers * (size + 4 * -(-size // BLOCK))
        return numbers * 4 * size
    return MOMENTS.get(name, 2) * width * size


def known_optimizer(name: str) -> bool:
    """Whether its state is counted as it is, and not as AdamW's."""
    return name in MOMENTS or name in BITSANDBYTES or name == "adafactor"
