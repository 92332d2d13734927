"""PaliGemma's prompts, which are read in both directions, stay apart in a pack."""

from __future__ import annotations

import pytest
import torch

from support.tiny_families import processor_of, rows, tiny
from vlm_sft.base.errors import UserError
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.families.build_family import model_class


def test_no_token_of_a_row_moves_with_the_prompt_of_another():
    from transformers import AutoConfig

    model = model_class(AutoConfig.from_pretrained(tiny("paligemma"))).from_pretrained(tiny("paligemma")).eval()
    data, losses = rows(None, None, None), []
    batch = MultimodalCollator(processor_of("paligemma"))([{PACK: data}])
    first, second, _ = batch["row_lengths"][0].tolist()
    scored = (batch["labels"][0] != -100).nonzero()[:, 0]
    for place in (None, first + 1):  # a token of the second prompt
        changed = batch["input_ids"].clone()
        if place is not None:
            changed[0, place] = (changed[0, place] + 1) % 50
        with torch.no_grad():
            losses.append(model(**{**batch, "input_ids": changed}, supervised_only=True, use_cache=False).token_losses)
    moved = (losses[0] - losses[1]).abs() > 1e-6
    own = (scored >= first) & (scored < first + second)
    assert moved[own].all() and not moved[~own].any()
    model.config.get_text_config().sliding_window = 8
    with pytest.raises(UserError, match=r"look back 8 tokens, and packs are longer; set sft.max_length=8 or less"):
        model(**batch, supervised_only=True, use_cache=False)
