"""The parity gate: a saved bundle, loaded in a fresh process, must give the trainer's logits.

`main` is that process, started by `recipe.left_out`; `judge` says what is the same. It computes on the
trainer's own device: on a CPU other kernels would add in another order, and what is as small as that could not be
found. So that the device never holds two models, the trainer's weights wait in the host's memory meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from ..base.console import tell
from ..base.errors import UserError, exit_on_user_error
from ..base.names import IGNORED, Json, Values
from ..base.progress import telling, told_in
from ..model.freeze import part_of
from ..model.parts import passes
from ..stack.judge import judge, layers_of, measure
from .load import load
from .manifest import update_manifest

MAX_POSITIONS = 256
NOT_INPUTS = ("labels", "loss_weights", "logits")


@torch.no_grad()
def probe_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(up to 256 supervised positions, vocabulary) logits of a batch, in fp32 on the CPU; of an encoder, (rows, …)."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in _tensors(batch).items() if name not in NOT_INPUTS}
    was_training = model.training
    model.eval()
    with passes(model), without_autocast(model):
        logits = model(**inputs).logits
    model.train(was_training)
    if "labels" not in batch or logits.dim() < 3:  # of an encoder: what it says of each row, or of each token
        return logits.flatten(0, -2)[:MAX_POSITIONS].float().cpu()
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return logits[mask.to(device)][:MAX_POSITIONS].float().cpu()


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """A run's model as its bundle will compute: without the autocast that accelerate puts round its forward.

    In 16 bits both are right, but they round at other places, which a deep model may make as large as a mistake.
    """
    around = model.forward
    inside = model.__dict__.get("_original_forward")
    if inside is None:
        yield
        return
    model.forward = inside
    try:
        yield
    finally:
        model.forward = around


def without_adapter(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """`probe_logits` with the model's adapter off, or None where it has none."""
    if not isinstance(model, PeftModel):
        return None
    with model.disable_adapter():
        return probe_logits(model, batch)


def check_parity(
    bundle: str | Path, model: nn.Module, batch: dict[str, torch.Tensor], logits: torch.Tensor | None = None
) -> Json:
    """Loads a bundle in a fresh process and compares its logits with this model's.

    Args:
        bundle: Folder of the bundle.
        model: The trained model.
        batch: A batch of the collator.
        logits: The model's `probe_logits` of the batch, where it took all processes to make them.

    Returns:
        What `judge` says: `max_difference`, `tolerance`, `positions`, `equal` and more; also written into the bundle's
        manifest, where earlier releases wrote these four.

    Raises:
        UserError: The bundle does not load, or its logits differ.
    """
    wanted = probe_logits(model, batch) if logits is None else logits
    last = [p for n, p in model.named_parameters() if part_of(n) in ("language_model", "head")]
    dtype = next(p.dtype for p in last if p.is_floating_point())
    device = str(next(model.parameters()).device)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.safetensors"
        tensors = {name: tensor.contiguous().cpu() for name, tensor in _tensors(batch).items()}
        save_file({**tensors, "logits": wanted.contiguous()}, probe)
        done = f"The bundle {str(bundle)!r} was saved"
        with set_aside(model):
            measured = run_afresh("vlm_sft.bundle.parity", done, bundle, probe, device)
    result = judge(measured, dtype, layers_of(model))
    update_manifest(bundle, {"parity": result})
    if not result["equal"]:
        raise UserError(f"The bundle {str(bundle)!r} loads, but {result['why']}; do not use it, and report this.")
    return result


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Frees what a model's weights take on an accelerator, and puts them back afterwards.

    It is done to the memory below the tensors: so tied weights stay tied, quantised ones and shares keep all that
    refers to them, and the model is as it was. What an engine holds beside its parameters (DeepSpeed's partitions)
    stays.
    """
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    kept = []
    for storage in storages.values():
        if has_own_memory(storage.device) and storage.nbytes() and storage.resizable():
            copy = torch.UntypedStorage(storage.nbytes())
            kept.append((storage, copy.copy_(storage)))
            storage.resize_(0)
    clear_device_cache(garbage_collection=True)
    try:
        yield
    finally:
        for storage, copy in kept:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def has_own_memory(device: torch.device) -> bool:
    """Whether a device's memory is not the host's; Apple's is."""
    return device.type not in ("cpu", "meta", "mps")


def _tensors(batch: Values) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def run_afresh(module: str, done: str, *arguments: str | Path) -> Json:
    """What a module prints as JSON in a fresh process, whose first argument is a bundle or an export.

    Raises:
        UserError: It fails, after what `done` says.
    """
    with tempfile.TemporaryDirectory() as folder, told_in(Path(folder) / "told") as told:
        process = subprocess.run(
            [sys.executable, "-m", "vlm_sft.recipe.left_out", module, *map(str, arguments)],
            env=environment() | told,
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        if process.returncode == -signal.SIGXCPU:
            last = "its chat template takes too long (`limits.template_seconds`); do not use it."
        raise UserError(f"{done} but does not load in a fresh process: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    """The fresh process finds this package also where it is not installed and the run was started elsewhere."""
    found = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


def main(argv: list[str] | None = None) -> None:
    """The fresh process: BUNDLE, PROBE and a device; prints what it measured as JSON."""
    bundle, probe, device = argv or sys.argv[1:]
    tensors = load_file(probe)
    with telling():
        # The run before this one executed the same code, as its recipe said.
        model, _ = load(bundle, device=device, trust_remote_code=True)
        found = measure(tensors["logits"], probe_logits(model, tensors), without_adapter(model, tensors))
    tell(json.dumps(found))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
