"""Pretrain the eye: a BLIP-2 vision tower and Q-Former, taught on images alone to tell each cell's digit and colour.

No language model takes part. Query 2c is bound to the digit of cell c and query 2c + 1 to its colour by two linear
heads that all cells share and that are thrown away afterwards. Sharing them means that "a 3" is the same direction in
whatever cell it stands, which is what lets a single linear projector carry it over to a language model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from digitscenes import DIGIT, EMPTY, RGB, Scenes, enlarge, load_sprites, render, sample_scenes, split_sprites
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

WIDTH = 128
QUERIES = 8
INIT_STD = 0.07  # transformers' 0.02 (and 1e-10 in Blip2VisionConfig) is far too small at this width
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "initializer_range": INIT_STD,
}
QFORMER = {
    "hidden_size": WIDTH,
    "encoder_hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "cross_attention_frequency": 1,  # both layers look at the image
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": INIT_STD,
}
PATCH_CELL = [2 * (row // 2) + column // 2 for row in range(4) for column in range(4)]
AUGMENTED = 24  # warped copies of each training sprite


class Eye(nn.Module):
    """Vision tower, Q-Former and its queries, with the module names of the BLIP-2 layout."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Blip2VisionModel(Blip2VisionConfig(**VISION))
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**QFORMER))
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, WIDTH))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See images.

        Args:
            pixel_values: normalised to -1..1, shape (batch, 3, 64, 64).

        Returns:
            Query features (batch, 8, 128), and patch features without the class token (batch, 16, 128).
        """
        patches = self.vision_model(pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(pixel_values), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state, patches[:, 1:]


class CellHeads(nn.Module):
    """The throw-away heads: logits of the digit (10 and none) and of the colour (7 and none) of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.digit, self.colour = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, len(RGB) + 1)
        self.patch_digit, self.patch_colour = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, len(RGB) + 1)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Read query features (batch, 8, 128) into logits of shapes (batch, 4, 11) and (batch, 4, 8)."""
        return self.digit(queries[:, 0::2]), self.colour(queries[:, 1::2])

    def of_patches(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Read patch features (batch, 16, 128), each about its own cell: shapes (batch, 16, 11) and (batch, 16, 8)."""
        return self.patch_digit(patches), self.patch_colour(patches)


