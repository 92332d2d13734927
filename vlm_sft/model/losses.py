"""The loss of language modelling over supervised positions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..base.names import IGNORED

# Positions scored at a time: bounds the logits in memory to this many rows of the vocabulary.
CHUNK = 1024

Score = Callable[[torch.Tensor], torch.Tensor]


def scaled_logits(head: nn.Module, config: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(…, D) → (…, vocabulary), with the scalings some language models put after their head.

    Args:
        head: The language model's head.
        config: Its configuration.
        hidden: Outputs of the language model.
    """
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

    Args:
        causal_lm: A causal language model with its weights.
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


def _refuse(module: nn.Module, args: Any) -> None:
    raise RuntimeError("nothing below the head is to compute")


def supervised_losses(
    score: Score, hidden: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of every supervised position, a chunk at a time: full (B, S, vocabulary) logits never exist.

    Args:
        score: (positions, D) → (positions, vocabulary) logits; the head and what follows it.
        hidden: (B, S, D) outputs; position s - 1 is scored against the label at s.
        labels: (B, S), -100 where nothing is learned.
        loss_weights: (B, S) factors; default 1.

    Returns:
        For the supervised positions, in reading order: losses, whether the label is the most likely token, weights.
    """
    labels = labels.to(hidden.device)[:, 1:]
    mask = labels != IGNORED
    picked, targets = hidden[:, :-1][mask], labels[mask]
    weights = torch.ones_like(targets, dtype=torch.float32) if loss_weights is None else loss_weights[:, 1:][mask]
    if not targets.numel():  # keeps the graph: every parameter still gets its (zero) gradient
        nothing = torch.zeros(0, device=hidden.device) + hidden.float().sum() * 0.0
        return nothing, torch.zeros(0, dtype=torch.bool, device=hidden.device), weights
    return *score_positions(score, picked, targets), weights


def score_positions(score: Score, picked: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, D) outputs and (positions,) labels → losses, and whether the label is the most likely token."""
    losses, hits = [], []
    for chunk, wanted in zip(picked.split(CHUNK), targets.split(CHUNK), strict=True):
        # Logits of a chunk are made again in the backward pass, so no more than one chunk lives at a time.
        if chunk.requires_grad:
            options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
            loss, hit = checkpoint(_chunk_losses, score, chunk, wanted, **options)
        else:
            loss, hit = _chunk_losses(score, chunk, wanted)
        losses.append(loss)
        hits.append(hit)
    return torch.cat(losses), torch.cat(hits)


def _chunk_losses(score: Score, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = score(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).detach()
