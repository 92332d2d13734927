"""Whether two models are the same up to rounding: the one judge of every comparison of logits.

Rounding and a mistake differ in three ways, and each is asked for:

1. Rounding has a size that is known beforehand. Each layer adds its own, independent of those before, to a sum of the
   size of the logits, so the largest difference is held to `FACTOR · unit roundoff · √layers · largest logit`, and the
   root mean square of all differences to a quarter of that.
2. Rounding does not change what the model says: the mean KL divergence of the next token stays below `DIVERGENCE`, and
   where the most probable token is another one, it led by no more than twice the largest difference allowed, as two
   logits may move towards each other.
3. Rounding does not know the adapter. What is lost by a wrong merge (a wrong `lora_alpha`, LoRA that does not reach a
   layer) lies along the adapter's own effect, the logits with it less those without. The share along it is found by
   regression, in which rounding averages out; it is held to `ALONG` and three standard errors, with each position
   counted as one independent number. An adapter whose effect is itself below rounding cannot be judged so.

On random models of 2, 12 and 32 layers, at widths of 32 to 2,048 and with logits up to 40, a right merge in fp32
differs by 2 to 11 in units of `unit roundoff · √layers · largest logit`, a trained one of 135M parameters and 30 layers
by 22; other kernels in bf16, or weights in bf16, by 0.2 to 2, those of a tiny Fuyu by 4.1. In 16 bits it is less, as
only what comes out of a product is rounded to the type, while its sum is made in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..base.names import Json

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FACTOR = {torch.float32: 128, torch.float16: 8, torch.bfloat16: 8}
DIVERGENCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-2}
ALONG = 0.01
NEVER = -1e4  # a logit below this is the mark of a word that the model may not say


def measure(wanted: torch.Tensor, found: torch.Tensor, without: torch.Tensor | None = None) -> Json:
    """What `judge` needs to know of two models' logits.

    Args:
        wanted: (…, vocabulary) logits that are right.
        found: (…, vocabulary or more) logits to be judged; rows that the vocabulary grew by are left out.
        without: (…, vocabulary) logits of the same model with its adapter off, where it has one.

    Returns:
        Plain numbers: `positions`, `scale` (largest logit wanted), `max_difference`, `rms_difference`, `kl` (mean),
        `probability` (largest difference), `changed` (positions with another most probable token), `lead` (of the
        token wanted there, at most), and with `without` `effect` (root mean square) and `along` (share of it).
    """
    size = wanted.shape[-1]
    given = (tensor for tensor in (wanted, found, without) if tensor is not None)
    rows = [tensor[..., :size].reshape(-1, size).clamp(min=NEVER) for tensor in given]
    if not all(bool(row.isfinite().all()) for row in rows[:2]):
        return {"positions": len(rows[0]), "scale": math.nan, "max_difference": math.nan}
    sums = dict.fromkeys(("difference", "kl", "effect", "product"), 0.0)
    most = dict.fromkeys(("scale", "max_difference", "probability", "lead"), 0.0)
    changed = 0
    for right, other, *off in zip(*rows, strict=True):  # one position at a time: a vocabulary may have 250,000 words
        right, other = right.double(), other.double()
        difference, ours, theirs = other - right, right.log_softmax(-1), other.log_softmax(-1)
        lead = float(right.max() - right[other.argmax()])
        changed += lead > 0
        said = right.masked_fill(right <= NEVER, 0.0)
        numbers = (said.abs().max(), difference.abs().max(), (ours.exp() - theirs.exp()).abs().max(), lead)
        most = {name: max(old, float(new)) for (name, old), new in zip(most.items(), numbers, strict=True)}
        difference = difference - difference.mean()  # what all words share changes no probability
        sums["difference"] += float(difference.square().sum())
        sums["kl"] += float((ours.exp() * (ours - theirs)).sum())
        for base in off:
            effect = (right + other) / 2 - base.double()  # of both, so that the rounding of neither counts twice
            effect = effect - effect.mean()
            sums["effect"] += float(effect.square().sum())
            sums["product"] += float((difference * effect).sum())
    count = max(1, rows[0].numel())
    result = {
        "positions": len(rows[0]),
        **most,
        "rms_difference": math.sqrt(sums["difference"] / count),
        "kl": max(0.0, sums["kl"]) / max(1, len(rows[0])),
        "changed": changed,
    }
    if without is not None:
        result["effect"] = math.sqrt(sums["effect"] / count)
        result["along"] = sums["product"] / sums["effect"] if sums["effect"] else 0.0
    return result


def judge(measured: Json, dtype: torch.dtype, layers: int, than: str = "the trainer's") -> Json:
    """Says whether what was measured is rounding; the rule is that of the module.

    Args:
        measured: What `measure` returned.
        dtype: What was rounded to: the type computed in, or that of the weights.
        layers: Depth of the language model.
        than: Whose the logits are that are right, for a sentence.

    Returns:
        What was measured, with `tolerance` (the largest difference allowed), `equal`, and `why` where it is not: the
        numbers, as a sentence that goes on after "but".
    """
    kind = dtype if dtype in ROUNDOFF else torch.float32 if dtype == torch.float64 else torch.bfloat16
    scale = measured["scale"]
    tolerance = FACTOR[kind] * ROUNDOFF[kind] * math.sqrt(max(1, layers)) * scale
    if not math.isfinite(measured["max_difference"]):
        why = f"its logits differ from {than}, since not all of them are numbers"
        return {**measured, "tolerance": tolerance, "equal": False, "why": why}
    result = {**measured, "tolerance": tolerance, "equal": True}
    reasons = list(_reasons(measured, tolerance, kind))
    if measured["max_difference"] > tolerance or reasons:
        why = (
            f"its logits differ from {than} by {measured['max_difference']:.2g} (allowed {tolerance:.2g} at logits up "
            f"to {scale:.3g}, {layers} layers and {str(kind).removeprefix('torch.')})"
        )
        result |= {"equal": False, "why": " and ".join([why, *reasons])}
    return result


def _reasons(measured: Json, tolerance: float, kind: torch.dtype) -> Iterator[str]:
    """What is too large beside the largest difference."""
    if (rms := measured["rms_difference"]) > tolerance / 4:
        yield f"by {rms:.2g} in the root mean square (allowed {tolerance / 4:.2g})"
    if (divergence := measured["kl"]) > DIVERGENCE[kind]:
        yield f"its probabilities by a KL divergence of {divergence:.2g} (allowed {DIVERGENCE[kind]:g})"
    if (lead := measured["lead"]) > 2 * tolerance:
        yield f"it answers another token where the right one led by {lead:.2g} (allowed {2 * tolerance:.2g})"
    if (effect := measured.get("effect", 0.0)) > tolerance / 8:
        along = measured["along"]
        across = math.sqrt(max(0.0, rms**2 - (along * effect) ** 2))
        allowed = ALONG + 3 * across / effect / math.sqrt(max(1, measured["positions"]))
        if abs(along) > allowed:
            share = abs(along) / (1 + abs(along) / 2)  # of the larger effect; `along` is a share of their mean
            yield f"its adapter acts {share:.1%} {'more' if along > 0 else 'less'} (allowed {allowed:.1%})"


def layers_of(model: nn.Module) -> int:
    """How many layers a model's language model has, as its configuration says."""
    config = getattr(model, "config", None)
    return int(getattr(config.get_text_config(), "num_hidden_layers", None) or 1) if config is not None else 1
