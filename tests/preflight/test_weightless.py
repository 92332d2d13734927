"""Models that run without weights: what is real, what is empty, and how storages are counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from vlm_sft.preflight.weightless import StorageCounter, without_weights


class Picky(nn.Module):
    """Looks at its batch as real models do: sizes, masks, counts, tables made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.tied = self.table
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids: torch.Tensor, grid: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        self.lengths = (grid[:, 0] * grid[:, 1]).tolist()
        self.steps = torch.linspace(0, 1, steps=3).mul(4).int().tolist()
        embeds = self.table(ids) * self.scale
        place = ids == 7
        if int(place.sum()) != sum(self.lengths):
            raise ValueError("image tokens and features differ")
        embeds = embeds.masked_scatter(place.unsqueeze(-1), features @ self.head.weight[:8])
        gathered = torch.zeros(sum(self.lengths), 8)
        gathered[:] = embeds[place]
        embeds[place] = gathered * 2
        self.seen = embeds[ids != 7]
        return self.head(self.seen).sum()


def batch(images: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[7, 7, 1, 2, 3], [7, 7, 4, 5, 6]])
    return {"ids": ids, "grid": torch.tensor([[1, 2]] * images), "features": torch.randn(4, 8)}


def made_empty() -> Picky:
    with torch.device("meta"):
        return Picky()


def test_numbers_of_the_batch_are_real_and_what_weights_make_is_empty():
    model = made_empty()
    with without_weights(model):
        loss = model(**batch())
        loss.backward()
    assert model.lengths == [2, 2] and model.steps == [0, 2, 4]
    assert isinstance(model.seen, FakeTensor) and model.seen.shape == (6, 8)
    assert model.table.weight.grad.shape == (50, 8) and model.tied.weight is model.table.weight


def test_a_model_that_refuses_its_batch_refuses_it_without_weights_too():
    with pytest.raises(ValueError, match="image tokens and features differ"), without_weights(made := made_empty()):
        made(**batch(images=1))


def test_weights_take_no_memory():
    with torch.device("meta"):
        wide = nn.Linear(1 << 20, 1 << 16, bias=False)  # 256 GiB
    with without_weights(wide):
        assert wide(torch.ones(2, 1 << 20)).shape == (2, 1 << 16)


def test_every_storage_counts_once_until_it_is_dropped():
    given = torch.ones(100)
    with StorageCounter([given]) as counter:
        made = given + 1
        assert counter.alive == 400
        view, same = made.view(10, 10), given.view(50, 2)
        assert counter.alive == 400
        made.mul_(2)
        further = made * 2
        assert counter.alive == 800
        del made
        assert counter.alive == 800, "a view still holds it"
        del view, further
    assert counter.alive == 0 and counter.peak == 800 and same.numel() == 100
