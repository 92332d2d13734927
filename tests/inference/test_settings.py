"""Settings of an answer that are refused before any weight is read; what the others do is in test_generation.py."""

from __future__ import annotations

import math
import re

import pytest

from vlm_sft import answer
from vlm_sft.base.errors import UserError
from vlm_sft.inference.settings import check_options
from vlm_sft.recipe.library_names import GENERATION


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_token": 3}, 'no generation setting "max_new_token"; did you mean "max_new_tokens"'),
        ({"zzz": 3}, "see transformers.GenerationConfig"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number from 1, not 0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a whole number"),
        ({"temperature": "warm"}, "`temperature` must be 0, or a number from 0.000001 to 1,000,000, not 'warm'"),
        ({"temperature": -1}, "`temperature` must be 0, or a number from"),
        ({"top_p": 3.0}, "`top_p` must be a number from 0 to 1, not 3.0"),
        (
            {"encoder_no_repeat_ngram_size": 10**9},
            "`encoder_no_repeat_ngram_size` is 1,000,000,000, but `limits.cache_t",
        ),
        ({"max_new_tokens": 2**20, "num_beams": 2}, "`num_beams` and `max_new_tokens` ask for 2 x 1,048,576 tokens at"),
        ({"cache_implementation": "quantized"}, "needs quanto, which is not installed"),
        ({"cache_config": 3}, "`cache_config` must be a mapping of its settings, not 3"),
        (
            {"watermarking_config": {"context_width": 10**9}},
            "`watermarking_config.context_width` must be a whole number",
        ),
        (
            {"exponential_decay_length_penalty": [1, 10**9]},
            "must be a whole number from 0 and a number from 0.01 to 10",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(options, says):
    with pytest.raises(UserError) as error:
        check_options(options)
    assert says in str(error.value)


def test_what_other_programs_take_is_taken(capfd):
    check_options({"temperature": 0, "top_k": 0, "max_new_tokens": 5, "repetition_penalty": 2, "do_sample": True})
    check_options({})
    assert capfd.readouterr().err == ""


POOL = [
    *(0, 1, 2, 8, -1, 299, 300, 2**20, 2**31 - 1, 2**63, 10**30, 10**400),
    *(0.0, 0.001, 0.5, 1.0, 1.5, 100.0, 1e6, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *(None, True, False, "", "a", "never", "static", "hybrid", "paged", "quanto", "猫" * 200),
    *([], [1], [5, 6], [[5]], [[5, 6], [7]], [[]], [""], ["a"] * 64, [[[5], 1.0]], [[[300], 1000]], [[], 1.0], [[[5]]]),
    *([3, 1.1], [0, 10], [2**31 - 1, 0.01], [1, math.nan], (1, 2), {}, {"a": 1}, list(range(300)), [2**31], [-5]),
    *(
        {"greenlist_ratio": 0.001, "context_width": 1000, "bias": 1000, "seeding_scheme": "selfhash"},
        {"bias": math.inf},
    ),
    *({"backend": "hqq", "nbits": 8, "axis_key": -1}, {"nbits": 10**9}, {"residual_length": -1}),
]


def test_every_value_of_every_setting_is_refused_at_once_or_works(tiny, ask, monkeypatch):
    """When the model is asked it is too late to say so, and some values would take all memory."""
    monkeypatch.setattr("vlm_sft.inference.generation.position_limit", lambda model: 40)
    model, processor = tiny
    question, late, said = ask("什么 is this?"), [], []
    for name in sorted(GENERATION.names - set(GENERATION.never)):
        passed = 0
        for value in POOL:
            try:
                check_options({name: value})
            except UserError as error:
                said.append((name, str(error)))
                continue
            passed += 1
            try:
                answer(model, processor, [question], **({"max_new_tokens": 2} | {name: value}))
            except UserError as error:
                if not re.search("names the token|leaves no token|a prompt alone has", str(error)):
                    late.append((name, value, str(error)))
        assert passed > 0, name
    assert all(name in text and "\n" not in text and len(text) < 300 for name, text in said)
    late = {name: (value, said) for name, value, said in late}
    assert late.keys() == {"guidance_scale", "prefill_chunk_size"}, late  # refused in a recipe with `stack`
