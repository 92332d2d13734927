"""Images are exchanged for others, or the row does not count."""

from __future__ import annotations

import torch

from vlm_sft.batch.image_swap import choose_others, with_other_images

PLACE, PER_IMAGE = 9, 2


def test_exchange_never_returns_an_own_or_an_equal_image():
    images = torch.stack([torch.full((3, 2, 2), float(v)) for v in (0, 1, 2, 2)])
    owners = torch.tensor([0, 0, 1, 2])
    chosen, found = choose_others(images, owners)
    assert found.all()
    for i, image in enumerate(images[chosen]):
        assert not torch.equal(image, images[i])
        assert not any(torch.equal(image, images[j]) for j in range(4) if owners[j] == owners[i])
    alone, found = choose_others(images[:2], owners[:2])
    assert not found.any() and alone == [0, 1]
    _, found = choose_others(images, owners[:2])
    assert found.all()


def batch(*images_of_rows: int) -> dict[str, torch.Tensor]:
    """Rows with so many images each, every image of its own colour."""
    rows = [[PLACE] * PER_IMAGE * count + [1] * (8 - PER_IMAGE * count) for count in images_of_rows]
    colours = torch.arange(sum(images_of_rows), dtype=torch.float32)
    inputs = {"input_ids": torch.tensor(rows)}
    return {**inputs, "pixel_values": colours.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)} if len(colours) else inputs


def test_a_row_counts_when_all_its_images_were_exchanged():
    inputs = batch(1, 0, 2)
    swapped, complete = with_other_images(inputs, PLACE, PER_IMAGE, None)
    assert complete.tolist() == [True, False, True], "a row of text alone has no image to exchange"
    assert swapped["input_ids"] is inputs["input_ids"]
    assert not (swapped["pixel_values"] == inputs["pixel_values"]).flatten(1).any(1).any()


def test_images_of_a_whole_batch_in_one_row_are_exchanged_alike():
    inputs = batch(1, 0, 2)
    swapped, complete = with_other_images(inputs, PLACE, PER_IMAGE, None)
    images = inputs["pixel_values"][None]
    same, alike = with_other_images({**inputs, "pixel_values": images}, PLACE, PER_IMAGE, None)
    assert torch.equal(same["pixel_values"], swapped["pixel_values"][None]) and torch.equal(alike, complete)


def test_what_is_told_of_an_image_goes_with_it():
    inputs = {**batch(1, 1), "aspect_ratio_ids": torch.tensor([[1], [6]])}
    inputs["pixel_values"] = inputs["pixel_values"][:, None, None].expand(-1, 1, 4, -1, -1, -1)  # of four tiles each
    swapped, complete = with_other_images(inputs, PLACE, PER_IMAGE, None)
    assert complete.all() and swapped["aspect_ratio_ids"].tolist() == [[6], [1]]
    assert torch.equal(swapped["pixel_values"], inputs["pixel_values"].flip(0))


def test_a_row_that_keeps_one_of_its_images_does_not_count():
    inputs = batch(2, 1)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][2] = inputs["pixel_values"][0]
    _, complete = with_other_images(inputs, PLACE, PER_IMAGE, None)
    assert complete.tolist() == [False, True], "the first image is like the only one of another row"


def test_a_row_alone_takes_images_of_an_earlier_batch():
    alone = batch(1)
    assert with_other_images(alone, PLACE, PER_IMAGE, None)[1].tolist() == [False]
    earlier = torch.full((1, 3, 2, 2), 7.0)
    swapped, complete = with_other_images(alone, PLACE, PER_IMAGE, {"pixel_values": earlier})
    assert complete.tolist() == [True] and torch.equal(swapped["pixel_values"], earlier)


def test_a_batch_of_text_alone_is_left_as_it_is():
    inputs = batch(0, 0)
    same, complete = with_other_images(inputs, PLACE, PER_IMAGE, None)
    assert same is inputs and complete.tolist() == [False, False]
