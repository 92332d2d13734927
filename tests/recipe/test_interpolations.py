"""What a recipe becomes with its `${…}` filled in is counted before it is filled in."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from support.recipe_texts import TEXT, write
from vlm_sft.base.errors import UserError
from vlm_sft.recipe import interpolations
from vlm_sft.recipe.interpolations import check_expansion
from vlm_sft.recipe.schema import load_recipe


def doubled(steps, form="${%s}${%s}"):
    names = [f"a{i}" for i in range(steps)]
    pairs = zip(names[1:], names, strict=False)
    return {names[0]: "x" * 10, **{name: form.replace("%s", before) for name, before in pairs}}


BOMBS = {
    "texts": doubled(40),
    "mappings": {"a0": {"x": 1}, **{f"a{i}": {"l": f"${{a{i - 1}}}", "r": f"${{a{i - 1}}}"} for i in range(1, 40)}},
    "lists": {"a0": ["x"], **{f"a{i}": [f"${{a{i - 1}}}"] * 9 for i in range(1, 12)}},
    "relative": {"a": doubled(40, "${.%s}${.%s}")},
    "functions": doubled(40, "${oc.select:%s}${oc.decode:${%s}}"),
    "brackets": {"a": doubled(40, "${a[%s]}${a.%s}")},
    "many": {"a": "x" * 4000, "b": "${a}" * 800, "c": "${b}" * 800},
    "by a name": {"k": "b", "a": "x", "b": "${c}", "c": "${${k}}${${k}}"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_values_that_name_each_other(name, tmp_path):
    path = write(tmp_path, yaml.safe_dump(BOMBS[name]))
    assert path.stat().st_size < 20_000
    with pytest.raises(
        UserError, match=r"(with its \$\{…\} filled in; it is refused|names itself by|only one key|be counted)"
    ) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_value_that_names_itself():
    for data in ({"a": "${a}"}, {"a": "${b}", "b": "x${a}"}, {"a": {"b": "${a}"}}):
        with pytest.raises(UserError, match=r"names itself by \$\{…\}; it cannot be filled in"):
            check_expansion(data, "it")


def test_what_recipes_say_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    text = TEXT + "system: 'in ${oc.env:DATA_ROOT,/x} and ${sft.output_dir} and ${data.train[0].path}'\n"
    assert load_recipe(write(tmp_path, text)).system == "in /data and outputs/x and data/a.jsonl"


def test_counting_takes_time_for_what_is_there_alone():
    start = time.process_time()
    check_expansion({"a": [f"x{i}" for i in range(90_000)], "b": {f"k{i}": i for i in range(90_000)}}, "it")
    assert time.process_time() - start < 5


KEYS = ["a", "b", "c"]
PIECES = st.sampled_from(["xy", *(f"${{{key}}}" for key in KEYS), *(f"${{.{key}}}" for key in KEYS)])
VALUES = st.recursive(
    st.lists(PIECES, max_size=4).map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)


def size(value):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return len(str(value)) if entries is None else sum(size(entry) for _, entry in entries)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_what_passes_becomes_no_larger_than_was_counted(data):
    """OmegaConf itself fills in what passes."""
    counted = interpolations._Recipe(data, "it")
    try:
        total = counted.at(())
        filled = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except (UserError, OmegaConfBaseException, RecursionError):
        return
    assert size(filled) <= total


def test_a_mapping_in_a_text_is_counted_with_its_marks():
    data = {"b": {"a": "", "b": ""}, "a": "xy${b}"}
    filled = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    assert filled["a"] == "xy{'a': '', 'b': ''}"
    assert size(filled) <= interpolations._Recipe(data, "it").at(())
