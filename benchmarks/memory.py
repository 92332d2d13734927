"""The dry run's estimate against the real peak on a GPU, and how fast a step is: published sizes, random weights.

Each case builds a CLIP-L/14-336, an mlp projector and a LLaMA of the given size on the device, trains a few steps of
AdamW under bf16 autocast on made-up rows of full length, and compares `torch.cuda.max_memory_allocated` with what
`vlm-sft train --dry-run` would say. It needs no data, no network and no weights. On a CPU there is no peak to measure;
`--sizes tiny` runs there.

    python benchmarks/memory.py --sizes 1b 7b --out outputs/benchmark_memory.json

MFU is model FLOPs a second over the device's dense bf16 peak. FLOPs of a weight and a token that passes it: 2 forward,
2 where a gradient passes it to what learns before it (the language model), 2 where it learns itself. The head is
passed by supervised tokens, the embedding table by none. Attention: 4 x layers x width x length a token forward, halved
because it is causal, and twice that backward. What checkpointing makes again does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from vlm_sft import FreezePlan, VLMConfig, VLMForConditionalGeneration
from vlm_sft.base.words import gib
from vlm_sft.model.freeze import part_of
from vlm_sft.preflight.launch import Launch
from vlm_sft.preflight.memory import Estimate, estimate
from vlm_sft.preflight.step_memory import Step, count_step
from vlm_sft.stack.lora import add_adapter

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14}  # fmt: skip
# Name → tower, language model (LLaMA-3.2-1B's shape, LLaMA-7B's), rows and tokens of a row.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 7},
        "lm": {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 4},
        "rows": 2, "length": 64,
    },
    "1b": {
        "tower": CLIP_L,
        "lm": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
               "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
        "rows": 8, "length": 1024,
    },
    "7b": {
        "tower": CLIP_L,
        "lm": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
               "num_attention_heads": 32},
        "rows": 4, "length": 1024,
    },
}  # fmt: skip
# What learns: part → rate, and whether there is LoRA.
PLANS = {
    "projector": FreezePlan({"projector": 1e-3}),
    "lora": FreezePlan({"projector": 1e-4}, 1e-4),
    "full": FreezePlan({"projector": 1e-4, "language_model": 1e-5}),
}
# Dense bf16 FLOPs a second, as NVIDIA states them.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass
class Result:
    """One case: bytes estimated and measured, and its speed. What a device cannot tell is None."""

    size: str
    plan: str
    checkpointing: bool
    rows: int
    length: int
    estimated: int
    peak: int | None
    relative_error: float | None
    seconds_a_step: float
    tokens_a_second: float
    samples_a_second: float
    mfu: float | None


def main() -> None:
    """Runs every case and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "7b"])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["projector", "lora"], help="what learns")
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--steps", type=int, default=6, help="the first two are not timed")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bf16, where it is not known here")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for size in given.sizes:
        for plan in given.plans:
            for checkpointing in given.checkpointing:
                results.append(run_case(size, plan, checkpointing == "on", given.steps, device, given.peak_tflops))
    Console(width=120).print(table_of(results))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = {"device": name, "torch": torch.__version__, "results": [asdict(result) for result in results]}
    print(json.dumps(report))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run_case(
    size: str, plan: str, checkpointing: bool, steps: int, device: str, peak_tflops: float | None = None
) -> Result:
    """Estimates one case on no device, then trains it on one."""
    rows, length = SIZES[size]["rows"], SIZES[size]["length"]
    found = estimate_of(size, plan, checkpointing)
    already = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = build(size, plan, device)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if device == "cuda":  # weights are drawn in fp32 first, which is no part of training
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = list(train(model, batch_of(size, device), steps, device))
    seconds = sum(times) / len(times)
    peak = torch.cuda.max_memory_allocated() - already if device == "cuda" else None
    top = peak_tflops * 1e12 if peak_tflops else peak_flops(device)
    return Result(
        *(size, plan, checkpointing, rows, length, found.total, peak),
        relative_error=(found.total - peak) / peak if peak else None,
        seconds_a_step=seconds,
        tokens_a_second=rows * length / seconds,
        samples_a_second=rows / seconds,
        mfu=flops_of_a_step(model, size) / seconds / top if top else None,
    )


