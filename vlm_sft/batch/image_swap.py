"""Batches whose images are exchanged for others: the loss must rise with them, where the model looks at images."""

from __future__ import annotations

import torch

from ..base.names import Inputs
from .counts import owners_of

# What a model is told of each image beside its pixels, and goes with them (Mllama).
ALONG = ("aspect_ratio_ids", "aspect_ratio_mask")


def images_of(inputs: Inputs) -> Inputs:
    """What a batch has of its images: pixels, or the features that a cache gives in their place."""
    name = "image_features" if "image_features" in inputs else "pixel_values"
    return {each: inputs[each] for each in (name, *ALONG) if inputs.get(each) is not None}


def with_other_images(
    inputs: Inputs, image_token_id: int, per_image: int, spare: Inputs | None
) -> tuple[Inputs, torch.Tensor]:
    """Exchanges each image of a batch for another row's.

    Args:
        inputs: A batch: (B, S) `input_ids` and, where it has images, `pixel_values`: (N, 3, H, W), or
            (1, N, 3, H, W) as Idefics3 has them.
        image_token_id: Id that stands for images.
        per_image: How many of it every image has.
        spare: `images_of` an earlier batch, or None.

    Returns:
        The batch with exchanged images, and the rows, by the numbers of `owners_of`, of which all were exchanged.
    """
    images = images_of(inputs)
    rows, count = owners_of(inputs)
    counts = torch.bincount(rows[inputs["input_ids"] == image_token_id], minlength=count) // per_image
    if not images:
        return inputs, torch.zeros_like(counts, dtype=torch.bool)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    apart = _apart(images)
    pools = apart if spare is None else {name: torch.cat([apart[name], each]) for name, each in _apart(spare).items()}
    chosen, exchanged = choose_others(next(iter(pools.values())), owners)
    left = torch.zeros_like(counts, dtype=torch.bool)
    left[owners[~exchanged]] = True
    swapped = {name: pools[name][chosen].view_as(images[name]) for name in images}
    return {**inputs, **swapped}, (counts > 0) & ~left


def _apart(images: Inputs) -> Inputs:
    """The same with the images along the first dimension; Mllama has the tiles of each behind it."""
    if "pixel_values" not in images or len(images) > 1:
        return images
    return {"pixel_values": images["pixel_values"].flatten(0, -4)}


def choose_others(pool: torch.Tensor, owners: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Chooses in place of each image one that another row owns and that looks different.

    Args:
        pool: (N + M, …) images of a batch, then those of an earlier one, for batches with a single owner.
        owners: (N,) row of each image of the batch.

    Returns:
        N numbers of images of the pool, its own where there is no other, and (N,) whether each was exchanged.
    """
    pool_owners = torch.cat([owners, owners.new_full((len(pool) - len(owners),), -1)])
    chosen, found = [], []
    for i in range(len(owners)):
        order = [(i + shift) % len(pool) for shift in range(1, len(pool))]
        fit = next((j for j in order if pool_owners[j] != owners[i] and not torch.equal(pool[j], pool[i])), None)
        chosen.append(i if fit is None else fit)
        found.append(fit is not None)
    return chosen, torch.tensor(found, dtype=torch.bool, device=pool.device)
