"""The loss over supervised positions is cross entropy, whatever the chunks, and never holds full logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
from vlm_sft.model.losses import mean_loss, scales_as_its_class, supervised_losses, supervised_positions


def make(batch=2, length=6, width=4, vocabulary=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, requires_grad=True)
    head = torch.randn(width, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return hidden, head, labels


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), masked=st.lists(st.integers(0, 11), max_size=11), chunk=st.integers(1, 8))
def test_it_is_the_cross_entropy_of_the_shifted_labels(seed, masked, chunk):
    hidden, head, labels = make(seed=seed)
    labels.view(-1)[masked] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        found, hits, weights = supervised_losses(lambda h: h @ head, hidden, labels)
    logits = (hidden @ head)[:, :-1].reshape(-1, 9)
    wanted = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found.sum(), wanted, atol=1e-5, rtol=0)
    assert len(found) == len(hits) == len(weights) == int((labels[:, 1:] != -100).sum())
    mine, theirs = torch.autograd.grad(found.sum(), hidden)[0], torch.autograd.grad(wanted, hidden)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_only_chunks_of_supervised_positions_are_scored(monkeypatch):
    hidden, head, labels = make(batch=3, length=20)
    labels[:, :15] = -100
    monkeypatch.setattr(losses, "CHUNK", 4)
    scored = []

    def score(h):
        scored.append(len(h))
        return h @ head

    supervised_losses(score, hidden.detach(), labels)
    assert scored == [4, 4, 4, 3]


def test_weights_come_in_the_order_of_the_losses():
    hidden, head, labels = make()
    labels[0, 2] = -100
    weights = torch.arange(12.0).view(2, 6)
    *_, picked = supervised_losses(lambda h: h @ head, hidden, labels, weights)
    assert picked.tolist() == [1, 3, 4, 5, 7, 8, 9, 10, 11]


def test_nothing_to_learn_still_reaches_the_graph():
    hidden, head, labels = make()
    found, hits, _ = supervised_losses(lambda h: h @ head, hidden, torch.full_like(labels, -100))
    assert not found.numel() and not hits.numel()
    found.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


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
    found = supervised_losses(lambda h: h @ head, hidden, labels, weights)
    given_ = supervised_losses(lambda h: h @ head, hidden, labels, weights, positions)
    assert all(torch.equal(one, other) for one, other in zip(found, given_, strict=True))


def test_the_likeliest_tokens_are_looked_for_once_and_not_again_in_the_backward_pass(monkeypatch):
    hidden, head, labels = make(batch=3, length=20)
    monkeypatch.setattr(losses, "CHUNK", 8)
    counted = Counted()
    with counted:
        found, hits, _ = supervised_losses(lambda h: h @ head, hidden, labels)
        found.sum().backward()
    assert counted.calls["argmax"] == 8 and counted.calls["_log_softmax"] == 2 * 8, "57 positions, 8 at a time"
    wanted = (hidden.detach()[:, :-1] @ head).argmax(-1) == labels[:, 1:]
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
    mean, token_losses, _ = mean_loss(lambda h: h @ head, hidden, labels)
    assert torch.equal(mean, token_losses.mean()) and not token_losses.requires_grad
    for items in (40, torch.tensor(40)):
        torch.testing.assert_close(mean_loss(lambda h: h @ head, hidden, labels, None, items)[0], mean * 10 / 40)
    nothing = torch.full_like(labels, -100)
    assert mean_loss(lambda h: h @ head, hidden, nothing)[0] == mean_loss(lambda h: h, hidden, nothing, None, 0)[0] == 0
