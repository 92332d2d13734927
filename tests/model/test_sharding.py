"""Parameters cut over processes: found, put together and filled again; here on a mesh of one process."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_sft import build_stack
from vlm_sft.model.sharding import fill, gather, is_sharded, repeated_layers
from vlm_sft.stack.lora import add_adapter


@pytest.fixture
def mesh(tmp_path):
    """One gloo process, which is a whole mesh."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_what_no_engine_holds_back_is_left_to_the_model(net):
    assert not is_sharded(net.parameters())
    assert gather(net, lambda name: True) is None


def test_shares_are_put_together(net, mesh):
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    fully_shard(net, mesh=mesh)
    assert is_sharded(net.parameters())
    whole = gather(net, lambda name: name.startswith("1."))
    assert set(whole) == {"1.weight", "1.bias"}
    for name, tensor in whole.items():
        assert type(tensor) is torch.Tensor and torch.equal(tensor, before[name])


def test_a_whole_tensor_fills_a_parameter_and_its_shares(net, mesh):
    value = torch.arange(8.0).view(2, 4)
    fill(net[1].weight, value)
    assert torch.equal(net[1].weight, value)
    fully_shard(net, mesh=mesh)
    fill(net.state_dict()["1.weight"], value + 1)
    assert isinstance(net[1].weight, DTensor) and torch.equal(net[1].weight.full_tensor(), value + 1)
    with pytest.raises(RuntimeError, match="size"):
        fill(net[0].weight, value)


def test_layers_are_those_of_tower_resampler_and_language_model(bundle_recipe):
    model = build_stack(bundle_recipe()).model
    assert repeated_layers(model) == ["Blip2EncoderLayer", "Blip2QFormerLayer", "LlamaDecoderLayer"]
    adapted = add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    assert repeated_layers(adapted) == ["Blip2EncoderLayer", "Blip2QFormerLayer", "LlamaDecoderLayer"]


def test_layers_of_plain_linears_are_no_layers():
    assert repeated_layers(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})) == []
