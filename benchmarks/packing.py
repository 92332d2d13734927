"""Samples a second of the same rows packed and not, in alternation, and what the padding share allows.

A stack like LLaVA of 25M parameters, random and in fp32, its language model trained. Rows have an image of 16 tokens
and an answer of a length as captions and conversations have it (lognormal). An unpacked batch has `--batch` rows, a
pack fills `--length` tokens, and one pass trains on packs of as many tokens as the other pads its rows to. Both learn
from the same rows, so their losses must be equal; where they are not, the program ends with an error. Seconds are
those of the processor, in one thread, so that what else runs on the machine counts little.

    python benchmarks/packing.py --rounds 5 --out outputs/benchmark_packing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from vlm_sft import VLMConfig, VLMForConditionalGeneration, VLMProcessor
from vlm_sft.base.names import ROW_LENGTHS
from vlm_sft.batch.by_length import pack
from vlm_sft.batch.encoding import EncodedChat

ROOT = Path(__file__).parent.parent
IMAGE_TOKENS, VOCABULARY = 16, 8000
Batch = dict[str, Any]


def main() -> None:
    """Measures in alternation; prints a line a round and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_packing"))
    given = parser.parse_args()
    model, processor = make_stack(given.width, given.layers)
    kinds = make_batches(processor, given.rows, given.batch, given.length)
    padding = {kind: padding_share(batches) for kind, batches in kinds.items()}
    allowed = (1 - padding["packs"]) / (1 - padding["rows"])
    compare(given, model, kinds, given.rows, {"padding_share": padding, "padding_allows": allowed}, allowed)


def compare(
    given: argparse.Namespace,
    model: VLMForConditionalGeneration,
    kinds: dict[str, list[Batch]],
    samples: int,
    more: dict[str, Any],
    allowed: float,
) -> None:
    """Times two kinds of batches of the same samples in alternation, and writes what was found.

    Args:
        given: `rounds` and `out`; all of it is written down.
        model: What they train.
        kinds: `rows`, and what is compared with them.
        samples: How many there are.
        more: What else is written down.
        allowed: How much faster the other kind could be.
    """
    torch.set_num_threads(1)
    (other,) = kinds.keys() - {"rows"}
    losses = {kind: passes(model, batches)[1] for kind, batches in kinds.items()}  # and warm
    if abs(losses["rows"] - losses[other]) > 1e-4 * abs(losses["rows"]):
        raise SystemExit(f"The losses differ: {losses}")
    rounds: list[dict[str, float]] = []
    for _ in range(given.rounds):
        rounds.append({kind: passes(model, batches)[0] for kind, batches in kinds.items()})
        print(json.dumps(rounds[-1]), flush=True)
    ratios = [each["rows"] / each[other] for each in rounds]
    result = {
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        **more,
        "samples_per_second": {kind: samples / min(each[kind] for each in rounds) for kind in kinds},
        "faster": {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)},
        "share_of_allowed": statistics.median(ratios) / allowed,
    }
    print(json.dumps(result, indent=1))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_stack(width: int, layers: int, side: int = 56) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """A stack with a small tower, frozen, and its processor; an image of `side` pixels becomes (side / 14)² tokens."""
    tokens = (side // 14) ** 2
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "digitscenes" / "llm")
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = VLMProcessor(images, tokenizer, None, tokens)
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                              image_size=side, patch_size=14)  # fmt: skip
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3,
                       num_hidden_layers=layers, num_attention_heads=width // 64)  # fmt: skip
    config = VLMConfig(vision_config=vision, text_config=text, projector_type="mlp", vision_feature_layer=-2,
                       vision_feature_select="patch", image_token_id=VOCABULARY - 1,
                       num_image_tokens=tokens)  # fmt: skip
    model = VLMForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model.train(), processor


def make_batches(processor: VLMProcessor, rows: int, size: int, length: int) -> dict[str, list[Batch]]:
    """The batches of an epoch of the same rows: `rows`, `size` each; `packs`, as many tokens each as those."""
    rng = np.random.default_rng(0)
    chats = []
    for words in np.clip(rng.lognormal(4.3, 0.7, rows).astype(int), 8, length - IMAGE_TOKENS - 8):
        chat = EncodedChat([], [], 1)
        chat.extend([VOCABULARY - 1] * IMAGE_TOKENS, place=True)
        chat.extend(rng.integers(3, 2000, 8).tolist())
        for token in rng.integers(3, 2000, words):
            chat.append(int(token), learned=True)
        chats.append(chat)
    pixels = torch.randn(rows, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    alone = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
    packs = [numbers.tolist() for numbers in pack([len(chat.input_ids) for chat in chats], length)]
    longest = statistics.mean(max(len(chats[k].input_ids) for k in numbers) for numbers in alone)
    each = max(1, round(size * longest / length))
    groups = [packs[a:b] for a, b in pairwise([*range(0, len(packs), each), len(packs)])]
    packed = [
        {
            **processor.batch([EncodedChat.packed([chats[k] for k in numbers]) for numbers in group]),
            "pixel_values": pixels[[k for numbers in group for k in numbers]],
        }
        for group in groups
    ]
    plain = [{**processor.batch([chats[k] for k in each]), "pixel_values": pixels[list(each)]} for each in alone]
    return {"rows": plain, "packs": packed}


def padding_share(batches: list[Batch]) -> float:
    """Of the places of all batches."""
    tokens = sum(int(batch[ROW_LENGTHS if ROW_LENGTHS in batch else "attention_mask"].sum()) for batch in batches)
    return 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)


def passes(model: VLMForConditionalGeneration, batches: list[Batch]) -> tuple[float, float]:
    """Processor seconds of all forward and backward passes, and the mean loss of all supervised tokens."""
    model.zero_grad()
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    began, loss = time.process_time(), 0.0
    for batch in batches:
        found = model(**batch, supervised_only=True, use_cache=False, num_items_in_batch=tokens).loss
        found.backward()
        loss += found.item()
    return time.process_time() - began, loss


if __name__ == "__main__":
    main()