def estimate_of(size: str, plan: str, checkpointing: bool) -> Estimate:
    """What the dry run says."""
    model = build(size, plan, "meta")
    step = Step(batch_of(size, "cpu"), autocast=torch.bfloat16, checkpointing={} if checkpointing else None)
    fixed = estimate(model, None, Launch(), computes=torch.bfloat16)
    return Estimate(fixed.parts, count_step(model, step), fixed.gathered, fixed.launch)


def build(size: str, plan: str, device: str) -> Any:
    """A stack of random weights in the types that a recipe's would have: bf16 where frozen, fp32 where it learns."""
    shape = SIZES[size]
    config = VLMConfig(
        vision_config=CLIPVisionConfig(**shape["tower"]),
        text_config=LlamaConfig(**shape["lm"]),
        projector_type="mlp",
        projector_options={"depth": 2, "activation": "gelu"},
        vision_feature_layer=-2,
        vision_feature_select="patch",
    )
    config.num_image_tokens = (shape["tower"]["image_size"] // shape["tower"]["patch_size"]) ** 2
    config.image_token_id = shape["lm"]["vocab_size"]
    with torch.device(device):
        model: Any = VLMForConditionalGeneration(config)
    for part, module in (("vision_tower", model.model.vision_tower), ("language_model", model.model.language_model)):
        if part not in PLANS[plan].train:
            module.to(torch.bfloat16)
    if "language_model" not in PLANS[plan].train:
        model.lm_head.to(torch.bfloat16)
    if PLANS[plan].adapter_rate is not None:
        targets = r".*language_model\..*(q|k|v|o|gate|up|down)_proj"
        model = add_adapter(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets))
    PLANS[plan].apply(model)
    return model.train()


def batch_of(size: str, device: str) -> dict[str, torch.Tensor]:
    """Rows of full length, an image first; the last is one token shorter, so that there is a padding mask."""
    shape = SIZES[size]
    side, patch = shape["tower"]["image_size"], shape["tower"]["patch_size"]
    ids = torch.randint(0, shape["lm"]["vocab_size"], (shape["rows"], shape["length"]))
    labels = ids.clone()
    ids[:, : (side // patch) ** 2] = shape["lm"]["vocab_size"]
    labels[:, : (side // patch) ** 2] = -100
    mask = torch.ones_like(ids)
    mask[-1, -1], labels[-1, -1] = 0, -100
    pixels = torch.randn(shape["rows"], 3, side, side)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int, device: str) -> Iterator[float]:
    """Trains on one batch; yields the seconds of every step but the first two."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for number in range(steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch, supervised_only=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= min(2, steps - 1):
            yield time.perf_counter() - start


def flops_of_a_step(model: nn.Module, size: str) -> float:
    """Model FLOPs of a forward and backward pass, by the formula at the top."""
    shape = SIZES[size]
    rows, length, lm = shape["rows"], shape["length"], shape["lm"]
    patches = (shape["tower"]["image_size"] // shape["tower"]["patch_size"]) ** 2
    whole = next(m for m in model.modules() if isinstance(m, VLMForConditionalGeneration))
    tokens = {"vision_tower": patches + 1, "projector": patches, "language_model": length}
    special = {id(whole.get_input_embeddings().weight): 0, id(whole.lm_head.weight): length - patches}
    total = 3 * rows * length * 4 * lm["num_hidden_layers"] * lm["hidden_size"] * length / 2
    for name, parameter in model.named_parameters():
        part = part_of(name)
        flops = 2 + 2 * (part == "language_model") + 2 * parameter.requires_grad
        total += flops * parameter.numel() * rows * special.get(id(parameter), tokens[part])
    return total


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOPs a second of this GPU, None where it is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for mark, peak in PEAK_FLOPS.items() if mark in name), None)


def table_of(results: list[Result]) -> Table:
    """One row a case."""
    table = Table(title="Estimate and real peak of a training step", title_justify="left")
    for column in ("size", "learns", "checkpointing", "estimate", "peak", "error", "tokens/s", "samples/s", "MFU"):
        table.add_column(column, justify="left" if column in ("size", "learns") else "right")
    for r in results:
        table.add_row(
            *(r.size, r.plan, "on" if r.checkpointing else "off", gib(r.estimated), gib(r.peak) if r.peak else "–"),
            f"{r.relative_error:+.1%}" if r.relative_error is not None else "–",
            *(f"{r.tokens_a_second:,.0f}", f"{r.samples_a_second:.2f}", f"{r.mfu:.1%}" if r.mfu else "–"),
        )
    return table


if __name__ == "__main__":
    main()
