"""What lies beside the weights of a checkpoint is obeyed as far as a recipe might say the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from vlm_sft.base.errors import UserError
from vlm_sft.pieces.beside import keep_plain_generation


def kept(**settings):
    config = GenerationConfig()
    vars(config).update(settings)  # some values its constructor refuses by itself
    model = SimpleNamespace(generation_config=config)
    keep_plain_generation(model, "a base")
    return vars(model.generation_config)


def test_published_settings_are_kept_and_those_of_their_own_code_are_not():
    # Qwen-VL-Chat's, Baichuan's and old ones of transformers'.
    found = kept(
        top_p=0.8, eos_token_id=[1, 2], chat_format="chatml", user_token_id=195, num_beam_groups=1, low_memory=False
    )
    assert found["top_p"] == 0.8 and found["eos_token_id"] == [1, 2]
    assert found["num_beam_groups"] is None and not {"chat_format", "user_token_id"} & found.keys()


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6}, {"dola_layers": "high"}, {"bad_words_ids": {"a": 1}}, {"compile_config": {"a": "b"}}],
)
def test_settings_that_ask_for_code_are_refused(settings):
    with pytest.raises(UserError, match=r"^a base: its generation_config\.json is refused: "):
        kept(**settings)


def test_a_model_that_does_not_generate_has_none():
    keep_plain_generation(SimpleNamespace(generation_config=None), "a base")
    keep_plain_generation(SimpleNamespace(), "a base")
