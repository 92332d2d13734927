"""`vlm-sft export`: a bundle as a checkpoint that needs no vlm_sft, or as a bundle whose LoRA is merged.

Every export is loaded in a fresh process and compared with the bundle before anyone is told that it is done.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ..base.errors import UserError
from ..base.names import ADAPTER, ADAPTER_CONFIG, CARD, EXPORT_REPORT, Json
from ..base.whole_files import read_text, write_json
from ..bundle.card import bases_of, render_card, shown
from ..bundle.hub import find_bundle
from ..bundle.load import load, recipe_of
from ..bundle.manifest import read_manifest
from ..bundle.parity import run_afresh
from ..llama_cpp.mixture import mixture_of
from ..llama_cpp.packages import check_installed
from ..recipe.schema import Recipe
from ..stack.judge import judge, layers_of
from .check import ADAPTER_FOLDER, CONVERSATION, PICTURE, PROBE, is_prompt, noise_picture
from .forms import Form, form_of
from .gguf import write_gguf
from .merged import write_merged
from .merging import Comparison
from .native_model import renamed
from .vllm import check_adapter, most_ranks

# In PEFT's files: before the names of modules, a stack's head, and after a table's name where its new rows are.
PREFIX, HEAD, ROWS = "base_model.model.", "lm_head", ".token_adapter.trainable_tokens_delta"
TARGETS = ("transformers", "vllm", "bundle-merged", "gguf")


def export(
    bundle: str | Path,
    out: str | Path,
    to: str = "transformers",
    *,
    keep_adapter: bool = False,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> Json:
    """Writes a bundle in another form and compares the logits of both in a fresh process.

    Args:
        bundle: Folder of the bundle, or `name/repository` on the Hub.
        out: Folder to write; must be empty or not there.
        to: `transformers` (the native class; an existing VLM's own), `vllm` (its published key names) or
            `bundle-merged`; or `gguf`, for llama.cpp.
        keep_adapter: Leaves LoRA unmerged, in the subfolder `adapter`.
        dtype: Type of the weights: `float32`, `bfloat16` or `float16`; default that of the bundle's language model, for
            `gguf` `float16`.
        quantize: Of `gguf`, a mixture of llama.cpp in which the language model is written, such as `q4_k_m`.
        trust_remote_code: See `vlm_sft.load`.

    Returns:
        What was written (`to`, `form`, `class`, `dtype`) and `max_difference`, `tolerance`, `positions`.

    Raises:
        UserError: The bundle has no such form, the folder is not empty, or the logits differ.
    """
    out = Path(out)
    _check_request(out, to, keep_adapter, quantize)
    bundle = find_bundle(bundle)
    manifest = read_manifest(bundle)
    recipe = recipe_of(bundle, manifest)
    if keep_adapter:
        _check_kept(bundle, manifest, recipe)
    model, processor = load(bundle, device="cpu", trust_remote_code=trust_remote_code, unquantised=True)
    core = model.get_base_model() if manifest["adapter"] else model
    own = torch.float16 if to == "gguf" else core.get_input_embeddings().weight.dtype
    saved = getattr(torch, dtype) if dtype else own
    model.float()  # merged and compared in fp32, whatever is written
    result: Json = {
        "to": to,
        "dtype": str(saved).removeprefix("torch."),
        "quantised_in_training": bool(recipe.quantization),
    }
    if to == "bundle-merged":
        return {**result, **write_merged(bundle, out, model, processor, saved)}
    if to == "gguf":
        result |= write_gguf(out, model, processor, recipe, saved, quantize and mixture_of(quantize))
    else:
        form = form_of(core, processor, recipe)
        if to == "vllm":
            form.check_vllm()
            if keep_adapter:
                check_adapter(form.name, model)
        result |= {"form": form.name, **_write(out, to, model, form, saved, keep_adapter)}
    write_json(out / EXPORT_REPORT, result)
    write_export_card(out, bundle, result)
    return result


def write_export_card(out: Path, bundle: Path, result: Json) -> Path:
    """Writes the card of an exported checkpoint by its bundle and what `export` found; gives the path."""
    manifest, kept = read_manifest(bundle), (out / ADAPTER_FOLDER).is_dir()
    native = result["to"] != "gguf"
    by = {"library_name": "transformers", "tags": ["vlm_sft"]} if native else {"tags": ["vlm_sft", "gguf"]}
    head = {"pipeline_tag": "image-text-to-text", **by}
    return render_card(
        out,
        "export/card.md.jinja" if native else "llama_cpp/card.md.jinja",
        head | bases_of(manifest["pieces"], "finetune"),
        name=shown(out.resolve()),
        bundle=shown(bundle.resolve()),
        lora="kept" if kept else "merged" if manifest["adapter"] else "none",
        found=result,
        pieces=manifest["pieces"],
    )


def _write(out: Path, to: str, model: nn.Module, form: Form, dtype: torch.dtype, keep_adapter: bool) -> Json:
    """Writes everything but the card; returns the name of the class and what the comparisons found."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = _write_probe(Path(folder), form)
        comparison = Comparison(model, lambda model: model.eval()(**inputs).logits)
        if not keep_adapter:
            model = comparison.merge(model)
        wanted = comparison.round(model, dtype)
        probe = {**inputs, "logits": wanted, "bundle": comparison.wanted}
        if comparison.without is not None:
            probe["without"] = comparison.without
        save_file(probe, Path(folder) / PROBE)
        layers = layers_of(form.model)
        out.mkdir(parents=True, exist_ok=True)
        ranks = {"rank": most_ranks(model)} if keep_adapter else {}
        if keep_adapter:
            _keep_adapter(model, form, out / ADAPTER_FOLDER)
            model.unload()
        form.write_processor(out)
        native = form.native().to(dtype)
        native.config.dtype = dtype
        form.save(native, out, to)
        found = {
            "class": type(native).__name__,
            **ranks,
            **_compare(out, Path(folder), dtype, layers),
            **comparison.found,
        }
        form.finish(out, to)
        return found


def _check_request(out: Path, to: str, keep_adapter: bool, quantize: str | None) -> None:
    """What can be refused before anything is read."""
    if to not in TARGETS:
        raise UserError(f"--to {to!r} is unknown; use one of {', '.join(TARGETS)}.")
    if to == "gguf":
        check_installed()
    elif quantize:
        raise UserError(f"--quantize goes with --to gguf; {to} has no types of llama.cpp.")
    if quantize:
        mixture_of(quantize)
    if keep_adapter and to not in ("transformers", "vllm"):
        raise UserError(f"--keep-adapter goes with --to transformers or vllm; {to} has LoRA merged.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is there already and not empty; name another folder.")


def _check_kept(bundle: Path, manifest: Json, recipe: Recipe) -> None:
    """What an adapter that is to be kept beside must be."""
    if not manifest["adapter"]:
        raise UserError(f"{str(bundle)!r} has no adapter to keep; leave --keep-adapter out.")
    if (recipe.lora or {}).get("target_parameters"):
        raise UserError(
            f"{str(bundle)!r} has LoRA on experts (lora.target_parameters), whose layers transformers names otherwise "
            f"beside a native class; leave --keep-adapter out, which merges it."
        )


def _write_probe(folder: Path, form: Form) -> dict[str, torch.Tensor]:
    """Writes a conversation and a picture that is not square; returns what the bundle's processor makes of them."""
    picture, processor = noise_picture(), form.processor
    picture.save(folder / PICTURE)
    asked = form.probe if processor.answer_start is None else form.probe[:-1]  # the answer lies apart
    (folder / CONVERSATION).write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    encoded = processor.encode_chat(form.probe, is_prompt(form.probe), [picture.size])
    inputs = {name: tensor for name, tensor in processor.batch([encoded]).items() if name != "labels"}
    return inputs | processor.image_inputs([picture], processor.instructions(form.probe))


def _keep_adapter(model: PeftModel, form: Form, folder: Path) -> None:
    """PEFT's own files, with the names that the layers have in the native class."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / CARD).unlink(missing_ok=True)
    config = json.loads(read_text(folder / ADAPTER_CONFIG))
    config["base_model_name_or_path"] = None
    state, names = load_file(folder / ADAPTER), form.adapter_names()
    tables = config.get("trainable_token_indices") or {}
    if len(tables) == 1 and form.head_stands_alone():
        ((table, rows),) = tables.items()
        tables[HEAD] = rows
        state[PREFIX + HEAD + ROWS] = state[PREFIX + table + ROWS].clone()
    if names or tables:
        moved = {renamed(name, names): tensor for name, tensor in state.items()}
        save_file(moved, folder / ADAPTER, metadata={"format": "pt"})
        layers = {name.split(".lora_")[0] for name in moved if ".lora_" in name}
        config["target_modules"] = sorted(layer.removeprefix(PREFIX) for layer in layers)
        kept = {renamed(PREFIX + name, names).removeprefix(PREFIX): ids for name, ids in tables.items()}
        config["trainable_token_indices"] = kept or None
    write_json(folder / ADAPTER_CONFIG, config)


def _compare(out: Path, probe: Path, dtype: torch.dtype, layers: int) -> Json:
    found = run_afresh("vlm_sft.export.check", f"The export {str(out)!r} was written", out, probe)
    if not found["ids"]:
        shutil.rmtree(out)
        raise UserError(
            f"transformers' own processor cuts this bundle's prompts into other tokens ({found['text'][:60]!r}…), so "
            f"it has no native form; nothing was written."
        )
    # Against what was to be written, where rounding to the type is done with, it is fp32 on both sides.
    strict = judge(found["logits"], torch.float32, layers, "the bundle's")
    found |= judge(found["bundle"], dtype, layers, "the bundle's")
    reasons = [verdict["why"] for verdict in (strict, found) if "why" in verdict][:1]
    if not found["pixels"] <= 1e-3:
        reasons.append(f"its pixels differ by {found['pixels']:.2g} (allowed 0.001)")
    if reasons:
        raise UserError(f"The export {str(out)!r} loads, but {' and '.join(reasons)}; do not use it, report this.")
    return {key: found[key] for key in ("max_difference", "tolerance", "positions", "kl", "pixels", "chats")}