def to_pixels(images: np.ndarray) -> Tensor:
    """Normalise uint8 images (n, 64, 64, 3) as the saved image processor does: to -1..1, channels first."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def targets(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """The classes of every cell, shape (n, 4) each: "none" is the class after the last digit or colour."""
    digits = torch.from_numpy(np.where(scenes.digits == EMPTY, 10, scenes.digits))
    return digits, torch.from_numpy(np.where(scenes.colours == EMPTY, len(RGB), scenes.colours))


def warp(sprites: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, shear, stretch and shift sprites (n, 8, 8) a little and enlarge them to (n, 24, 24)."""
    n = len(sprites)
    angle, shear = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.15, 0.15, n)
    width, height = rng.uniform(0.88, 1.15, n), rng.uniform(0.88, 1.15, n)
    shift = rng.uniform(-0.08, 0.08, (n, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    x_row, y_row = [cos * width, (shear - sin) * width, shift[:, 0]], [sin * height, cos * height, shift[:, 1]]
    matrix = np.stack(x_row + y_row, axis=1)
    theta = torch.tensor(matrix.reshape(n, 2, 3), dtype=torch.float32)
    grid = F.affine_grid(theta, [n, 1, DIGIT, DIGIT], align_corners=False)
    ink = torch.from_numpy(enlarge(sprites))[:, None]
    return F.grid_sample(ink, grid, align_corners=False)[:, 0].numpy()


def score(eye: Eye, heads: CellHeads, scenes: Scenes, pixels: Tensor) -> dict[str, float]:
    """Shares of cells' digits (where there is one), of colours and of whole scenes told right."""
    digits, colours = targets(scenes)
    with torch.inference_mode():
        digit_logits, colour_logits = heads(eye(pixels)[0])
    digit_right, colour_right = digit_logits.argmax(-1) == digits, colour_logits.argmax(-1) == colours
    filled = digits != 10
    return {
        "digits": digit_right[filled].float().mean().item(),
        "colours": colour_right[filled].float().mean().item(),
        "scenes": (digit_right & colour_right).all(1).float().mean().item(),
    }


def teach(eye: Eye, heads: CellHeads, pixels: Tensor, digits: Tensor, colours: Tensor) -> Tensor:
    """The loss: every query tells what it is bound to, and every patch the digit and the colour of its own cell.

    The patches' share is for stacks without a Q-Former, which hand patch features straight to their projector.
    """
    queries, patches = eye(pixels)
    patch_logits = heads.of_patches(patches)
    loss = torch.zeros(())
    for logits, patch, target in zip(heads(queries), patch_logits, (digits, colours), strict=True):
        by_patch = target[:, PATCH_CELL].flatten()
        loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.05)
        loss = loss + 0.5 * F.cross_entropy(patch.flatten(0, 1), by_patch, label_smoothing=0.05)
    return loss


def score_validation(eye: Eye, heads: CellHeads, scenes: int = 2000) -> dict[str, float]:
    """Score on scenes of validation sprites, which training never shows."""
    sprites, labels = load_sprites()
    held_out = sample_scenes(np.random.default_rng(10_000), scenes, labels, split_sprites(labels)["validation"])
    return score(eye, heads, held_out, to_pixels(render(held_out, enlarge(sprites), np.random.default_rng(10_001))))


def training_batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw scenes of warped training sprites for ever.

    Yields:
        Pixels (size, 3, 64, 64), and the classes of the cells' digits and colours, (size, 4) each.
    """
    rng = np.random.default_rng(seed)
    sprites, labels = load_sprites()
    pool = split_sprites(labels)["train"]
    ink = np.concatenate([enlarge(sprites)] + [warp(sprites, rng) for _ in range(AUGMENTED)])
    while True:
        scenes = sample_scenes(rng, size, labels, pool)
        warped = scenes.sprites + len(labels) * rng.integers(0, AUGMENTED + 1, scenes.sprites.shape)
        shown = Scenes(scenes.digits, scenes.colours, np.where(scenes.sprites == EMPTY, EMPTY, warped))
        yield to_pixels(render(shown, ink, rng)), *targets(scenes)


def train(seed: int, steps: int = 2500, batch: int = 128, peak: float = 1.5e-3) -> tuple[Eye, CellHeads]:
    """Train from nothing on scenes drawn on the fly.

    Args:
        seed: of weights, scenes and warps.
        steps: optimizer steps.
        batch: scenes a step.
        peak: highest learning rate (warm-up over 200 steps, then cosine to 0).
    """
    torch.manual_seed(seed)
    eye, heads = Eye(), CellHeads()
    parameters = [*eye.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    for step, (pixels, digits, colours) in enumerate(islice(training_batches(seed, batch), steps), start=1):
        loss = teach(eye, heads, pixels, digits, colours)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            scores = score_validation(eye, heads, 500)
            print(f"eye {step:5d} {time.perf_counter() - start:4.0f} s loss {loss.item():.3f} {scores}", flush=True)
    return eye, heads


def save(eye: Eye, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the eye in the layout of a BLIP-2 checkpoint that has no language model inside."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in eye.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "dtype": str(dtype).removeprefix("torch."),
        "num_query_tokens": QUERIES,
        "vision_config": {"model_type": "blip_2_vision_model", **VISION},
        "qformer_config": {"model_type": "blip_2_qformer", **QFORMER},
        # A placeholder: BLIP-2's configuration wants one, but the checkpoint holds no language model.
        "text_config": {"model_type": "opt", "vocab_size": 1, "hidden_size": WIDTH, "num_hidden_layers": 0},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = {"height": 64, "width": 64}
    BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(out)
