"""LoRA where it belongs: a recipe's `lora:` as PEFT's configuration, its targets rooted at the language model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..base.errors import UserError
from ..base.names import Options
from ..base.words import one_line
from ..model.freeze import part_modules
from ..recipe.libraries import OWN_LORA_KEYS, build_lora_config

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

# Initialisations that also change the base weights, which a bundle does not hold.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")


def lora_config(recipe: Recipe, model: nn.Module) -> LoraConfig | None:
    """The recipe's `lora:` as PEFT's own configuration, with its targets rooted at the language model.

    Without `target_modules`, every linear layer of the language model is adapted. Names given as a list are looked for
    inside the language model; a regular expression (a string) is passed on as it is. The fused weights of a mixture's
    experts are no linear layers, and adapted where `target_parameters` names them.

    Raises:
        UserError: A name or expression matches nothing, or an option cannot be kept in a bundle.
    """
    if build_lora_config(recipe) is None:  # says which key is wrong, and where
        return None
    options = {key: value for key, value in (recipe.lora or {}).items() if key not in OWN_LORA_KEYS}
    _refuse_what_is_not_lora(options)
    targets = options.get("target_modules")
    if experts := options.get("target_parameters"):
        options["target_parameters"] = _experts(model, experts)
    if isinstance(targets, str) and targets != "all-linear":
        _check_expression(model, targets)
    elif not (experts and targets == []):  # an empty list: the experts alone
        names = targets if isinstance(targets, list) else None
        whole = options.get("layers_to_transform") is not None  # PEFT takes no expression then
        options["target_modules"] = _root_targets(model, names, whole)
    options.setdefault("task_type", "CAUSAL_LM")
    if words := (recipe.lora or {}).get("add_tokens"):
        options["trainable_token_indices"] = _new_rows(model, len(words))
    config = LoraConfig(**options)
    _check_rank(config, model)
    return config


def _check_rank(config: LoraConfig, model: nn.Module) -> None:
    """A rank beyond every layer's width adapts nothing more, and asks for memory without bound."""
    ranks = [rank for rank in (config.r, *(config.rank_pattern or {}).values()) if isinstance(rank, int)]
    # Quantised weights are flat, and say their shape as attributes.
    shapes = [(m.in_features, m.out_features) if hasattr(m, "in_features") else m.weight.shape
              for m in model.modules() if _is_linear(m)]  # fmt: skip
    widest = max(map(max, shapes), default=0)
    if widest and (most := max(ranks)) > widest:
        raise UserError(f"lora.r: the rank {most:,} is above {widest:,}, the width of the widest layer; lower it.")


def add_empty_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`add_adapter` without memory for the adapter's own tensors: they lie on the meta device."""
    return add_adapter(model, config, low_cpu_mem_usage=True)


def _new_rows(model: nn.Module, count: int) -> dict[str, list[int]]:
    """Whole name of a table → the rows of the last so many words; a tied head follows the embeddings by itself."""
    core = model
    tables = [core.get_input_embeddings()]
    if (head := core.get_output_embeddings()).weight is not tables[0].weight:
        tables.append(head)
    names = {id(module): name for name, module in core.named_modules()}
    return {names[id(table)]: core.word_ids[-count:] for table in tables}


def try_adapter(recipe: Recipe, model: nn.Module) -> LoraConfig | None:
    """Puts the recipe's LoRA into a model without weights, so that what PEFT refuses is said before any is read.

    Args:
        recipe: A validated recipe.
        model: On the meta device; it is used up.

    Returns:
        What `lora_config` gives.

    Raises:
        UserError: PEFT refuses it, or it matches nothing.
    """
    config = lora_config(recipe, model)
    if config is None:
        return None
    try:
        add_adapter(model, copy.deepcopy(config))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{recipe.where(('lora',))}: PEFT cannot put `lora` into this model: {one_line(error).rstrip('.')}."
        ) from error
    except (RuntimeError, AttributeError):  # an initialisation that needs weights
        pass
    return config


