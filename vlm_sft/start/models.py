"""Existing models to start from, as data: how large each is, what it knows, and what training it by LoRA takes."""

from __future__ import annotations

from typing import NamedTuple

from ..machine.machine import Machine

GB = 2**30
HEADROOM = 0.9
"""Share of a GPU that is planned with: its driver, libraries and gaps between blocks take the rest."""
TEXT_TOKENS = 100  # tokens of a row beside those of its picture
OPERATIONS = 6  # for a weight and a token: forward, once more for what was not kept, and back to what LoRA learns
ROWS_A_STEP, FEWEST_ROWS = 16, 4


class Candidate(NamedTuple):
    """A model that one may start from.

    Attributes:
        pretrained: Its Hub id.
        billions: Of parameters.
        tokens: That a photo becomes, as the recipe has it.
        gib: Of memory that a step takes, LoRA on one row of `length` tokens, activations checkpointed, in 16 bits.
        gib_4bit: The same with the language model in 4 bits.
        row: Of memory, for each further row.
        chinese: Whether it knows Chinese well.
        license: On its card.
        length: Tokens of a row at most.
        max_pixels: Of a picture, for its own processor; None: as that has it.
    """

    pretrained: str
    billions: float
    tokens: int
    gib: float
    gib_4bit: float
    row: float
    chinese: bool
    license: str
    length: int = 2048
    max_pixels: int | None = None

    def takes(self, rows: int = 1, *, four_bits: bool = False) -> float:
        """Bytes of a step of so many rows."""
        return ((self.gib_4bit if four_bits else self.gib) + (rows - 1) * self.row) * GB


# Counted by `python benchmarks/starting_models.py` for a picture of 1280×960 pixels, rounded up; smallest first.
CANDIDATES = (
    Candidate("HuggingFaceTB/SmolVLM-256M-Instruct", 0.26, 832, 1.2, 1.1, 0.3, False, "Apache-2.0"),
    Candidate("HuggingFaceTB/SmolVLM-500M-Instruct", 0.51, 832, 1.8, 1.4, 0.4, False, "Apache-2.0"),
    Candidate("Qwen/Qwen3-VL-2B-Instruct", 2.1, 374, 5.0, 3.1, 0.4, True, "Apache-2.0", 1024, 401408),
    Candidate("HuggingFaceTB/SmolVLM-Instruct", 2.2, 1053, 5.2, 3.0, 0.9, False, "Apache-2.0"),
    Candidate("Qwen/Qwen2.5-VL-3B-Instruct", 3.8, 494, 8.2, 4.4, 0.5, True, "Qwen Research", 1024, 401408),
    Candidate("Qwen/Qwen3-VL-4B-Instruct", 4.4, 374, 9.6, 4.6, 0.5, True, "Apache-2.0", 1024, 401408),
    Candidate("Qwen/Qwen2.5-VL-7B-Instruct", 8.3, 494, 16.9, 8.0, 0.7, True, "Apache-2.0", 1024, 401408),
    Candidate("Qwen/Qwen3-VL-8B-Instruct", 8.8, 374, 17.9, 8.4, 0.6, True, "Apache-2.0", 1024, 401408),
)
ASK_FIRST = "Apache-2.0"  # the licence of what is proposed; others are shown


class Plan(NamedTuple):
    """How a model is trained on a machine.

    Attributes:
        pretrained: Hub id or folder.
        known: What is known of it; None for one that is none of `CANDIDATES`.
        four_bits: Whether its language model is loaded in 4 bits.
        rows: Of a step on one GPU.
        accumulation: Steps until the weights move.
        epochs: Times that every row is seen; below one, a share of them.
        hours: About how long that takes; None where nobody knows.
        memory: Bytes of a step; None where nobody counted.
    """

    pretrained: str
    known: Candidate | None
    four_bits: bool
    rows: int
    accumulation: int
    epochs: float
    hours: float | None
    memory: float | None


def known_model(name: str) -> Candidate | None:
    """What is known of a model by its Hub id, or by the last part of it."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return next((each for each in CANDIDATES if last == each.pretrained.rpartition("/")[2].lower()), None)


def fits(candidate: Candidate, machine: Machine) -> bool | None:
    """Whether a model fits a machine: True, True only in 4 bits (None), or not. Without a GPU, all is in 32 bits."""
    room = machine.room * HEADROOM
    if not machine.gpus:
        return candidate.billions <= 0.6 and 2 * candidate.takes() <= room / 2
    if candidate.takes() <= room:
        return True
    return None if candidate.takes(four_bits=True) <= room else False


def hours_of(known: Candidate, rows: int, machine: Machine) -> float:
    """About how long it takes to see so many rows once."""
    tokens = rows * (known.tokens + TEXT_TOKENS)
    return tokens * OPERATIONS * known.billions * 1e9 / machine.speed / 3600


def proposals(machine: Machine, chinese: bool, rows: int, hours: float) -> list[Candidate]:
    """The models that fit a machine, the one that is proposed first: the largest that sees every row in the time.

    Before size goes that it fits in 16 bits, and that it knows Chinese where pictures are spoken of in Chinese. Where
    none is fast enough, the smallest goes first.
    """
    there = [each for each in CANDIDATES if fits(each, machine) is not False] or [CANDIDATES[0]]

    def order(each: Candidate) -> tuple[bool, bool, bool, bool, float]:
        slow = hours_of(each, rows, machine) > hours
        size = each.billions if slow else -each.billions
        return (each.license != ASK_FIRST, slow, chinese and not each.chinese, fits(each, machine) is None, size)

    return sorted(there, key=order)


def plan(pretrained: str, rows: int, machine: Machine, hours: float) -> Plan:
    """How to train a model on so many rows within so many hours.

    Args:
        pretrained: Hub id or folder.
        rows: To train on.
        machine: Where.
        hours: That it may take.
    """
    known = known_model(pretrained)
    count = max(1, len(machine.gpus))
    wanted = max(1, min(ROWS_A_STEP // count, max(FEWEST_ROWS, rows // (8 * count)), rows))
    if known is None:
        batch = 1
        memory: float | None = None
        four_bits = False
    else:
        four_bits = fits(known, machine) is None
        room = machine.room * (HEADROOM if machine.gpus else 0.5)
        each = (room - known.takes(four_bits=four_bits)) / (known.row * GB)
        batch = max(1, min(8, wanted, 1 + int(each))) if machine.gpus else 1
        memory = known.takes(batch, four_bits=four_bits) if machine.gpus else None
    accumulation = max(1, round(wanted / batch))
    epoch = None if known is None else hours_of(known, rows, machine)
    usual = 3.0 if rows < 20_000 else 1.0
    epochs = usual if epoch is None else min(usual, hours / epoch)
    epochs = float(int(epochs)) if epochs >= 1 else max(0.01, round(epochs, 2))
    return Plan(pretrained, known, four_bits, batch, accumulation, epochs, epoch and epoch * epochs, memory)
