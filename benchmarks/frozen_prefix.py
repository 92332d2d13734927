"""What a cache of frozen features is worth: steps of stage 1 with and without, in turns, against the tower's share.

    python benchmarks/frozen_prefix.py RECIPE [--batch 8] [--rounds 5] [key.path=value …]

The projector of a stack is trained, all else is frozen: forward and backward, nothing beside. With features a step
could at best take what is left of it without the frozen parts; the ratio to that is printed beside both times. Times
are those of the processor, the least of all rounds, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from PIL import Image

from vlm_sft import build_stack, load_recipe


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a piece of work."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="A recipe of a stack, whose pieces are timed; its data are not read.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--text", type=int, default=32, help="Tokens of text in a row.")
    parser.add_argument("--rounds", type=int, default=5)
    given, overrides = parser.parse_known_args()
    stack = build_stack(load_recipe(given.recipe, overrides))
    model, core = stack.model.train(), stack.model.model
    config = model.config
    torch.manual_seed(0)
    pixels = torch.randn(given.batch, *stack.processor.encode_images([Image.new("RGB", (64, 64))]).shape[1:])
    ids = torch.randint(10, 200, (given.batch, config.num_image_tokens + given.text))
    ids[:, : config.num_image_tokens] = config.image_token_id
    labels = torch.where(ids == config.image_token_id, -100, ids)

    def step(**images: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, supervised_only=True, use_cache=False, **images).loss
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        features = core.encode_images(pixels)
    through = core.resampler
    prefix: list[float] = []
    without: list[float] = []
    cached: list[float] = []
    losses = []
    for _ in range(given.rounds + 1):
        with torch.no_grad():
            prefix.append(seconds(lambda: core.encode_images(pixels)))
        without.append(seconds(lambda: losses.append(step(pixel_values=pixels))))
        core.resampler = None  # what is given lies behind it
        cached.append(seconds(lambda: losses.append(step(image_features=features.detach()))))
        core.resampler = through
    assert all(torch.equal(loss, losses[0]) for loss in losses), "the losses differ"
    frozen, whole, rest = (min(times[1:]) for times in (prefix, without, cached))
    print(
        json.dumps(
            {
                "frozen_parts_s": round(frozen, 4),
                "step_without_s": round(whole, 4),
                "step_cached_s": round(rest, 4),
                "speedup": round(whole / rest, 3),
                "allowed_by_share": round(whole / (whole - frozen), 3),
                "reached": round((whole - frozen) / rest, 3),
                "loss": float(losses[0]),
            }
        )
    )


if __name__ == "__main__":
    main()
