"""What is added up between two logs: hits, tokens, losses, the time of steps and of waiting, and the rows that came.

A number that a device has made is added there and read where it is logged or saved, and nowhere else: to read one, the
host waits until the device has done all that came before.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..base.console import make_console
from ..base.names import Inputs, Json
from ..batch.collator import REJECTED, SEEN
from ..batch.counts import LABEL_POSITIONS, owners_of, places_in, rows_and_tokens
from ..batch.image_swap import images_of, with_other_images
from ..batch.processor import VLMProcessor
from ..bundle.manifest import Provenance
from ..data.ledger import Ledger
from ..model.losses import VLMOutput, supervised_positions

Mode = Literal["train", "eval"]
COUNTERS = (
    *("hits", "supervised", "loss", "tokens", "samples", "places", "wait_seconds", "step_seconds"),
    *("own_loss", "other_loss", "image_tokens", "router_loss", "routed"),
)


class Meters:
    """Sums of this process, by mode."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[Mode, dict[str, float | torch.Tensor]] = {"train": {}, "eval": {}}
        self._last_images: Inputs | None = None
        self._fetched = 0.0

    # -- adding -----------------------------------------------------------------------------------------------------

    def add(self, mode: Mode, **numbers: float | torch.Tensor) -> None:
        """Adds numbers to the sums of their names."""
        sums = self.sums[mode]
        for name, number in numbers.items():
            sums[name] = sums[name] + number if name in sums else number

    def add_batch(self, mode: Mode, inputs: Inputs, outputs: VLMOutput) -> None:
        """Adds what the forward pass of a batch says of it.

        Args:
            mode: Where it belongs.
            inputs: The batch.
            outputs: What the model made of it: (P,) whether each supervised label was the most likely token, and of a
                mixture of experts the routers' loss.
        """
        hits = outputs.token_hits
        assert hits is not None, "it was told `supervised_only`"
        if outputs.router_loss is not None:
            self.add(mode, router_loss=outputs.router_loss, routed=1)
        rows, tokens = rows_and_tokens(inputs)
        self.add(mode, hits=hits.sum(), supervised=hits.numel(), tokens=tokens, samples=rows, places=places_in(inputs))

    def add_wait(self, began: float) -> None:
        """The batches of a step are there; `began` is when the trainer asked for them."""
        self._fetched = time.perf_counter()
        self.add("train", wait_seconds=self._fetched - began)

    def add_step(self) -> None:
        """Their gradients are there: to be called when the host has waited for them anyway."""
        self.add("train", step_seconds=time.perf_counter() - self._fetched)

    @torch.no_grad()
    def add_image_use(self, model: nn.Module, inputs: Inputs, own: torch.Tensor, processor: VLMProcessor) -> None:
        """Adds the losses of the rows whose images could all be exchanged, with own and with other images.

        Args:
            model: What is evaluated.
            inputs: A batch, with images or without.
            own: (P,) losses of its supervised positions.
            processor: Knows the image token, and how many of it an image has.
        """
        images = images_of(inputs)
        inputs, complete = with_other_images(
            inputs, processor.image_token_id, processor.ids_per_image, self._last_images
        )
        self._last_images = images or self._last_images
        # Where weights are sharded, a forward pass takes every process, also those that have nothing to measure.
        flag = complete.any()
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag.float(), reduction="sum") > 0
        if not flag:
            return
        other = model(**inputs, supervised_only=True, use_cache=False).token_losses
        labels = inputs["labels"]
        positions = inputs.get(LABEL_POSITIONS)
        positions = supervised_positions(labels) if positions is None else positions
        chosen = complete[owners_of(inputs, "labels")[0].flatten()[positions]]
        own_loss, other_loss = (torch.where(chosen, losses, 0).sum() for losses in (own, other))
        self.add("eval", own_loss=own_loss, other_loss=other_loss, image_tokens=chosen.sum())

    # -- reading ----------------------------------------------------------------------------------------------------

    def own(self, mode: Mode) -> dict[str, float]:
        """The sums of this process, read from the device at once."""
        on_device = {name: number for name, number in self.sums[mode].items() if isinstance(number, torch.Tensor)}
        read = torch.stack([exact(tensor) for tensor in on_device.values()]).tolist() if on_device else []
        return {**dict.fromkeys(COUNTERS, 0.0), **self.sums[mode], **dict(zip(on_device, read, strict=True))}

    def enter(self, logs: dict[str, float], mode: Mode, groups: list[Json]) -> None:
        """Writes the metrics of all processes into a log, and starts anew.

        Args:
            logs: The log; it gets keys, and `eval_loss` becomes the mean over tokens.
            mode: Whose sums.
            groups: The optimizer's, for the rates of the parts.
        """
        if "train_loss" in logs:  # the last one, on the whole run: what is left of a few steps says nothing of it
            self.sums[mode] = {}
        sums = self.own(mode)
        if self.accelerator.num_processes > 1:
            tensor = torch.tensor([sums[name] for name in COUNTERS], device=self.accelerator.device)
            sums = dict(zip(COUNTERS, self.accelerator.reduce(tensor, reduction="sum").tolist(), strict=True))
        self.sums[mode], self._last_images = {}, None  # an evaluation does not depend on the one before
        if sums["supervised"]:
            logs["token_accuracy" if mode == "train" else "eval_token_accuracy"] = sums["hits"] / sums["supervised"]
        if "eval_loss" in logs and sums["supervised"]:  # every token alike, whatever the batch size
            logs["eval_loss"] = sums["loss"] / sums["supervised"]
        waited = sums["wait_seconds"] / self.accelerator.num_processes
        busy = sums["step_seconds"] / self.accelerator.num_processes + waited
        if mode == "train" and busy and sums["samples"]:
            logs["tokens_per_second"] = sums["tokens"] / busy
            logs["samples_per_second"] = sums["samples"] / busy
            logs["data_wait_share"] = waited / busy
            logs["padding_share"] = 1 - sums["tokens"] / sums["places"] if sums["places"] else 0.0
        if mode == "train" and "learning_rate" in logs:  # what transformers logs is the rate of the first group
            rates = {group["part"]: group["lr"] for group in groups if "part" in group}
            logs.update({f"learning_rate_{part}": rate for part, rate in rates.items()} if len(rates) > 1 else {})
        if sums["routed"]:  # of a mixture of experts, without its factor
            logs["router_loss"] = sums["router_loss"] / sums["routed"]
        if sums["image_tokens"]:
            own, other = sums["own_loss"] / sums["image_tokens"], sums["other_loss"] / sums["image_tokens"]
            logs.update(eval_loss_own_image=own, eval_loss_other_image=other, eval_image_use=other - own)


