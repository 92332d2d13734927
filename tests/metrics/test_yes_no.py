"""How POPE and MME read yes and no."""

from __future__ import annotations

import pytest

from vlm_sft.metrics.yes_no import mme_says, pope_says_yes


@pytest.mark.parametrize(
    ("answer", "pope", "mme"),
    [
        ("yes", True, "yes"),
        ("No", False, "no"),
        ("No, there is none.", False, "no"),
        ("There is a dog. It is not brown.", True, "other"),
        ("There is not.", False, "other"),
        ("Nothing here", True, "no"),
        ("NO", True, "no"),
        ("Y", True, "yes"),
        ("n.", True, "no"),
        ("x", True, "other"),
        ("是", True, "other"),
        ("", True, "other"),
    ],
)
def test_yes_and_no(answer, pope, mme):
    assert (pope_says_yes(answer), mme_says(answer)) == (pope, mme)
