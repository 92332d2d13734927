"""`vlm-sft export --to gguf`: a bundle for llama.cpp and what is built on it (Ollama, LM Studio, phones).

The language model is written by llama.cpp's own converter, the tower and the projector by `llama_cpp.mmproj`. llama.cpp
then answers about a picture, and its answer and probabilities are compared with the bundle's, before OUT is there.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import nn

from ..base.errors import UserError
from ..base.names import TEMPLATE, Json
from ..base.whole_files import read_text, write_json, written_beside
from ..batch.processor import VLMProcessor
from ..bundle.card import shown
from ..llama_cpp.families import check_family, family_template, picture_of, save_for_converter
from ..llama_cpp.families import differences as of_family
from ..llama_cpp.mmproj import REFUSED, check_stack, differences, write_mmproj
from ..llama_cpp.packages import build, check_installed, known_classes, run
from ..llama_cpp.template import OllamaTemplate, for_llama_cpp
from ..model.configuration import image_size_of
from ..model.modeling import VLMForConditionalGeneration
from ..pieces.checkpoints import fetch_file
from ..recipe.schema import Recipe
from ..stack.judge import judge, layers_of, measure
from ..stack.vocabulary import grow_vocabulary
from .check import QUESTION, noise_picture
from .forms import form_of
from .merging import Comparison
from .native_model import native_generation, to_causal_lm
from .native_processor import native_template

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""How files, and the converter, name a type."""

ANSWER, ALTERNATIVES = 8, 100
"""Tokens of the answer that is compared, and at each of them the tokens whose probabilities are."""
ASKED: list[Json] = QUESTION[:1]
WORDS = "tokenizer.model"
"""sentencepiece's file, which transformers does not write, and the converter of a Gemma wants."""


def check_gguf(core: nn.Module, processor: VLMProcessor) -> None:
    """Refuses, before anything is written, what llama.cpp or its converter cannot express.

    Args:
        core: The model of the bundle without PEFT's wrapper; its adapters may be in it.
        processor: Its processor.

    Raises:
        UserError: It is refused, or a package is missing.
    """
    check_installed()
    if not isinstance(core, VLMForConditionalGeneration):
        check_family(core.config, type(core).__name__)
        return
    if core.config.tiles is not None:
        raise UserError(REFUSED.format("it is told to see an image as one picture, and this one is cut into tiles"))
    check_stack(core, processor)
    if (name := type(to_causal_lm(core)).__name__) not in known_classes()[0]:
        raise UserError(REFUSED.format(f"its converter knows no language model of the class {name}"))


