"""Parameters cut over processes: found, put together and filled again; here on a mesh of one process."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaModel

from vlm_sft import build_stack
from vlm_sft.model.sharding import compile_layers, fill, gather, is_sharded, repeated_layers
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


def test_layers_are_compiled_once_for_every_layer_and_length():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=6)).train()
    names = list(model.state_dict())

    def steps(shapes):
        """Sums of outputs and gradients of batches of these shapes, the last tokens of a row padding."""
        found = []
        for rows, length in shapes:
            given = torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(length))
            mask = torch.ones(rows, length, dtype=torch.long)
            mask[0, length - 2 :] = 0
            out = model(inputs_embeds=given, attention_mask=mask, use_cache=False).last_hidden_state
            (out * given).sum().backward()
            found += [
                out.sum().item(),
                sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None),
            ]
            model.zero_grad()
        return found

    first, later = [(3, 9), (2, 14)], [(4, 23), (2, 5), (7, 31), (3, 100)]
    alone = steps(first + later)
    torch._dynamo.reset()
    counters.clear()
    assert compile_layers(model, backend="eager") == ["LlamaDecoderLayer"]
    compiled = steps(first)
    made = counters["stats"]["unique_graphs"]
    assert 0 < made <= 2, "the first layer, whose input takes no gradient, and all others"
    assert compiled + steps(later) == pytest.approx(alone, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == made and not counters["graph_break"]
    assert list(model.state_dict()) == names
