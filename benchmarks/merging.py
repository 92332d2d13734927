"""Questions a second where each brings its image along, and where those on one image share it, in alternation.

A stack like LLaVA of 21M parameters, random and in fp32, its language model trained; an image has 144 tokens and is
asked `--questions` things of 8 tokens, each answered in 3: about the share of image and text that VQAv2 has in
LLaVA-1.5 (576 tokens and 30). `independent` is `merge_by_image` with `independent`: the image once, and each question
sees it and itself alone. Both learn the same, so their losses must be equal; where they are not, the program ends with
an error.
Seconds are those of the processor, in one thread, so that what else runs on the machine counts little.

    python benchmarks/merging.py --questions 5 --rounds 5 --out outputs/benchmark_merging
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from packing import VOCABULARY, Batch, compare, make_stack

from vlm_sft import VLMProcessor
from vlm_sft.batch.encoding import EncodedChat

SIDE, PREFIX, ASKED, ANSWERED = 168, 144, 8, 3  # pixels of an image; its tokens, and those of a question and an answer


def main() -> None:
    """Measures in alternation; prints a line a round and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="images a batch, with all of their questions")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_merging"))
    given = parser.parse_args()
    model, processor = make_stack(given.width, given.layers, SIDE)
    kinds = make_batches(processor, given.images, given.questions, given.batch)
    tokens = {kind: sum(batch["input_ids"].numel() for batch in batches) for kind, batches in kinds.items()}
    allowed = tokens["rows"] / tokens["independent"]
    more = {"tokens": tokens, "tokens_allow": allowed}
    compare(given, model, kinds, given.images * given.questions, more, allowed)


def make_batches(processor: VLMProcessor, images: int, questions: int, size: int) -> dict[str, list[Batch]]:
    """The batches of an epoch of the same questions: a row each, and behind one image."""
    rng = np.random.default_rng(0)
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    rows: list[Batch] = []
    shared: list[Batch] = []
    for start in range(0, images, size):
        own = pixels[start : start + size]
        asked = [[_chat(rng) for _ in range(questions)] for _ in own]
        alone = processor.batch([chat for chats in asked for chat in chats])
        rows.append({**alone, "pixel_values": own.repeat_interleave(questions, 0)})
        together = processor.batch([EncodedChat.sharing(chats) for chats in asked])
        shared.append({**together, "pixel_values": own})
    return {"rows": rows, "independent": shared}


def _chat(rng: np.random.Generator) -> EncodedChat:
    chat = EncodedChat([], [], 1)
    chat.extend([VOCABULARY - 1] * PREFIX, place=True)
    chat.extend(rng.integers(3, 2000, ASKED).tolist())
    for token in rng.integers(3, 2000, ANSWERED):
        chat.append(int(token), learned=True)
    return chat


if __name__ == "__main__":
    main()
