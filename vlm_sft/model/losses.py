"""The loss of language modelling over supervised positions alone, and the output that carries it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from ..base.names import IGNORED, Values
from .positions import segment_numbers
from .sharding import is_sharded

# Bytes of logits, in fp32, that are held at a time: on a CPU, and elsewhere. With fewer, a head that learns would add
# up its gradient too often.
CHUNK_BYTES = {True: 2**26, False: 2**28}
FEWEST = 16  # positions at a time, whatever the vocabulary
# What transformers' functions of a routers' loss are given; one of another kind (Doge's) is not called.
GIVEN = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass
class VLMOutput(ModelOutput):
    """Output of `VLMForConditionalGeneration`, and of an existing VLM that scores supervised positions.

    Attributes:
        loss: Scalar, when labels were given.
        logits: (B, S or logits_to_keep, vocabulary), unless only supervised positions were scored.
        past_key_values: Cache of the language model.
        hidden_states: Per layer (B, S, D), when asked for.
        attentions: Per layer, when asked for.
        token_losses: (supervised positions,) negative log-likelihoods, when `supervised_only`.
        token_hits: (supervised positions,) whether the label is the most likely token, when `supervised_only`.
        router_loss: Scalar, the auxiliary loss of a mixture of experts without its factor, when it is in the loss.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    token_losses: torch.Tensor | None = None
    token_hits: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


def scaled_logits(head: nn.Module, config: PreTrainedConfig, hidden: torch.Tensor) -> torch.Tensor:
    """(…, D) → (…, vocabulary), with the scalings that some language models put around their head."""
    if getattr(config, "scale_decoder_outputs", False):  # the first T5, not FlanT5
        hidden = hidden * config.hidden_size**-0.5
    logits = head(hidden)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


class Head:
    """What makes logits of hidden states: a head, and the scalings that its language model puts after it.

    Args:
        module: The head, maybe with an adapter in it.
        config: Configuration of the language model.
        plain: Whether these scalings are left out.
    """

    def __init__(self, module: nn.Module, config: PreTrainedConfig, plain: bool = False) -> None:
        self.module, self.config, self.plain = module, config, plain

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, vocabulary) logits."""
        return self.module(hidden) if self.plain else scaled_logits(self.module, self.config, hidden)

    def trained(self) -> list[nn.Parameter]:
        """The parameters of it that learn."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def can_learn_at_once(self, hidden: torch.Tensor) -> bool:
        """Whether gradients may be made in the forward pass.

        A share of a weight is there while the head runs and no longer; fp16 wants a loss that is scaled up first.
        """
        kind = hidden.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        return half != torch.float16 and not is_sharded(self.module.parameters())

    def chunks(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Places in (positions, D) that are scored together."""
        room = CHUNK_BYTES[hidden.device.type == "cpu"]
        size = max(FEWEST, room // (4 * self.config.vocab_size))
        return (slice(start, start + size) for start in range(0, len(hidden), size))


@contextmanager
def chunks_as_on(cpu: bool) -> Iterator[None]:
    """Within, logits are held on this CPU as they would be on one, or on another device, whose memory is estimated."""
    own = CHUNK_BYTES[True]
    CHUNK_BYTES[True] = CHUNK_BYTES[cpu]
    try:
        yield
    finally:
        CHUNK_BYTES[True] = own


class _Given(BaseModelOutputWithPast):
    """An output that has every attribute a class may ask for."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def scales_as_its_class(causal_lm: PreTrainedModel) -> bool:
    """Whether `scaled_logits` gives what the class of a language model makes of the same last hidden state.

    Only the head computes: what stands below it returns one random state. A class that does not run so (OPT reaches
    below its own inner model) passes.
    """
    base, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 1, head.weight.shape[-1], generator=generator).to(head.weight)
    own = vars(base).get("forward")
    base.forward = lambda *args, **kwargs: _Given(last_hidden_state=state)
    below = causal_lm.get_input_embeddings().register_forward_pre_hook(_refuse)
    try:
        theirs = causal_lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=state.device), use_cache=False).logits
    except Exception:  # the class needs more than a last hidden state
        return True
    finally:
        below.remove()
        del base.forward
        if own is not None:  # accelerate's, which moves inputs to a device
            base.forward = own
    ours = scaled_logits(head, causal_lm.config.get_text_config(), state)
    return torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3)