def write_gguf(
    out: Path,
    model: nn.Module,
    processor: VLMProcessor,
    recipe: Recipe,
    dtype: torch.dtype = torch.float16,
    quantize: str | None = None,
) -> Json:
    """Writes OUT with both GGUF files and a `Modelfile`, once llama.cpp has answered as the bundle does.

    Args:
        out: Folder to write.
        model: The bundle's model in fp32, with or without an adapter; it is used up.
        processor: Its processor.
        recipe: Its recipe.
        dtype: Type of the weights, a key of `NAMES`.
        quantize: Mixture of `llama_cpp.mixture` in which the language model is written in the place of `dtype`, once
            the file in that type has been compared.

    Returns:
        What was written, and what llama.cpp differs by (`max_difference`, `tolerance`, `positions`, `kl`); with
        `quantize` also what the rounding changes (`quantised`).

    Raises:
        UserError: It cannot be expressed, there is no room, or llama.cpp answers otherwise; OUT is not there then.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_gguf(base, processor)
    _check_room(out, base, dtype, quantize)
    picture = _picture(base, processor)
    encoded = processor.encode_chat(ASKED, True, [picture.size])
    inputs = {name: tensor for name, tensor in processor.batch([encoded]).items() if name != "labels"}
    inputs |= processor.image_inputs([picture], processor.instructions(ASKED))
    comparison = Comparison(model, lambda model: model.eval()(**inputs).logits)
    core = comparison.merge(model)
    comparison.round(core, dtype)
    with written_beside(out) as beside, TemporaryDirectory(dir=beside.parent) as scratch:
        beside.mkdir()
        mmproj = beside / f"mmproj-{NAMES[dtype]}.gguf"
        whole = (Path(scratch) if quantize else beside) / f"model-{NAMES[dtype]}.gguf"
        _convert(core, processor, recipe, Path(scratch), (whole, mmproj), dtype, shown(out.resolve()))
        measured, said = _compare(core, inputs, picture, (whole, mmproj), Path(scratch))
        found = _judged(measured, said, dtype, layers_of(core))
        files = (beside / f"model-{quantize}.gguf" if quantize else whole, mmproj)
        if quantize:
            types = run("quantize", "llama.cpp cannot round this bundle", whole, files[0], quantize)
            measured, said = _compare(core, inputs, picture, files, Path(scratch))
            sizes = {"bytes": files[0].stat().st_size, "bytes_before": whole.stat().st_size}
            found["quantised"] = {"name": quantize, "types": types, **sizes, **_told(measured, said)}
        (beside / "Modelfile").write_text(modelfile(processor, recipe, files), encoding="utf-8")
    names = [file.name for file in files]
    composed = isinstance(base, VLMForConditionalGeneration)
    told = differences(processor) if composed else of_family(processor, base.config.model_type)
    return {"llama_cpp": build(), "files": names, **found, **comparison.found, "differences": told}


def _check_room(out: Path, core: nn.Module, dtype: torch.dtype, quantize: str | None) -> None:
    """Refuses where the disk has no room for the files, and for what the converter reads, beside each other."""
    values = sum(parameter.numel() for parameter in core.parameters())
    needed = 2 * values * dtype.itemsize + (values * 9 // 8 if quantize else 0)
    place = next(folder for folder in out.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(
            f"{str(place)!r} has {free / 1e9:.1f} GB free, and writing GGUF needs {needed / 1e9:.1f} GB for a moment; "
            f"make room, or name a folder on another disk."
        )


def _picture(core: nn.Module, processor: VLMProcessor) -> Image.Image:
    """What is asked about: of a stack a square, as llama.cpp pads what is not (see `differences`)."""
    if not isinstance(core, VLMForConditionalGeneration):
        return picture_of(processor, core.config, noise_picture())
    side = image_size_of(core.config.tower)[0] * 5 // 4
    return noise_picture().resize((side, side), Image.Resampling.BICUBIC)


def _convert(
    core: Any,
    processor: VLMProcessor,
    recipe: Recipe,
    folder: Path,
    files: tuple[Path, Path],
    dtype: torch.dtype,
    name: str,
) -> None:
    """Writes what the converter reads to a folder, and both files."""
    template, family = native_template(processor), not isinstance(core, VLMForConditionalGeneration)
    if family:
        form = form_of(core, processor, recipe)
        form.write_processor(folder)
        spec = recipe.model
        assert spec is not None
        if words := fetch_file(spec.pretrained, WORDS, spec.revision, "model.pretrained", required=False):
            shutil.copyfile(words, folder / WORDS)
        native = form.native()
        expansion = processor.expansion(picture_of(processor, core.config, noise_picture()).size)
        place = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        template = family_template(template, core.config.model_type, expansion, place)
    else:
        ends = native_generation(core, processor, recipe.generation)
        grow_vocabulary(core, len(processor.tokenizer))
        write_mmproj(files[1], core, processor, dtype)
        native = to_causal_lm(core)
        native.generation_config = ends
        processor.tokenizer.save_pretrained(folder)
    native = native.to(dtype)
    native.config.dtype = dtype
    if family:
        save_for_converter(native, folder)
    else:
        native.save_pretrained(folder)
    native.float()
    (folder / TEMPLATE).unlink(missing_ok=True)
    # The converter takes what stands in this file before any other, an empty template too.
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(read_text(path)) | {"chat_template": for_llama_cpp(template)})
    path = folder / "generation_config.json"
    ends = json.loads(read_text(path)).get("eos_token_id")
    write_json(path, _sampling(recipe) | ({"eos_token_id": ends} if ends is not None else {}))
    run("convert", "llama.cpp's converter refuses this bundle", folder, files[0], NAMES[dtype], name)
    if family:
        run("convert", "llama.cpp's converter refuses this bundle", folder, files[1], NAMES[dtype], name, "--mmproj")


def _sampling(recipe: Recipe) -> Json:
    """How answers are drawn, for llama.cpp, which takes the first of the most probable tokens where `top_k` is 1."""
    if not recipe.generation.get("do_sample"):
        return {"top_k": 1}
    return {key: recipe.generation[key] for key in ("temperature", "top_k", "top_p") if key in recipe.generation}


def _compare(
    core: nn.Module, inputs: dict[str, torch.Tensor], picture: Image.Image, files: tuple[Path, Path], folder: Path
) -> tuple[Json, Json]:
    """Asks llama.cpp, and has the bundle's model compute what it says of each token of that answer.

    Returns:
        What `judge` needs to know of both; and the answer, with `same_answer`, `same` and `of`: whether, and at how
        many of how many tokens, the bundle's most probable one is the same.
    """
    said = _ask(picture, files, folder)
    prompt = inputs["input_ids"]
    if said["prompt"] != prompt.shape[1]:
        raise UserError(
            f"llama.cpp reads {said['prompt']} tokens where this bundle reads {prompt.shape[1]}: it cuts or writes the "
            f"prompt otherwise; nothing was written."
        )
    ids = torch.tensor([said["ids"][:-1]], dtype=prompt.dtype)
    longer = {**inputs, "input_ids": torch.cat([prompt, ids], 1)}
    if "attention_mask" in inputs:
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    for name, column in inputs.items():  # which tell pictures from text, and an answer is text
        if name not in ("input_ids", "attention_mask") and column.shape == prompt.shape:
            longer[name] = torch.cat([column, torch.zeros_like(ids)], 1)
    with torch.inference_mode():
        logits = core.eval()(**longer).logits[0, -len(said["ids"]) :].float()
    told = logits.double()[said["at"]]
    picked = torch.tensor([[token for token, _ in step] for step in said["top"]])
    theirs = torch.tensor([[value for _, value in step] for step in said["top"]], dtype=torch.float64)
    # Of logits it tells the probabilities alone, so they are put where the bundle's lie.
    measured = measure(told.gather(1, picked), theirs + told.logsumexp(-1, keepdim=True))
    same = sum(ours == theirs for ours, theirs in zip(logits.argmax(-1).tolist(), said["ids"], strict=True))
    of = len(said["ids"])
    return measured, {"same_answer": same == of, "answer": said["text"], "same": same, "of": of}


def _judged(measured: Json, said: Json, dtype: torch.dtype, layers: int) -> Json:
    """What is told of the file in `dtype`, which says what the bundle does but for rounding to that type."""
    # It computes in 16 bits here and there whatever the file holds: it has a table of `gelu`.
    found = judge(measured, torch.float16 if dtype == torch.float32 else dtype, layers, "the bundle's")
    if not found["equal"]:
        raise UserError(f"llama.cpp loads what was written, but {found['why']}; nothing was written.")
    kept = {key: found[key] for key in ("max_difference", "tolerance", "positions", "kl")}
    return {**kept, "same_answer": said["same_answer"], "answer": said["answer"]}


def _told(measured: Json, said: Json) -> Json:
    """What is told of a quantised file: how far it is from the bundle, which is the user's to judge."""
    if not isfinite(measured["max_difference"]):
        raise UserError("llama.cpp loads the quantised file, but computes no numbers; nothing was written.")
    kept = {key: said[key] for key in ("same", "of", "answer")}
    return {"kl": measured["kl"], "max_difference": measured["max_difference"], **kept}


def _ask(picture: Image.Image, files: tuple[Path, Path], folder: Path) -> Json:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}} if part["type"] == "image" else part
        for part in ASKED[0]["content"]
    ]
    request = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": ANSWER,
        "top_logprobs": ALTERNATIVES,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return run("ask", "llama.cpp cannot read what was written", *files, folder / "request.json")


def modelfile(processor: VLMProcessor, recipe: Recipe, files: tuple[Path, Path]) -> str:
    """Ollama's `Modelfile` for the two files."""
    lines = [f"FROM ./{file.name}" for file in files]
    if template := OllamaTemplate(processor).text:
        lines += [f'TEMPLATE """{template}"""']
    else:
        lines += ["# This bundle's chat template is no chain of turns, so Ollama cannot write it; it is in the file."]
    if recipe.system:
        lines += [f'SYSTEM """{recipe.system}"""']
    if end := processor.end_of_answer.strip():
        lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}"]
    if not recipe.generation.get("do_sample"):
        lines += ["PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"