def add_adapter(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """`get_peft_model` for a stack whose language model alone may be quantised.

    PEFT asks the model, not the layer, whether it is quantised. Only while the adapter is put in may the model say yes:
    TRL would cast every trained parameter to bf16, the fp32 projector among them, of a model that says so later.
    """
    with _saying_its_bits(model):
        return get_peft_model(model, config, **options)


def add_further_adapter(model: PeftModel, config: PeftConfig, name: str) -> None:
    """Puts one more adapter beside those of a model, whose active one stays active."""
    with _saying_its_bits(model.get_base_model()):
        model.add_adapter(name, config)


@contextmanager
def _saying_its_bits(model: nn.Module) -> Iterator[None]:
    kinds = {type(module).__name__ for module in model.modules()}
    marks = {"is_loaded_in_4bit": "Linear4bit" in kinds, "is_loaded_in_8bit": "Linear8bitLt" in kinds}
    for name, value in marks.items():
        setattr(model, name, value)
    try:
        yield
    finally:
        for name in marks:
            delattr(model, name)


def _refuse_what_is_not_lora(options: Options) -> None:
    """Only the freeze plan says what is trained beside LoRA: PEFT's own ways would be frozen again, without a word."""
    if options.get("bias", "none") != "none":
        raise UserError("lora.bias must be none: biases are trained with their part, by naming the part under `train`.")
    for key, words in (("modules_to_save", ""), ("trainable_token_indices", " (new words: `lora.add_tokens`)")):
        if options.get(key):
            instead = f"what is trained beside LoRA is said under `train`{words}"
            raise UserError(f"lora.{key} cannot be used: {instead}; remove it.")
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"lora.init_lora_weights: {start!r} also changes the base weights (or needs data before the first step), "
            f"which a bundle does not keep; use true, gaussian or orthogonal."
        )


def _check_expression(model: nn.Module, pattern: str) -> None:
    """A regular expression in `lora.target_modules` must match something, and nothing that TRL refuses."""
    try:
        matched = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"lora.target_modules: {pattern!r} is no regular expression ({error}).") from error
    if not matched:
        raise UserError(
            f"lora.target_modules: the expression {pattern!r} matches no module of the model; it must match whole "
            f"names like 'model.language_model.layers.0.self_attn.q_proj'. A list of last names needs no expression."
        )
    if "lm_head" in matched:
        raise UserError(f"lora.target_modules: {pattern!r} matches lm_head, which cannot be adapted; exclude it.")


def _root_targets(model: nn.Module, names: list[str] | None, whole: bool = False) -> str | list[str]:
    """Names of linear layers → one expression that finds them in the language model alone (or their whole names)."""
    whole_root = part_modules(model)["language_model"][0]
    root, inside = whole_root.rsplit(".", 1)[-1], whole_root + "."
    linears = [n.removeprefix(inside) for n, m in model.named_modules() if n.startswith(inside) and _is_linear(m)]
    linears = [name for name in linears if name != "lm_head"]  # inside it in KOSMOS-2; TRL refuses LoRA on a head
    known = sorted({_last(linear) for linear in linears})
    names = known if names is None else names
    if not names:
        there = ", ".join(known) or "no linear"
        raise UserError(f"lora.target_modules names no layer; the language model has {there}.")
    for name in names:
        if not any(linear == name or linear.endswith("." + name) for linear in linears):
            raise UserError(
                f"lora.target_modules: {name!r} matches no linear layer of the language model ({', '.join(known)})."
            )
    if whole:
        chosen = [n for n in linears if any(n == name or n.endswith("." + name) for name in names)]
        return [f"{root}.{name}" for name in chosen]
    pattern = "|".join(re.escape(name) for name in names)
    return rf"(?:.*\.)?{root}\.(?:.*\.)?(?:{pattern})"


def _experts(model: nn.Module, names: list[str]) -> list[str]:
    """Names of fused weights → whole names of those of experts in the language model, three axes each.

    Raises:
        UserError: One matches none, or they have few bits.
    """
    inside = part_modules(model)["language_model"][0] + "."
    there = {name: weight for name, weight in model.named_parameters() if name.startswith(inside) and weight.dim() == 3}
    known = ", ".join(sorted({".".join(name.rsplit(".", 2)[-2:]) for name in there}))
    has = f"it has {known}" if known else "it has none: linear layers are named in `lora.target_modules`"
    found: list[str] = []
    for name in names:
        matched = [whole for whole in there if whole.endswith("." + name)]
        if not matched:
            raise UserError(f"lora.target_parameters: {name!r} matches no experts of the language model; {has}.")
        if not all(there[whole].is_floating_point() for whole in matched):
            raise UserError(f"lora.target_parameters: {name!r} has few bits, beside which LoRA is not put; remove it.")
        found += matched
    return sorted(set(found))


def _last(name: str) -> str:
    """The last name of a layer; with the one before it where it is a number in a list, as layers have them too."""
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def _is_linear(module: nn.Module) -> bool:
    # GPT-2 calls its linear layers Conv1D; Llama 4's routers are linear layers that give more than one does.
    plain = isinstance(module, nn.Linear) and type(module).__name__ != "Llama4Router"
    return plain or type(module).__name__ in ("Linear4bit", "Linear8bitLt", "Conv1D")
