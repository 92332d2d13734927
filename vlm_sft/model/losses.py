"""The loss of language modelling over supervised positions alone, and the output that carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from ..base.names import IGNORED

# Positions scored at a time: bounds the logits in memory to this many rows of the vocabulary.
CHUNK = 1024

Score = Callable[[torch.Tensor], torch.Tensor]


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
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    token_losses: torch.Tensor | None = None
    token_hits: torch.Tensor | None = None


def scaled_logits(head: nn.Module, config: PreTrainedConfig, hidden: torch.Tensor) -> torch.Tensor:
    """(…, D) → (…, vocabulary), with the scalings that some language models put after their head."""
    logits = head(hidden)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


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
    except Exception:  # whatever a class needs beside a last hidden state
        return True
    finally:
        below.remove()
        del base.forward
        if own is not None:  # accelerate's, which moves inputs to a device
            base.forward = own
    ours = scaled_logits(head, causal_lm.config.get_text_config(), state)
    return torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3)


def _refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise RuntimeError("nothing below the head is to compute")


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """(B, S) labels → (P,) places, in reading order, of those that are learned, in the flattened labels.

    The first of a row is never among them: no output comes before it. On an accelerator the host waits here until the
    device has counted; a batch that brings its positions spares it that.
    """
    kept = labels != IGNORED
    kept[:, 0] = False
    return kept.flatten().nonzero()[:, 0]


def mean_loss(
    score: Score,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross entropy over the supervised positions, divided by their number or another.

    Args:
        score, hidden, labels, loss_weights, positions: See `supervised_losses`.
        num_items: What the sum is divided by; default the number of supervised positions.

    Returns:
        The loss and, for the supervised positions, their losses without gradient and whether each was a hit.
    """
    losses, hits, weights = supervised_losses(score, hidden, labels, loss_weights, positions)
    divisor: torch.Tensor | int = losses.numel() if num_items is None else num_items
    # A number that is on the device stays there: nothing is asked of it.
    divisor = divisor.to(losses.device).clamp(min=1) if isinstance(divisor, torch.Tensor) else max(divisor, 1)
    return (losses * weights).sum() / divisor, losses.detach(), hits


def supervised_losses(
    score: Score,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of every supervised position, a chunk at a time: full (B, S, vocabulary) logits never exist.

    Args:
        score: (positions, D) → (positions, vocabulary) logits; the head and what follows it.
        hidden: (B, S, D) outputs; position s - 1 is scored against the label at s.
        labels: (B, S), -100 where nothing is learned.
        loss_weights: (B, S) factors; default 1.
        positions: `supervised_positions` of the labels, where they are known; else they are looked for.

    Returns:
        For the supervised positions, in reading order: losses, whether the label is the most likely token, weights.
    """
    labels = labels.to(hidden.device)
    positions = supervised_positions(labels) if positions is None else positions.to(hidden.device)
    targets = labels.flatten().index_select(0, positions)
    picked = hidden.flatten(0, 1).index_select(0, positions - 1)
    weights = torch.ones_like(targets, dtype=torch.float32)
    if loss_weights is not None:
        weights = loss_weights.to(hidden.device).flatten().index_select(0, positions)
    if not targets.numel():  # keeps the graph: every parameter still gets its (zero) gradient
        nothing = torch.zeros(0, device=hidden.device) + hidden.float().sum() * 0.0
        return nothing, torch.zeros(0, dtype=torch.bool, device=hidden.device), weights
    return *score_positions(score, picked, targets), weights


def score_positions(score: Score, picked: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, D) outputs and (positions,) labels → losses, and whether the label is the most likely token."""
    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    for chunk, wanted in zip(picked.split(CHUNK), targets.split(CHUNK), strict=True):
        # Logits of a chunk are made again in the backward pass, so no more than one chunk lives at a time.
        if chunk.requires_grad:
            options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
            losses.append(checkpoint(_chunk_losses, score, chunk, wanted, hits, len(losses), **options))
        else:
            losses.append(_chunk_losses(score, chunk, wanted, hits, len(losses)))
    return torch.cat(losses), torch.cat(hits)


def _chunk_losses(
    score: Score, hidden: torch.Tensor, targets: torch.Tensor, hits: list[torch.Tensor], number: int
) -> torch.Tensor:
    logits = score(hidden).float()
    if number == len(hits):  # the backward pass comes here again, and needs the losses alone
        hits.append(logits.detach().argmax(-1) == targets)
    return F.cross_entropy(logits, targets, reduction="none")
