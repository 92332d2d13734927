"""Every argument of the installed libraries was judged: a new version with a new one fails here until it is."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import transformers
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ImagesKwargs
from trl import SFTConfig

from vlm_sft.families.table import FAMILIES
from vlm_sft.recipe.libraries import _QUANTIZATION
from vlm_sft.recipe.library_names import PASSED_ON

# Arguments of processors that are no settings: parts, forms of tensors, and what our own template says.
NO_SETTINGS = {
    "image_processor",
    "tokenizer",
    "video_processor",
    "feature_extractor",
    "chat_template",
    "kwargs",
    "self",
}
NO_SETTINGS |= {"device", "return_tensors", "data_format", "input_data_format", "disable_grouping", "args"}


def arguments_of_processors() -> set[str]:
    names = set(ImagesKwargs.__annotations__)
    for model_type, family in FAMILIES.items():
        names |= set(inspect.signature(getattr(transformers, family.processor).__init__).parameters)
        # None for what has another family's; without torchvision alone are those that this environment can import.
        if listed := (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("pil"):
            names |= set(getattr(transformers, listed).valid_kwargs.__annotations__)
    return names - NO_SETTINGS


INSTALLED = {
    "sft": lambda: {entry.name for entry in dataclasses.fields(SFTConfig) if entry.init},
    "lora": lambda: {entry.name for entry in dataclasses.fields(LoraConfig) if entry.init},
    "quantization": lambda: set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"},
    "generation": lambda: set(vars(GenerationConfig())),
    "model.processor": arguments_of_processors,
}


@pytest.mark.parametrize("section", PASSED_ON)
def test_every_argument_of_the_installed_library_is_judged(section):
    installed, judged = INSTALLED[section](), PASSED_ON[section].names
    assert not installed - judged, "new arguments: read what the library does with them, then put them on a list"
    assert not judged - installed, "these are gone: take them off the lists"


def test_a_name_stands_on_one_list_alone():
    for passed_on in PASSED_ON.values():
        lists = [passed_on.plain, passed_on.mappings, passed_on.own, passed_on.never]
        assert sum(map(len, lists)) == len(passed_on.names)


def test_names_and_types_of_quantization_are_the_same():
    assert set(_QUANTIZATION) == PASSED_ON["quantization"].names
