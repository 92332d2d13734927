"""A recipe's collator and trainer: what the recipe says reaches them, and what it cannot have is one sentence."""

from __future__ import annotations

import pytest

from support.conversations import make_processor
from vlm_sft import MultimodalCollator, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.training.build_trainer import build_collator, load_collator_class


class Louder(MultimodalCollator):
    """A collator with an argument of its own."""

    def __init__(self, processor, volume, **options):
        super().__init__(processor, **options)
        self.volume = volume


def test_urls_are_fetched_only_where_a_source_allows_it(recipe_file, caption_file, tmp_path):
    def fetch_of(**source):
        data = {"train": [{"path": caption_file, "format": "caption", **source}], "url_cache": str(tmp_path / "kept")}
        recipe = load_recipe(recipe_file(data=data))
        return build_collator(recipe, make_processor("plain"), build_sft_config(recipe)).fetch

    assert fetch_of() is None
    assert fetch_of(allow_urls=True).folder == tmp_path / "kept"


def test_a_collator_of_ones_own_gets_its_arguments_and_the_recipes(recipe_file):
    recipe = load_recipe(
        recipe_file(collator=f"{__name__}:Louder", collator_args={"volume": 11}), ["data.max_rejected=0.1"]
    )
    collator = build_collator(recipe, make_processor("plain"), build_sft_config(recipe))
    assert type(collator).__name__ == "Louder" and collator.volume == 11
    assert collator.max_length == recipe.sft["max_length"] and collator.drop_rejected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"collator": f"{__name__}:Louder"}, r"collator_args: Louder does not take them: .*'volume'"),
        ({"collator_args": {"loud": 1}}, r"collator_args: MultimodalCollator does not take them: .*'loud'"),
        ({"collator": f"{__name__}:Gone"}, r"collator: the module .* has no 'Gone'\."),
        ({"collator": "json:JSONDecoder"}, r"collator: 'json:JSONDecoder' is not a subclass of vlm_sft"),
    ],
)
def test_a_collator_that_cannot_be_made_is_one_sentence(recipe_file, changes, sentence):
    recipe = load_recipe(recipe_file(**changes))
    with pytest.raises(UserError, match=sentence):
        build_collator(recipe, make_processor("plain"), build_sft_config(recipe))


def test_a_users_class_is_found_by_name():
    assert load_collator_class("vlm_sft.batch.collator:MultimodalCollator") is MultimodalCollator
    for path, sentence in (
        ("no_such_module:X", "cannot be imported"),
        ("vlm_sft.batch.collator:Nothing", "has no 'Nothing'"),
        ("vlm_sft.batch.collator:Sample", "not a subclass"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_collator_class(path)
