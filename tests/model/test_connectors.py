"""Projectors and the Q-Former: shapes, formulas, and the sentences on bad sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import Blip2QFormerConfig, Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from vlm_sft.base.errors import UserError
from vlm_sft.model.connectors import MLPProjector, PixelShuffleProjector, build_projector, build_resampler


@pytest.mark.parametrize(
    ("kind", "options", "tokens"),
    [
        ("linear", {}, 16),
        ("mlp", {"depth": 3, "activation": "silu"}, 16),
        ("mlp_norm", {"depth": 3}, 16),
        ("pixel_shuffle", {"scale_factor": 4}, 1),
        ("pixel_shuffle_mlp", {}, 4),
    ],
)
def test_a_projector_takes_two_widths(kind, options, tokens):
    projector = build_projector(kind, 24, 32, **options)
    assert projector(torch.randn(2, 16, 24)).shape == (2, tokens, 32)
    assert projector.last_linear.out_features == 32


def test_mlp_is_llava_mlp2x_gelu():
    torch.manual_seed(0)
    projector, x = MLPProjector(6, 8), torch.randn(1, 3, 6)
    reference = torch.nn.Sequential(projector.layers[0], torch.nn.GELU(), projector.layers[1])
    torch.testing.assert_close(projector(x), reference(x))


def test_pixel_shuffle_is_idefics3s():
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={"hidden_size": 6},
        text_config={
            "model_type": "llama",
            "hidden_size": 12,
            "num_attention_heads": 2,
            "vocab_size": 50,
            "pad_token_id": 0,
        },
        scale_factor=2,
    )
    theirs, ours, x = Idefics3Connector(config), PixelShuffleProjector(6, 12, 2), torch.randn(3, 16, 6)
    ours.linear.weight.data.copy_(theirs.modality_projection.proj.weight)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("tokens", [17, 9])
def test_pixel_shuffle_needs_a_square_it_can_fold(tokens):
    with pytest.raises(UserError, match=rf"gives {tokens} tokens.*feature_select: patch"):
        PixelShuffleProjector(6, 10, 2)(torch.randn(1, tokens, 6))


def test_qformer_reads_any_number_of_patches_into_its_queries():
    config = Blip2QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                encoder_hidden_size=24)  # fmt: skip
    resampler = build_resampler("qformer", config, 5).eval()
    assert resampler(torch.randn(2, 7, 24)).shape == (2, 5, 16)
    half = resampler(torch.randn(1, 7, 24, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and resampler.query_tokens.dtype == torch.float32


def test_unknown_kinds_name_the_known_ones():
    with pytest.raises(UserError, match="'conv' is unknown; use one of linear, linear_end, linear_no_bias, mlp"):
        build_projector("conv", 1, 1)
    with pytest.raises(UserError, match="'perceiver' is unknown; use one of qformer, instruct_qformer"):
        build_resampler("perceiver", Blip2QFormerConfig(), 1)
    with pytest.raises(UserError, match="no activation 'gulu'"):
        build_projector("mlp", 1, 1, activation="gulu")
    with pytest.raises(UserError, match="at least 1 layer"):
        build_projector("mlp", 1, 1, depth=0)
