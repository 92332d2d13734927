"""Positions: rotations that stay exact, packed rows that each begin at zero and see themselves alone, and those that a
language model reads off its ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from ..base.errors import UserError

# Towers that take images of any size: they fit their table to the image at every forward (DINOv2 is made for 518 pixels
# and published with 224), or compute positions, or have none.
INTERPOLATING = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "convnext", "convnextv2", "swin",
                 "swinv2", "bit", "cvt", "dinat", "efficientnet", "focalnet", "mobilenet_v1", "mobilenet_v2",
                 "mobilevit", "mobilevitv2", "poolformer", "pvt_v2", "regnet", "resnet", "segformer",
                 "swiftformer")  # fmt: skip

Mask: TypeAlias = torch.Tensor | BlockMask
"""What a language model's attention takes: (B, 1, S, S), or what flex attention has in its place."""


def segment_numbers(row_lengths: torch.Tensor, length: int) -> torch.Tensor:
    """(B, R) lengths of packed rows → (B, `length`) number of the one that each token lies in; R: it is padding."""
    places = torch.arange(length, device=row_lengths.device).expand(len(row_lengths), -1).contiguous()
    return torch.searchsorted(row_lengths.cumsum(1), places, right=True)


def row_numbers(row_lengths: torch.Tensor, length: int, row_heads: torch.Tensor | None = None) -> torch.Tensor:
    """(B, `length`) number of the row that each token belongs to; of rows with one prefix, that of the prefix."""
    numbers = segment_numbers(row_lengths, length)
    return numbers if row_heads is None else F.pad(row_heads, (0, 1), value=row_heads.shape[1]).gather(1, numbers)


def packed_positions(row_lengths: torch.Tensor, length: int, row_heads: torch.Tensor | None = None) -> torch.Tensor:
    """(B, R) lengths of packed rows → (B, `length`) positions that begin at zero with each row, and with the padding.

    Args:
        row_lengths: Tokens of the rows that stand behind each other in a sequence; 0 where it has fewer than R.
        length: Tokens of a sequence, padding included.
        row_heads: (B, R) number of the row whose tokens stand before each: its own, or that of a prefix which it shares
            with others and behind which its positions go on. None: every row is whole.
    """
    segments = segment_numbers(row_lengths, length)
    starts = F.pad(row_lengths.cumsum(1), (1, 0))
    if row_heads is not None:
        own = torch.arange(row_lengths.shape[1], device=row_lengths.device)
        before = torch.where(row_heads == own, 0, row_lengths.gather(1, row_heads))
        starts = starts - F.pad(before, (0, 1))
    return torch.arange(length, device=row_lengths.device) - starts.gather(1, segments)


def own_positions(
    language_model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """(2, B, S) positions, where those of a language model depend on its ids (ChatGLM: on where the prompt ends).

    Such a model has a method `positions_of`, which gives the place of a token in its row, and how far behind the prompt
    it is. None leaves the positions to the language model, as most do.

    Args:
        language_model: Without its head.
        input_ids: (B, S).
        attention_mask: (B, S), 0 for padding.
        row_lengths: (B, R) in place of the mask, where rows are packed; see `packed_positions`.
    """
    if (positions_of := getattr(language_model, "positions_of", None)) is None:
        return None
    rows = None if row_lengths is None else row_numbers(row_lengths, input_ids.shape[1])
    return positions_of(input_ids, attention_mask, rows)


def kept_apart(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    row_lengths: torch.Tensor,
    own: torch.Tensor | None = None,
    row_heads: torch.Tensor | None = None,
) -> tuple[Mask | None, torch.Tensor]:
    """What a language model is given so that no packed row sees another: attention mask and positions.

    transformers makes the mask, block-diagonal and causal, from positions that begin anew. Most language models do so
    themselves; some (OPT, BioGPT, MPT) make theirs without positions and take one that is ready. One mask is not enough
    where some layers look back less far than others, and such models all make their own. On a CPU, `sdpa` attends row
    by row and needs no mask (`attend_by_row`).

    Args:
        language_model: Without its head.
        inputs_embeds: (B, S, D) what it reads.
        row_lengths: (B, R) see `packed_positions`.
        row_heads: (B, R) likewise; with them the mask is always made here.
        own: (2, B, S) `own_positions`; then the prompt of each row is read in both directions.
    """
    config = language_model.config
    positions = packed_positions(row_lengths, inputs_embeds.shape[1], row_heads)
    if row_heads is not None:
        if own is not None:
            raise UserError(
                f"independent: a {config.model_type} model reads picture and question together, so questions cannot "
                "share it; remove `independent` from the source."
            )
        return shared_mask(config, inputs_embeds, row_lengths, row_heads), positions
    if not looks_back_whole(config):
        return None, positions
    if own is None and _attends_by_row(language_model, row_lengths):
        return row_lengths[:, None, None], positions
    prompts = None if own is None else torch.where(own[1] == 0, row_numbers(row_lengths, own.shape[2]), -1)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
        block_sequence_ids=prompts,
    )
    return mask, positions if own is None else own