def _refuse(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    raise RuntimeError("nothing below the head is to compute")


def router_factor(core: PreTrainedModel) -> float:
    """What the routers' auxiliary loss counts in the loss; 0 for what is no mixture of experts, or has no such loss.

    Args:
        core: What makes the last hidden state: a language model without its head, or the inside of an existing VLM.
    """
    config, module = core.config.get_text_config(), sys.modules[type(core).__module__]
    function = getattr(module, "load_balancing_loss_func", None)
    if not module.__name__.startswith("transformers.") or not hasattr(config, "num_experts_per_tok"):
        return 0.0
    recorded = "router_logits" in (getattr(core, "_can_record_outputs", None) or {})
    if not recorded or function is None or [*signature(function).parameters] != GIVEN:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def router_flag(core: PreTrainedModel, training: bool) -> dict[str, bool]:
    """What a forward pass is told so that `add_balance` finds what the routers said, where it is to be found."""
    return {"output_router_logits": True} if training and router_factor(core) else {}


def router_loss(
    core: PreTrainedModel,
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
    row_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly tokens are dealt to experts (Switch Transformers, equations 4 to 6), padding left out.

    It is the function that the model's own class adds with `output_router_logits`, of (B * S, experts) for each layer.
    """
    if row_lengths is not None:
        length = len(router_logits[0]) // len(row_lengths)
        attention_mask = (segment_numbers(row_lengths, length) < row_lengths.shape[1]).long()
    function = sys.modules[type(core).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    experts, chosen = router_logits[0].shape[-1], core.config.get_text_config().num_experts_per_tok
    found: torch.Tensor = function(router_logits, experts, chosen, attention_mask)
    return found


def add_balance(
    output: VLMOutput,
    core: PreTrainedModel,
    made: ModelOutput,
    attention_mask: torch.Tensor | None,
    given: Values,
    losses: torch.Tensor,
    num_items: torch.Tensor | int | None,
) -> None:
    """Puts the routers' loss into that of a batch, where a mixture of experts trains.

    It counts by the batch's share of the labels that a step divides by: a step has the mean over its batches.

    Args:
        output: With the batch's loss; changed.
        core: As `router_factor` takes it.
        made: What it gave, told `router_flag`.
        attention_mask: (B, S), 0 for padding.
        given: What else it was given; of packs `row_lengths`, (B, R), in place of the mask.
        losses: (P,) of the batch's labels.
        num_items: What the loss was divided by; None: P.
    """
    if not core.training or not router_factor(core) or not (router_logits := made.get("router_logits")):
        return
    found = router_loss(core, router_logits, attention_mask, given.get("row_lengths"))
    share = 1.0 if num_items is None else losses.numel() / num_items
    assert output.loss is not None
    output.router_loss = found.detach()
    output.loss = output.loss + router_factor(core) * share * found.to(output.loss.device)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """(B, S) labels → (P,) places, in reading order, of those that are learned, in the flattened labels.

    The first of a row is never among them: no output comes before it. On an accelerator the host waits here until the
    device has counted; a batch that brings its positions spares it that.
    """
    kept = labels != IGNORED
    kept[:, 0] = False
    return kept.flatten().nonzero()[:, 0]


def mean_loss(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross entropy over the supervised positions, divided by their number or another.

    Args:
        head: Scores positions, a chunk at a time: full (B, S, vocabulary) logits never exist.
        hidden: (B, S, D) outputs; position s - 1 is scored against the label at s.
        labels: (B, S), -100 where nothing is learned.
        loss_weights: (B, S) factors; default 1.
        num_items: What the sum is divided by; default the number of supervised positions.
        positions: `supervised_positions` of the labels, where they are known; else they are looked for.

    Returns:
        The loss and, for the supervised positions in reading order, their losses without gradient and factor, and
        whether each was a hit: the label is the most likely token.
    """
    labels = labels.to(hidden.device)
    positions = supervised_positions(labels) if positions is None else positions.to(hidden.device)
    targets = labels.flatten().index_select(0, positions)
    picked = hidden.flatten(0, 1).index_select(0, positions - 1)
    weights = torch.ones_like(targets, dtype=torch.float32)
    if loss_weights is not None:
        weights = loss_weights.to(hidden.device).flatten().index_select(0, positions).float()
    total, losses, hits = score_positions(head, picked, targets, weights)
    divisor: torch.Tensor | int = losses.numel() if num_items is None else num_items
    # A number that is on the device stays there: nothing is asked of it.
    divisor = divisor.to(losses.device).clamp(min=1) if isinstance(divisor, torch.Tensor) else max(divisor, 1)
    return total / divisor, losses, hits


@torch.compiler.disable
def score_positions(
    head: Head, picked: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(P, D) outputs, (P,) labels and factors → the sum of the losses with gradient; losses and hits without."""
    trained = head.trained()
    learns = torch.is_grad_enabled() and (picked.requires_grad or bool(trained))
    if learns and head.can_learn_at_once(picked):
        return _Scored.apply(head, targets, weights, picked, *trained)
    losses = [picked.float().sum(1)[:0]]  # it has no number, and keeps the graph where nothing is learned
    hits = [torch.zeros(0, dtype=torch.bool, device=picked.device)]
    for part in head.chunks(picked):
        if learns:
            # Logits of a chunk are made again in the backward pass, so no more than one chunk lives at a time.
            options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
            losses.append(checkpoint(_losses, head, picked[part], targets[part], hits, len(hits), **options))
        else:
            losses.append(_losses(head, picked[part], targets[part], hits, len(hits)))
    found = torch.cat(losses)
    return (found * weights).sum(), found.detach(), torch.cat(hits)


def _losses(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, hits: list[torch.Tensor], number: int
) -> torch.Tensor:
    logits = head(hidden).float()
    if number == len(hits):  # the backward pass runs this once more, and needs the losses alone
        hits.append(logits.detach().argmax(-1) == targets)
    return F.cross_entropy(logits, targets, reduction="none")


class _Scored(torch.autograd.Function):
    """Losses of positions, whose gradients are made while their logits are there: no logits are made twice.

    It can be: all that comes after is one factor. A second backward pass through it is an error.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Head, targets: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor, *trained: nn.Parameter
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        losses, hits = [weights[:0]], [targets[:0] > 0]
        of_hidden = torch.zeros_like(picked) if picked.requires_grad else None
        of_trained: list[torch.Tensor | None] = [None if len(picked) else torch.zeros_like(each) for each in trained]
        for part in head.chunks(picked):
            rows = picked[part].detach().requires_grad_(picked.requires_grad)
            with torch.enable_grad():
                # A view of them: hooks that count what a module computes (torch's FLOP counter) refuse to meet a leaf.
                logits = head(rows.view_as(rows))
            own = targets[part, None]
            scores = F.log_softmax(logits.detach().float(), -1)
            losses.append(-scores.gather(1, own)[:, 0])
            hits.append(logits.detach().argmax(-1) == targets[part])
            slope = scores.exp_()  # the gradient of the losses in the logits
            slope.scatter_(1, own, slope.gather(1, own) - 1).mul_(weights[part, None])
            learning = [rows, *trained] if picked.requires_grad else [*trained]
            found = torch.autograd.grad(logits, learning, slope.to(logits.dtype), allow_unused=True)
            if of_hidden is not None:
                of_hidden[part], found = found[0], found[1:]
            of_trained = [_sum(whole, gradient) for whole, gradient in zip(of_trained, found, strict=True)]
        ctx.gradients = [of_hidden, *of_trained]
        each, right = torch.cat(losses), torch.cat(hits)
        ctx.mark_non_differentiable(each, right)
        return (each * weights).sum(), each, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The gradients of the loss were made once, and are used: the graph cannot be kept.")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so that no second copy is made
        return None, None, None, *(None if each is None else each.mul_(factor) for each in gradients)


def _sum(whole: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    return whole.add_(more) if whole is not None and more is not None else more if whole is None else whole
