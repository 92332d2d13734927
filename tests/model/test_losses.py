"""The loss over supervised positions is cross entropy, whatever the chunks, and never holds full logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    OPTConfig,
    RecurrentGemmaConfig,
)

from vlm_sft.model import losses
from vlm_sft.model.losses import Head, mean_loss, scales_as_its_class, supervised_positions


def make(batch=2, length=6, width=4, vocabulary=9, seed=0, trained=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, requires_grad=True)
    module = nn.Linear(width, vocabulary, bias=False).requires_grad_(trained)
    module.weight.data = torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return hidden, Head(module, LlamaConfig(vocab_size=vocabulary)), labels


def at_a_time(patch, positions):
    patch.setattr(losses, "FEWEST", positions)
    patch.setitem(losses.CHUNK_BYTES, True, 0)


def gradients_of(loss, hidden, head):
    loss.backward()
    found = [hidden.grad, *(parameter.grad for parameter in head.trained())]
    hidden.grad = None
    head.module.zero_grad()
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    masked=st.lists(st.integers(0, 11), max_size=12),
    chunk=st.integers(1, 8),
    trained=st.booleans(),
    factor=st.sampled_from([1.0, 0.25, 65536.0]),
)
def test_it_is_the_cross_entropy_of_the_shifted_labels(seed, masked, chunk, trained, factor):
    hidden, head, labels = make(seed=seed, trained=trained)
    labels.view(-1)[masked] = -100
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        at_a_time(patch, chunk)
        found, token_losses, hits = mean_loss(head, hidden, labels, weights, 3)
    logits = head(hidden)[:, :-1].reshape(-1, 9)
    each = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="none", ignore_index=-100)
    wanted = (each * weights[:, 1:].flatten()).sum() / 3
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert len(token_losses) == len(hits) == int((labels[:, 1:] != -100).sum())
    mine, theirs = gradients_of(found * factor, hidden, head), gradients_of(wanted * factor, hidden, head)
    assert len(mine) == 1 + trained
    torch.testing.assert_close(mine, theirs, atol=1e-6 * factor, rtol=1e-6)


def test_only_chunks_of_supervised_positions_are_scored(monkeypatch):
    hidden, head, labels = make(batch=3, length=20)
    labels[:, :15] = -100
    at_a_time(monkeypatch, 4)
    scored = []
    head.module.register_forward_hook(lambda module, args, output: scored.append(len(args[0])))
    for given_ in (hidden, hidden.detach()):
        mean_loss(head, given_, labels)
    assert scored == [4, 4, 4, 3] * 2


def test_so_many_positions_are_scored_at_a_time_as_bytes_of_their_logits_fit(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, True, 4 * 50 * 40)
    sizes = {}
    for vocabulary in (10, 50, 10**6):
        _, head, _ = make(vocabulary=9)
        head.config.vocab_size = vocabulary
        sizes[vocabulary] = [len(range(100)[part]) for part in head.chunks(torch.zeros(100, 4))]
    assert sizes == {10: [100], 50: [40, 40, 20], 10**6: [16] * 6 + [4]}
    with losses.chunks_as_on(cpu=False):
        assert len(list(head.chunks(torch.zeros(100, 4)))) == 2, "67 of a million words are 256 MB"
    assert len(list(head.chunks(torch.zeros(100, 4)))) == 7


def test_losses_come_in_reading_order_and_weights_with_them():
    hidden, head, labels = make()
    labels[0, 2] = -100
    weights = torch.arange(12.0).view(2, 6)
    total, each, _ = mean_loss(head, hidden, labels, weights, 1)
    torch.testing.assert_close(total, (each * torch.tensor([1.0, 3, 4, 5, 7, 8, 9, 10, 11])).sum())


@pytest.mark.parametrize("half", [False, True], ids=["at once", "made again"])
def test_nothing_to_learn_still_reaches_the_graph(half):
    hidden, head, labels = make(trained=True)
    with torch.autocast("cpu", torch.float16, enabled=half):
        found, each, hits = mean_loss(head, hidden, torch.full_like(labels, -100))
    assert found == 0 and not each.numel() and not hits.numel()
    found.backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_in_bf16_the_gradient_differs_by_no_more_than_its_rounding():
    hidden, head, labels = make(width=64, vocabulary=500, length=40, trained=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_loss(head, hidden, labels)[0]
        logits = head(hidden)[:, :-1].float().reshape(-1, 500)
        wanted = F.cross_entropy(logits, labels[:, 1:].reshape(-1))
    assert torch.equal(found, wanted) or abs(found - wanted) < 1e-6
    pairs = zip(gradients_of(found, hidden, head), gradients_of(wanted, hidden, head), strict=True)
    assert all(mine.dtype == theirs.dtype and (mine - theirs).norm() <= 2**-8 * theirs.norm() for mine, theirs in pairs)


def test_in_fp16_and_of_a_sharded_head_logits_are_made_again_as_small_gradients_are_lost_before_they_are_scaled():
    hidden, head, labels = make(batch=3, length=20, trained=True)
    calls = []
    head.module.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.float16):
        found = mean_loss(head, hidden, labels)[0]
    found.backward()
    head.module.weight.ds_id = 0  # as DeepSpeed marks what is shared out
    mean_loss(head, hidden, labels)[0].backward()
    assert calls == [True] * 4


def test_the_gradient_of_an_adapter_in_the_head_is_made_too():
    hidden, head, labels = make()
    model = get_peft_model(nn.Sequential(head.module), LoraConfig(r=2, target_modules=["0"]))
    head = Head(model.base_model.model[0], head.config)
    for parameter in head.trained():
        nn.init.normal_(parameter)
    found = mean_loss(head, hidden, labels)[0]
    wanted = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1))
    mine, theirs = gradients_of(found, hidden, head), gradients_of(wanted, hidden, head)
    assert len(mine) == 3
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_a_second_way_back_through_gradients_that_are_used_is_an_error():
    hidden, head, labels = make()
    loss = mean_loss(head, hidden, labels)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used"):
        loss.backward()


SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SCALED = [
    (LlamaConfig(**SIZES), True),
    (CohereConfig(**SIZES, logit_scale=0.25), True),
    (GraniteConfig(**SIZES, logits_scaling=5.0), True),
    (Gemma2Config(**SIZES, final_logit_softcapping=0.5), True),
    (OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16), True),  # reaches below its inner model
    (HyperCLOVAXConfig(**SIZES, logits_scaling=5.0), False),  # times, where Granite divides by it
    (RecurrentGemmaConfig(**SIZES, lru_width=16, logits_soft_cap=0.5), False),
]


@pytest.mark.parametrize(("config", "known"), SCALED, ids=lambda value: getattr(value, "model_type", ""))
def test_what_a_class_does_after_its_head_is_known_or_noticed(config, known):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    assert scales_as_its_class(model) == known
    assert model(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits.shape == (1, 2, 20), "it is as it was"


@settings(max_examples=30, deadline=None)
@given(masked=st.lists(st.integers(0, 11), max_size=12))
def test_positions_that_a_batch_brings_are_those_that_are_found(masked):
    hidden, head, labels = make()
    labels.view(-1)[masked] = -100
    positions = supervised_positions(labels)
    assert positions.tolist() == [i for i, label in enumerate(labels.flatten().tolist()) if label != -100 and i % 6]
    weights = torch.arange(12.0).view(2, 6)
    found = mean_loss(head, hidden, labels, weights)
    given_ = mean_loss(head, hidden, labels, weights, positions=positions)
    assert all(torch.equal(one, other) for one, other in zip(found, given_, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_logits_are_made_once_where_they_can_be_and_the_likeliest_tokens_are_looked_for_once_in_any_case(
    monkeypatch, again
):
    hidden, head, labels = make(batch=3, length=20)
    at_a_time(monkeypatch, 8)
    monkeypatch.setattr(Head, "can_learn_at_once", lambda self, hidden: not again)
    counted = Counted()
    with counted:
        found, _, hits = mean_loss(head, hidden, labels)
        found.backward()
    times = 2 if again else 1
    assert counted.calls["argmax"] == 8 and counted.calls["_log_softmax"] == times * 8, "57 positions, 8 at a time"
    assert counted.calls["mm"] == (times + 1) * 8, "the logits, and the gradient of what they were made of"
    wanted = head(hidden.detach())[:, :-1].argmax(-1) == labels[:, 1:]
    assert torch.equal(hits, wanted.flatten())


class Counted(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_sum_is_divided_by_the_given_number_and_never_by_zero():
    hidden, head, labels = make()
    mean, token_losses, _ = mean_loss(head, hidden, labels)
    torch.testing.assert_close(mean, token_losses.mean())
    assert not token_losses.requires_grad
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(mean_loss(head, hidden, labels, None, items)[0], mean * 10 / 40)
    nothing = torch.full_like(labels, -100)
    assert mean_loss(head, hidden, nothing)[0] == mean_loss(head, hidden, nothing, None, 0)[0] == 0
