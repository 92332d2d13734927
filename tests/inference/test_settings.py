"""Settings of an answer that are refused before any weight is read; what the others do is in test_generation.py."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.inference.settings import check_options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_token": 3}, 'no generation setting "max_new_token"; did you mean "max_new_tokens"'),
        ({"zzz": 3}, "see transformers.GenerationConfig"),
        ({"max_new_tokens": 0}, '"max_new_tokens" must be a whole number from 1, not 0'),
        ({"max_new_tokens": 2.5}, '"max_new_tokens" must be a whole number'),
        ({"temperature": "warm"}, "\"temperature\" cannot be 'warm'"),
        ({"temperature": -1}, '"temperature" cannot be -1.0'),
        ({"top_p": 3.0}, '"top_p" cannot be 3.0'),
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
