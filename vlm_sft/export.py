"""`vlm-sft export`: a bundle as a checkpoint that needs no vlm_sft, or as a bundle whose LoRA is merged.

Every export is loaded in a fresh process and compared with the bundle before anyone is told that it is done.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from .bundle import read_manifest
from .card import write_export_card
from .errors import UserError
from .export_check import ADAPTER_FOLDER, CONVERSATION, PICTURE, PROBE, QUESTION, noise_picture
from .hub import find_bundle
from .loading import load, recipe_of
from .merged import write_merged
from .native import native_form, native_model, to_causal_lm
from .native_processors import native_processor
from .parity import TOLERANCE, environment
from .processor import VLMProcessor

TARGETS = ("transformers", "vllm", "bundle-merged")
MANIFEST = "export.json"
# Names in memory → the names that llava-hf publishes and vLLM reads.
VLLM_NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def export(
    bundle: str | Path,
    out: str | Path,
    to: str = "transformers",
    *,
    keep_adapter: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes a bundle in another form and compares the logits of both in a fresh process.

    Args:
        bundle: Folder of the bundle, or `name/repository` on the Hub.
        out: Folder to write; must be empty or not there.
        to: `transformers` (the native class), `vllm` (its published key names) or `bundle-merged`.
        keep_adapter: Leaves LoRA unmerged, in the subfolder `adapter`.
        dtype: Type of the weights: `float32`, `bfloat16` or `float16`; default that of the bundle's language model.
        trust_remote_code: See `loading.load`.

    Returns:
        What was written (`to`, `form`, `dtype`) and `max_difference`, `tolerance`, `positions`.

    Raises:
        UserError: The bundle has no such form, the folder is not empty, or the logits differ.
    """
    out = Path(out)
    _check_request(out, to, keep_adapter)
    bundle = find_bundle(bundle)
    manifest = read_manifest(bundle)
    if keep_adapter and not manifest["adapter"]:
        raise UserError(f"{str(bundle)!r} has no adapter to keep; leave --keep-adapter out.")
    recipe = recipe_of(bundle, manifest)
    if recipe.model is not None:
        raise UserError(
            f"{str(bundle)!r} was trained from an existing model ({recipe.model.pretrained}), which has its own class "
            f"already; load its adapter with peft on top of that, or the bundle with vlm_sft.load."
        )
    model, processor = load(bundle, device="cpu", trust_remote_code=trust_remote_code, unquantised=True)
    core = model.get_base_model() if manifest["adapter"] else model
    saved = getattr(torch, dtype) if dtype else core.get_input_embeddings().weight.dtype
    model.float()  # merged and compared in fp32, whatever is written
    result: dict[str, Any] = {
        "to": to,
        "dtype": str(saved).removeprefix("torch."),
        "quantised_in_training": bool(recipe.quantization),
    }
    if to == "bundle-merged":
        return {**result, **write_merged(bundle, out, model, processor, saved)}
    result["form"] = native_form(core)
    if to == "vllm":
        _fits_vllm(result["form"], processor)
    with tempfile.TemporaryDirectory() as folder:
        _write_probe(Path(folder), model, processor, result["form"])
        out.mkdir(parents=True, exist_ok=True)
        if keep_adapter:
            _keep_adapter(model, result["form"], out / ADAPTER_FOLDER)
            core = model.unload()
        elif manifest["adapter"]:
            core = model.merge_and_unload(safe_merge=True)
        native_processor(core, processor).save_pretrained(out)
        processor.image_processor.save_pretrained(out)  # what earlier releases of transformers read
        _save(native_model(core, processor, recipe.generation), out, saved, to)
        result |= _compare(out, Path(folder), saved)
    (out / MANIFEST).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_export_card(out, bundle, result)
    return result


def _check_request(out: Path, to: str, keep_adapter: bool) -> None:
    """What can be refused before anything is read."""
    if to not in TARGETS:
        raise UserError(f"--to {to!r} is unknown; use one of {', '.join(TARGETS)}.")
    if keep_adapter and to != "transformers":
        raise UserError(f"--keep-adapter goes with --to transformers; {to} has LoRA merged.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is there already and not empty; name another folder.")


