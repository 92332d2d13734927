"""Batches whose images are exchanged for others: the loss must rise with them, where the model looks at images."""

from __future__ import annotations

import torch

from ..base.names import Inputs
from .counts import owners_of


def with_other_images(
    inputs: Inputs, image_token_id: int, per_image: int, spare: torch.Tensor | None
) -> tuple[Inputs, torch.Tensor]:
    """Exchanges each image of a batch for another row's.

    Args:
        inputs: A batch: (B, S) `input_ids` and, where it has images, `pixel_values`: (N, 3, H, W), or
            (1, N, 3, H, W) as Idefics3 has them.
        image_token_id: Id that stands for images.
        per_image: How many of it every image has.
        spare: `pixel_values` of an earlier batch, or None.

    Returns:
        The batch with exchanged images, and the rows, by the numbers of `owners_of`, of which all were exchanged.
    """
    name = "image_features" if "image_features" in inputs else "pixel_values"  # a cache gives features in their place
    images = inputs.get(name)
    rows, count = owners_of(inputs)
    counts = torch.bincount(rows[inputs["input_ids"] == image_token_id], minlength=count) // per_image
    if images is None:
        return inputs, torch.zeros_like(counts, dtype=torch.bool)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    whole = images if name == "image_features" else images.flatten(0, -4)
    if spare is not None and name != "image_features":
        spare = spare.flatten(0, -4)
    swapped, exchanged = exchange_images(whole, owners, spare)
    left = torch.zeros_like(counts, dtype=torch.bool)
    left[owners[~exchanged]] = True
    return {**inputs, name: swapped.view_as(images)}, (counts > 0) & ~left


def exchange_images(
    images: torch.Tensor, owners: torch.Tensor, spare: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives each image's place to an image that another row owns and that looks different.

    Args:
        images: (N, 3, H, W) images of a batch.
        owners: (N,) row of each image.
        spare: (M, 3, H, W) images of an earlier batch, for batches with a single owner.

    Returns:
        (N, 3, H, W) images, and (N,) whether each was exchanged.
    """
    pool = images if spare is None else torch.cat([images, spare])
    pool_owners = torch.cat([owners, owners.new_full((len(pool) - len(images),), -1)])
    chosen, found = [], []
    for i in range(len(images)):
        order = [(i + shift) % len(pool) for shift in range(1, len(pool))]
        fit = next((j for j in order if pool_owners[j] != owners[i] and not torch.equal(pool[j], images[i])), None)
        chosen.append(i if fit is None else fit)
        found.append(fit is not None)
    return pool[chosen], torch.tensor(found, device=images.device)
