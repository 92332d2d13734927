"""The table of image-text-to-text models in docs/systems.md is what `benchmarks/families.py` finds."""

from __future__ import annotations

import pytest

from support.scripts import script, systems_table
from vlm_sft.families.table import FAMILIES

TABLE = systems_table("Image-text-to-text models")
SAMPLE = [
    "blip-2",
    "florence2",
    "git",
    "kosmos-2.5",
    "mistral4",
    "chameleon",
    "glmga",
    "qwen4_exp",
]


@pytest.fixture(scope="module")
def families():
    return script("benchmarks/families.py")


def test_every_class_of_transformers_is_in_the_table_and_the_families_work(families):
    assert list(TABLE) == families.classes()
    assert {name: said for name, said in TABLE.items() if said.startswith("works")} == {
        name: families.works(name, []) for name in sorted(set(FAMILIES) & set(TABLE))
    }


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_why_a_class_is_no_family(name, families):
    assert families.reason(name) == TABLE[name]


def test_a_failed_check_is_said_by_its_name(families):
    assert families.works("llava", ["test_packed_rows_give_the_loss"]) == "no: packed rows give the loss"
    assert families._is_of("test_x[kosmos-2-4]", "kosmos-2") and not families._is_of("test_x[qwen3_5_moe]", "qwen3_5")