def _fits_vllm(form: str, processor: VLMProcessor) -> None:
    if form == "instructblip":
        raise UserError("vLLM has no class for InstructBLIP; use --to transformers.")
    text = processor.render(QUESTION[:1], True).text
    if form == "blip-2" and not text.startswith(processor.image_token):
        raise UserError(
            "vLLM puts the images of a BLIP-2 in front of the whole prompt, but this bundle's chat template has words "
            "before them; use --to transformers, or train with a template that begins with the image (blip2_vqa)."
        )


@torch.inference_mode()
def _write_probe(folder: Path, model: nn.Module, processor: VLMProcessor, form: str) -> None:
    """A conversation (of InstructBLIP: a question), a picture that is not square, and what the bundle makes of them."""
    picture = noise_picture()
    picture.save(folder / PICTURE)
    messages = QUESTION[:1] if form == "instructblip" else QUESTION
    (folder / CONVERSATION).write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    encoded = processor.encode_chat(messages, add_generation_prompt=form == "instructblip")
    inputs = {"input_ids": torch.tensor([encoded.input_ids])}
    inputs |= processor.image_inputs([picture], processor.instructions(messages))
    save_file({**inputs, "logits": model.eval()(**inputs).logits}, folder / PROBE)


def _keep_adapter(model: Any, form: str, folder: Path) -> None:
    """PEFT's own files, with the names that the layers have in the native class."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    if form != "llava":
        base = model.get_base_model()
        inner = base.model.language_model
        prefix = next(n for n, m in to_causal_lm(base).named_modules() if m is inner)
        names = {
            "base_model.model.model.language_model.": f"base_model.model.language_model.{prefix}.",
            "base_model.model.model.vision_tower.": "base_model.model.vision_model.",
            "base_model.model.model.resampler.": "base_model.model.",
        }
        state = load_file(folder / "adapter_model.safetensors")
        renamed = {_rename(name, names): tensor for name, tensor in state.items()}
        save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        modules = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in renamed})
        config["target_modules"] = modules
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _save(native: Any, out: Path, dtype: torch.dtype, to: str) -> None:
    native.to(dtype)
    native.config.dtype = dtype
    if to == "transformers":
        native.save_pretrained(out)
        return
    native.config.save_pretrained(out)
    native.generation_config.save_pretrained(out)
    names = VLLM_NAMES if native.config.model_type == "llava" else {}
    tied = set(getattr(native, "all_tied_weights_keys", {})) if native.config.tie_word_embeddings else set()
    state = {_rename(n, names): p.detach() for n, p in native.state_dict().items() if n not in tied}
    save_torch_state_dict(state, out, max_shard_size="5GB", metadata={"format": "pt"})


def _compare(out: Path, probe: Path, dtype: torch.dtype) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "vlm_sft.export_check", str(out), str(probe)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The export {str(out)!r} was written but does not load in a fresh process: {last}")
    found = json.loads(process.stdout.strip().splitlines()[-1])
    if not found["ids"]:
        shutil.rmtree(out)
        raise UserError(
            f"transformers' own processor cuts this bundle's prompts into other tokens ({found['text'][:60]!r}…), so "
            f"it has no native form; nothing was written."
        )
    found["tolerance"] = TOLERANCE[dtype] * max(1.0, found["scale"] if dtype != torch.float32 else 1.0)
    if found["max_difference"] > found["tolerance"] or found["pixels"] > 1e-3:
        raise UserError(
            f"The export {str(out)!r} loads, but its logits differ from the bundle's by {found['max_difference']:.2g} "
            f"(allowed {found['tolerance']:.2g}) and its pixels by {found['pixels']:.2g}; do not use it, report this."
        )
    return {key: found[key] for key in ("max_difference", "tolerance", "positions", "pixels")}