class RowsMet:
    """What batches say of the rows that were in them, until it is entered into a ledger.

    Attributes:
        rejected: (source, id, reason, sentence) of rows that were left out.
        seen: How many rows of each source came, of those that say so.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rejected: list[tuple[str, str, str, str]] = []
        self.seen: Counter[str] = Counter()

    def take(self, batch: Inputs, seen: bool = True) -> None:
        """Takes out of a batch what it says; `seen` false forgets how many there were."""
        self.rejected += batch.pop(REJECTED, [])
        counts = batch.pop(SEEN, {})
        self.seen.update(counts if seen else {})

    def enter(self, mode: Mode, ledger: Ledger, notes: Json) -> None:
        """Enters what all processes met since the last time; too many rows left out stop all of them alike.

        Args:
            mode: Which rows these are.
            ledger: Their ledger.
            notes: The ledgers as a bundle tells of them, by mode.

        Raises:
            UserError: More rows were left out than the recipe allows.
        """
        rejected, self.rejected = self.rejected, []
        seen, self.seen = [dict(self.seen)], Counter()
        if self.accelerator.num_processes > 1:
            rejected, seen = gather_object(rejected), gather_object(seen)
        if not rejected and not any(seen):
            return
        for counts in seen:
            for name, rows in counts.items():
                ledger.see(name, rows)
        for row in rejected:
            ledger.meet(*row)
        notes[mode] = ledger.as_dict()
        ledger.check(make_console(quiet=not self.accelerator.is_main_process), mode)


def ledgers_of(provenance: Provenance | None) -> dict[str, Ledger]:
    """`train` and `eval` → their ledgers, out of the notes that `load_rows` gave."""
    saved = provenance.notes.get("ledger", {}) if provenance else {}
    return {name: Ledger.from_dict(ledger) for name, ledger in saved.items()}


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """As a type that holds counts of millions; Apple's devices have none of 64 bits."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
