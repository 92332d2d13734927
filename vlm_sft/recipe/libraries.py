"""Builds the configs of the libraries that own them: `sft:` → trl.SFTConfig, `lora:` → peft.LoraConfig, `quantization:`
→ transformers.BitsAndBytesConfig.

The libraries are imported inside the functions, because reading a recipe must not import torch.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from ..base.names import Json, Options
from ..base.words import one_line
from .passed_on import refuse_strange

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    from .schema import Recipe

# Numeric types that a laptop without a GPU refuses; they say nothing about whether a recipe is right.
_PRECISION = {"bf16": False, "fp16": False, "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False}

# BitsAndBytesConfig is no dataclass, and what it does not know it only notes in a log.
_QUANTIZATION: Options = {
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16"] | None,
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None,
    "llm_int8_threshold": float,
    "llm_int8_skip_modules": list[str] | None,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
}

# What a recipe says under `lora:` and PEFT does not know.
OWN_LORA_KEYS: Options = {"add_tokens": list[str]}


_SAVES = {"strategy": "steps", "steps": 500}  # transformers' own


def validate_libraries(recipe: Recipe) -> None:
    """Checks `sft:`, `lora:` and `quantization:` against the installed libraries, on their real classes.

    A recipe for GPUs passes on a machine that has none: the numeric types are then left out.

    Raises:
        UserError: a wrong type, a value that the library refuses, or a name that only the user's own recipe may have.
    """
    import torch

    override = {} if torch.cuda.is_available() else _PRECISION
    _build_sft(recipe, {**recipe.sft, **override})
    build_lora_config(recipe)
    build_quantization_config(recipe)


def build_sft_config(recipe: Recipe) -> SFTConfig:
    """Builds `trl.SFTConfig` from `sft:`, with `remove_unused_columns=False`.

    Raises:
        UserError: as in `validate_libraries`, this machine cannot compute in the type that the recipe asks for, or a
            package that `sft:` names is not installed.
    """
    args = _build_sft(recipe, settle_precision(recipe).sft)
    _check_installed(recipe, args)
    _check_schedule(recipe, args)
    return args


def settle_precision(recipe: Recipe) -> Recipe:
    """The recipe with `sft.bf16` said: where it is silent, bf16 on a device that computes in it, else fp32.

    `SFTConfig` would take bf16 everywhere then, and a CPU refuse it. A bundle keeps the settled recipe, so that it
    loads in the types of its training on any machine.
    """
    if recipe.sft.get("bf16") is not None or recipe.sft.get("fp16"):
        return recipe
    from transformers.utils import is_torch_bf16_gpu_available

    able = not recipe.sft.get("use_cpu") and is_torch_bf16_gpu_available()
    return recipe.model_copy(update={"sft": {**recipe.sft, "bf16": bool(able)}})


def computes_in(recipe: Recipe) -> str:
    """`bfloat16`, `float16` or `float32`: what a run of the recipe computes in on this machine."""
    if recipe.sft.get("fp16"):
        return "float16"
    return "bfloat16" if settle_precision(recipe).sft.get("bf16") else "float32"


def build_lora_config(recipe: Recipe) -> LoraConfig | None:
    """Builds `peft.LoraConfig` from `lora:`; None when the recipe has no LoRA.

    Raises:
        UserError: a wrong type, a value that PEFT refuses, or a name that only the user's own recipe may have.
    """
    from peft import LoraConfig

    if recipe.lora is None:
        return None
    _check_types(recipe, "lora", recipe.lora, {**typing.get_type_hints(LoraConfig), **OWN_LORA_KEYS})
    refuse_strange(recipe, "lora")
    try:
        return LoraConfig(**{key: value for key, value in recipe.lora.items() if key not in OWN_LORA_KEYS})
    except (ValueError, TypeError) as error:
        raise recipe.error(("lora",), f"peft.LoraConfig refuses `lora`: {one_line(error)}") from error


def build_quantization_config(recipe: Recipe, compute_dtype: str = "float32") -> BitsAndBytesConfig | None:
    """Builds `transformers.BitsAndBytesConfig` from `quantization:`; None when the recipe has none.

    Two defaults are ours: NF4 (the library's is FP4), and the type that 4-bit weights are computed in.

    Args:
        recipe: A validated recipe.
        compute_dtype: What the run computes in, where the recipe has no `bnb_4bit_compute_dtype`.

    Raises:
        UserError: a wrong type, or a value that the library refuses.
    """
    from transformers import BitsAndBytesConfig

    if recipe.quantization is None:
        return None
    _check_types(recipe, "quantization", recipe.quantization, _QUANTIZATION)
    try:
        return BitsAndBytesConfig(
            **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute_dtype, **recipe.quantization}
        )
    except (ValueError, TypeError, ImportError) as error:
        refusal = f"BitsAndBytesConfig refuses `quantization`: {one_line(error)}"
        raise recipe.error(("quantization",), refusal) from error


def _build_sft(recipe: Recipe, arguments: Options) -> SFTConfig:
    from trl import SFTConfig

    _check_types(recipe, "sft", recipe.sft, typing.get_type_hints(SFTConfig))
    refuse_strange(recipe, "sft")
    if recipe.evaluation.benchmarks and recipe.sft.get("eval_strategy") is None:  # every save is evaluated
        like = {f"eval_{key}": arguments.get(f"save_{key}", default) for key, default in _SAVES.items()}
        arguments = {**arguments, **(like if like["eval_strategy"] in ("steps", "epoch") else {})}
    try:
        return SFTConfig(**{**arguments, "remove_unused_columns": False})
    except (ValueError, TypeError, ImportError, OSError) as error:
        if "setup doesn't support bf16" in str(error):
            mend = "set sft.bf16=false (or leave it out) and leave tf32 out"
            sentence = f"this machine cannot compute in bf16 or tf32; {mend}."
            raise recipe.error(("sft", "bf16"), sentence) from error
        raise recipe.error(("sft",), f"trl.SFTConfig refuses `sft`: {one_line(error)}") from error


def _check_installed(recipe: Recipe, args: SFTConfig) -> None:
    """transformers asks for these packages when the weights are read already."""
    from transformers.integrations import integration_utils
    from transformers.utils import is_liger_kernel_available

    try:
        integration_utils.get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise recipe.error(("sft", "report_to"), f"`sft.report_to`: {one_line(error)}") from error
    for tracker in args.report_to:
        is_there = getattr(integration_utils, f"is_{tracker.removesuffix('_ml')}_available", lambda: True)
        if not is_there():
            mend = f"`pip install {tracker}`, or leave it out (sft.report_to=none)"
            sentence = f"`sft.report_to` names {tracker}, which is not installed; {mend}."
            raise recipe.error(("sft", "report_to"), sentence)
    if args.use_liger_kernel and not is_liger_kernel_available():
        mend = "`pip install liger-kernel`, or leave it out"
        sentence = f"`sft.use_liger_kernel` needs a package that is not installed; {mend}."
        raise recipe.error(("sft", "use_liger_kernel"), sentence)
    _check_optimizer(recipe, args)


def _check_optimizer(recipe: Recipe, args: SFTConfig) -> None:
    """Asks for the class of the optimizer, whose package the trainer would miss when the weights are read already."""
    import torch
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(args, typing.cast("Any", torch.nn.Linear(1, 1)))
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        if args.optim_target_modules and not isinstance(error, ImportError):
            return  # it looks for layers that this stand-in has not
        why = f"`sft.optim: {args.optim.value}` cannot be used here: {one_line(error).rstrip('.')}"
        raise recipe.error(("sft", "optim"), f"{why}; mend that, or use adamw_torch.") from error


def _check_schedule(recipe: Recipe, args: SFTConfig) -> None:
    """Makes the schedule for one number, because the trainer makes it when the weights are read already."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kwargs = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))
    except (ValueError, TypeError) as error:
        given = f"`sft.lr_scheduler_kwargs` {kwargs or 'left out'}: {one_line(error)}"
        sentence = f"the schedule {args.lr_scheduler_type.value} cannot be made with {given}"
        raise recipe.error(("sft", "lr_scheduler_type"), sentence) from error


def _check_types(recipe: Recipe, section: str, given: Options, hints: Json) -> None:
    """Checks the types of what a section hands on; the libraries' classes check none, and fail late or not at all.

    Their names were checked when the recipe was read (`passed_on`).
    """
    for key, value in given.items():
        if key not in hints:
            continue  # another version of the library, which refuses it in its own words
        try:
            adapter = TypeAdapter(hints[key], config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        except PydanticUserError:
            continue  # the field is itself a dataclass, which the library checks
        if key == "resume_from_checkpoint" and value is True:
            continue  # declared as a path, but `true` (the last checkpoint of output_dir) is what Trainer.train takes
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should be", "must be", 1)
            raise recipe.error((section, key), f'"{section}.{key}" {reason}, not {value!r}.') from error
