"""What a machine has for training: GPUs and how fast they compute, cores, memory, room on the disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..base.processes import cores
from ..base.words import counted
from ..spoken.language import in_words

# Dense 16-bit TFLOPS of a GPU as its maker states them, and GiB of memory, by what its name holds; the first that fits.
GPUS: dict[str, tuple[float, int]] = {
    "GB200": (2250, 180), "B200": (2250, 180), "B100": (1750, 180), "H200": (989, 141), "H100 PCIe": (756, 80),
    "H100": (989, 80), "H800": (989, 80), "H20": (148, 96), "A100": (312, 80), "A800": (312, 80), "A40": (150, 48),
    "6000 Ada": (364, 48), "PRO 6000": (500, 96), "A6000": (155, 48), "L40S": (362, 48), "L40": (181, 48),
    "L20": (119, 48), "L4": (121, 24), "A30": (165, 24), "A10G": (70, 24), "A10": (125, 24), "V100": (112, 16),
    "T4": (65, 16), "P100": (19, 16), "5090": (210, 32), "5080": (113, 16), "5070 Ti": (88, 16), "5070": (62, 12),
    "5060": (48, 8), "4090": (165, 24), "4080": (98, 16), "4070 Ti": (80, 12), "4070": (58, 12), "4060": (44, 8),
    "3090": (71, 24), "3080": (60, 10), "3070": (41, 8), "3060": (26, 12), "2080": (54, 8),
}  # fmt: skip
UNKNOWN_GPU, A_CORE = 40, 0.03
GIB = 2**30
EFFICIENCY = 0.3
"""Share of the stated speed that training reaches; measured shares of such runs lie between 0.2 and 0.5."""


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        gpus: (name, bytes of memory) of each GPU.
        cores: That this process may use.
        ram: Bytes of memory that this process may use.
        disk: Bytes that are free where it works.
    """

    gpus: tuple[tuple[str, int], ...]
    cores: int
    ram: int
    disk: int

    @property
    def room(self) -> int:
        """Bytes that a model may take: those of the smallest GPU; without one, of the memory."""
        return min((size for _, size in self.gpus), default=self.ram)

    @property
    def speed(self) -> float:
        """Operations a second that training reaches, all GPUs together."""
        each = [flops_of(name) for name, _ in self.gpus] or [self.cores * A_CORE * 1e12]
        return sum(each) * EFFICIENCY

    def in_english(self) -> str:
        """`1 GPU (NVIDIA A100, 80 GiB), 8 cores, 64 GiB of memory, 500 GiB free on the disk`."""
        gpus = "no GPU"
        if self.gpus:
            name, size = self.gpus[0]
            gpus = f"{counted(len(self.gpus), 'GPU')} ({name}, {size / GIB:.0f} GiB)"
        memory, disk = f"{self.ram / GIB:.0f} GiB of memory", f"{self.disk / GIB:.0f} GiB free on the disk"
        return f"{gpus}, {counted(self.cores, 'core')}, {memory}, {disk}"

    def __str__(self) -> str:
        gpus = "没有 GPU"
        if self.gpus:
            name, size = self.gpus[0]
            gpus = f"{len(self.gpus)} 块 GPU（{name}，{size / GIB:.0f} GiB）"
        memory, disk = f"{self.ram / GIB:.0f} GiB 内存", f"磁盘剩余 {self.disk / GIB:.0f} GiB"
        return in_words(self.in_english(), f"{gpus}，{self.cores} 个核，{memory}，{disk}")


def flops_of(gpu: str) -> float:
    """Operations a second of a GPU as its maker states them; of an unknown one, those of a small one."""
    return (known_gpu(gpu) or (UNKNOWN_GPU, 0))[0] * 1e12


def known_gpu(gpu: str) -> tuple[float, int] | None:
    """TFLOPS and GiB of a GPU by its name; None for one that is not known here."""
    return next((found for name, found in GPUS.items() if name.lower() in gpu.lower()), None)


def this_machine(folder: Path) -> Machine:
    """The machine that this runs on; `folder` is where it writes."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            gpus.append((str(found.name), int(found.total_memory)))
    above = next((each for each in (folder, *folder.parents) if each.exists()), Path())
    return Machine(tuple(gpus), cores(), _memory(), shutil.disk_usage(above).free)


def _memory() -> int:
    """Bytes of memory, or what the container may take of it."""
    whole = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with os.fdopen(os.open(path, os.O_RDONLY)) as file:
                said = file.read().strip()
        except OSError:
            continue
        if said.isdecimal():
            return min(whole, int(said))
    return whole