def _attends_by_row(language_model: PreTrainedModel, row_lengths: torch.Tensor) -> bool:
    """Whether the attention of a language model is transformers' `sdpa`, which then knows what packed rows are."""
    if language_model.config._attn_implementation != "sdpa" or row_lengths.device.type != "cpu":
        return False
    AttentionInterface.register("sdpa", attend_by_row)
    return bool(language_model._supports_attention_backend)


def attend_by_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, and for packed rows causal attention of each row by itself.

    A mask makes a CPU compute all pairs of a pack and throw most of them away: of rows of 100 tokens in packs of 500,
    nine tenths.

    Args:
        module: The layer's attention.
        query: (B, H, S, D).
        key: (B, H or fewer, S, D).
        value: Likewise.
        attention_mask: (B, 1, 1, R) whole numbers are `row_lengths`; any other goes to transformers as it is.
        dropout: Share of the weights that are dropped.
        scaling: Of the products; default 1 / sqrt(D).
        **options: What transformers' function takes beside these; packed rows have none of it.

    Returns:
        (B, S, H, D), zero where padding is, and None.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    return _row_by_row(query, key, value, attention_mask[:, 0, 0], dropout, scaling), None


@torch.compiler.disable  # each set of lengths would be compiled anew
def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_lengths: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    rows = [row for lengths in row_lengths.tolist() for row in (*lengths, sum(lengths) - length) if row]
    # One split of the whole: its way back is one concatenation, where slices would each fill a tensor of zeros.
    parts = [
        tensor.transpose(1, 2).flatten(0, 1).split([abs(row) for row in rows])
        for tensor in (query, *(repeat_kv(each, heads // each.shape[1]) for each in (key, value)))
    ]
    found = []
    for row, *pieces in zip(rows, *parts, strict=True):
        if row < 0:  # padding belongs to no row
            found.append(torch.zeros_like(pieces[2]))
            continue
        q, k, v = (piece.transpose(0, 1)[None] for piece in pieces)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found).unflatten(0, (batch, length))


def looks_back_whole(config: PreTrainedConfig) -> bool:
    """Whether every layer of a language model sees all tokens before its own."""
    short = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return {*(getattr(config, "layer_types", None) or ["short" if short else "full_attention"])} == {"full_attention"}


def shared_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    row_lengths: torch.Tensor,
    row_heads: torch.Tensor,
    blocks: torch.Tensor | None = None,
) -> Mask:
    """The mask of rows behind shared prefixes: each token sees the prefix of its row and what is before it in the row.

    Args:
        config: Of the language model.
        inputs_embeds: (B, S, D) what it reads.
        row_lengths: (B, R) see `packed_positions`.
        row_heads: (B, R) likewise.
        blocks: (B, S) numbers of stretches that are read in both directions (the tokens of an image), -1 elsewhere.

    Raises:
        UserError: The attention takes no such mask, or some layers look back less far than the sequence is long.
    """
    length = inputs_embeds.shape[1]
    kind = config._attn_implementation
    if "flash" in str(kind):
        raise UserError(
            f"independent: {kind} takes no mask in which several questions see one image; set attn_implementation to "
            "sdpa or flex_attention, or remove `independent` from the source."
        )
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((size for size in windows if size), default=length)
    if window < length and not looks_back_whole(config):
        raise UserError(
            f"independent: layers of this model look back {window:,} tokens, and rows that share an image are longer; "
            f"set sft.max_length={window} or less, or remove `independent` from the source."
        )
    segments = segment_numbers(row_lengths, length)
    rows = row_numbers(row_lengths, length, row_heads)

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own, other = segments[batch, query], segments[batch, key]
        return (own == other) | (rows[batch, query] == other)

    return create_causal_mask(
        config=config, inputs_embeds=inputs_embeds, attention_mask=None, past_key_values=None, and_mask_function=seen,
        block_sequence_ids=blocks,
    )  # fmt: skip


class ExactRotations(nn.Module):
    """A model whose rotary positions are exact in whatever type its weights are.

    transformers loads the rates of the rotations in fp32, but `model.to(dtype)` and DeepSpeed's bf16 cast them too:
    rounded by up to 1 in 256, they turn the thousandth position by radians.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        rates = _rates_of(self)
        super()._apply(fn, recurse)
        _put_back(self, rates)
        return self


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` for a module that is no `ExactRotations`, with the same care."""
    rates = _rates_of(module)
    module.to(dtype)
    _put_back(module, rates)
    return module


def _rates_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}


def _put_back(module: nn.Module, rates: dict[str, torch.Tensor]) -> None:
    for name, buffer in rates.items():
        owner, _, leaf = name.rpartition(".")
        now = getattr(module.get_submodule(owner), leaf)
        if now.dtype != buffer.dtype:
            setattr(module.get_submodule(owner), leaf, buffer.to(now.device))
