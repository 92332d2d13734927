"""Bundles of a server: several on one base, each as if it were alone."""

from __future__ import annotations

import pytest

from support.bundles import LLAVA, trained
from vlm_sft import answer, load
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import differs_in
from vlm_sft.serving.bundles import load_bundles, names_of


def test_names_are_the_last_part_or_all_that_was_given(tmp_path) -> None:
    for name in ("a/猫", "b/猫", "c"):
        (tmp_path / name).mkdir(parents=True)
    assert names_of([f"{tmp_path}/a/猫/", f"{tmp_path}/c"]) == ["猫", "c"]
    assert names_of([f"{tmp_path}/a/猫", f"{tmp_path}/b/猫", "me/b@main"]) == [
        f"{tmp_path}/a/猫",
        f"{tmp_path}/b/猫",
        "b",
    ]
    with pytest.raises(UserError, match="is given twice"):
        names_of([f"{tmp_path}/c", f"{tmp_path}/c"])


def test_several_stand_on_one_base_and_each_answers_as_alone(bundle_recipe, tmp_path, photos) -> None:
    kinds = {
        "two": {"lora": {"r": 2}},
        "plain": {"lora": None},
        "four": {"lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "generation": {"max_new_tokens": 9}},
    }
    for name, more in kinds.items():
        said_of_it = {key: value for key, value in more.items() if value}
        trained(bundle_recipe(name=name, chat_template="ziya", **said_of_it), tmp_path / name)
    llava = bundle_recipe(name="llava", **LLAVA)
    trained(llava, tmp_path / "llava")
    said: list[str] = []
    served = load_bundles([str(tmp_path / name) for name in (*kinds, "llava")], {}, say=said.append)
    assert list(served) == [*kinds, "llava"]
    assert len({id(served[name].base) for name in kinds}) == 1 and served["llava"].base is not served["two"].base
    assert sum("in memory once" in each for each in said) == 2 and any(
        "llava is a model of its own" in each for each in said
    )

    content = [{"type": "image"}, {"type": "text", "text": "这是什么？ What?"}]
    row = {"messages": [{"role": "user", "content": content}], "images": [photos[1]]}
    wanted = {name: answer(*load(tmp_path / name), [row], max_new_tokens=20)[0] for name in served}
    assert len(set(wanted.values())) > 2
    for _ in range(2):
        for name in ("four", "two", "llava", "plain"):
            each = served[name]
            each.activate()
            assert answer(each.model, each.processor, [row], max_new_tokens=20)[0] == wanted[name], name
    assert served["four"].own == {"max_new_tokens": 9} and served["four"].answers.max_new_tokens == 9


def test_what_differs_is_said(bundle_recipe, tmp_path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    trained(
        bundle_recipe(name="first", chat_template="ziya", lora={"r": 2}, generation={"repetition_penalty": 1.2}), first
    )
    trained(bundle_recipe(name="other", chat_template="plain", lora={"r": 2}, generation={"num_beams": 2}), other)
    assert differs_in(first, other) == "`generation.repetition_penalty`" and differs_in(other, first) is None
    found = load_bundles([str(other)], {"max_new_tokens": 3})["other"]
    assert found.settings == {"do_sample": False, "num_beams": 1} and found.own["max_new_tokens"] == 3


def test_adapters_of_other_kinds_stand_on_one_base_in_four_bits(bundle_recipe, tmp_path, photos) -> None:
    bits = {"load_in_4bit": True}
    kinds = {"first": {"r": 2}, "dora": {"r": 2, "use_dora": True, "target_modules": ["k_proj", "up_proj"]}}
    for name, lora in kinds.items():
        trained(bundle_recipe(name=name, chat_template="ziya", lora=lora, quantization=bits), tmp_path / name)
    served = load_bundles([str(tmp_path / name) for name in kinds], {})
    assert served["first"].base is served["dora"].base
    content = [{"type": "image"}, {"type": "text", "text": "这是什么？"}]
    row = {"messages": [{"role": "user", "content": content}], "images": [photos[2]]}
    for name in ("dora", "first", "dora"):
        served[name].activate()
        said = answer(served[name].model, served[name].processor, [row], max_new_tokens=16)
        assert said == answer(*load(tmp_path / name), [row], max_new_tokens=16), name
