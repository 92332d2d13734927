"""Linear layers in 4 or 8 bits (bitsandbytes): the language model's alone, its head left as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..model.freeze import PART_NAMES, unwrapped

# What a model says of itself once any of its layers is quantised; see `settle`.
MARKS = (
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "hf_quantizer",
    "hf_device_map",
)
# As the classes of language models call their heads.
HEADS = ("lm_head", "embed_out")


def leave_out(config: BitsAndBytesConfig, names: Sequence[str]) -> BitsAndBytesConfig:
    """Adds modules to those that the configuration leaves as they are.

    Args:
        config: It is changed.
        names: Whole names of modules; what lies in them stays too.
    """
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *names]
    return config


def outside_language_model(model: PreTrainedModel) -> list[str]:
    """Modules of an existing VLM (also on the meta device) that are not quantised: its other parts, and its head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if PART_NAMES.get(unwrapped(name), "language_model") != "language_model"
        or (module is head and head is not None)
    ]


def quantise_empty(model: nn.Module, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Puts quantised layers in place of linear ones on the meta device, as loading would; biases get the `dtype`."""
    from transformers.integrations import replace_with_bnb_linear

    replace_with_bnb_linear(model, config.llm_int8_skip_modules, config)
    for module in model.modules():
        if hasattr(module, "source_cls") and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


def settle(model: PreTrainedModel) -> None:
    """Makes a model that was loaded with quantised layers one like any other.

    What asks the model, and not the layer, whether it is quantised takes all of it to be: transformers refuses to move
    it, and TRL casts every trained parameter to bf16, an fp32 projector among them.
    """
    for name in MARKS:
        vars(model).pop(name, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # a bundle names its base, which is not quantised
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes packs 4-bit weights anew at the first evaluation: widths that 64 does not divide
            # fail, logits depend on the machine, and no gradient passes these weights afterwards.
            module.support_avx512bf16_for_cpu = False
