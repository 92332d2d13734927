"""What vLLM takes of a composed stack: names of tensors, pieces and prompts, as its release 0.33.0 has them."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils.chat_template_utils import render_jinja_template

from ..base.errors import UserError
from ..batch.processor import VLMProcessor
from ..model.modeling import VLMForConditionalGeneration
from .check import QUESTION
from .native_model import renamed, to_causal_lm
from .native_processor import native_template

# Names in memory → the names that llava-hf publishes and vLLM reads.
NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# Model types of the towers that its `init_vision_tower_for_llava` builds, and the activations of its `get_act_fn`.
TOWERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = (
    *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"),
    *("relu", "relu2", "sigmoid", "silu", "swish", "tanh"),
)
KEPT = "vLLM cannot take this adapter unmerged: {}; leave --keep-adapter out, which merges it."
REFUSED = "vLLM cannot take this bundle: {}; use --to transformers."


def check_stack(form: str, model: VLMForConditionalGeneration, processor: VLMProcessor) -> None:
    """Refuses what vLLM's class for a native form cannot hold or would prompt otherwise.

    Args:
        form: What `native_form` gave.
        model: The stack; its adapters may be in it.
        processor: Its processor.

    Raises:
        UserError: vLLM cannot take it; the message says what stands in the way.
    """
    if form == "instructblip":
        raise UserError("vLLM has no class for InstructBLIP; use --to transformers.")
    if processor.answer_start is not None:
        raise UserError(REFUSED.format("its BLIP-2 has a language model without an encoder, like OPT"))
    causal = to_causal_lm(model)
    if (prefix := causal.base_model_prefix) != "model":
        name = type(causal).__name__
        raise UserError(REFUSED.format(f"it looks for layers in a `model`, and {name} has them in a `{prefix}`"))
    if form == "blip-2":
        _check_prompt(processor)
        return
    config = model.config
    if form == "llava_next":
        raise UserError(REFUSED.format("it cuts tiles, and what vLLM makes of them was never compared"))
    if (tower := config.tower.model_type) not in TOWERS:
        raise UserError(REFUSED.format(f"its LLaVA has a CLIP or a SigLIP as its vision tower, this is a {tower!r}"))
    if (activation := (config.projector_options or {})["activation"]) not in ACTIVATIONS:
        raise UserError(REFUSED.format(f"it has no activation {activation!r} for the projector"))


def check_adapter(form: str, model: PeftModel) -> None:
    """Refuses an adapter that vLLM's loader does not take, or takes for another one.

    It reads `adapter_model.safetensors` with the beginnings of names mapped as those of the base (a name of `NAMES`
    becomes vLLM's), of `adapter_config.json` `r`, `lora_alpha` and what single layers have in their place
    (`rank_pattern`, `alpha_pattern`, by PEFT's own rule), and puts LoRA into a language model.

    Args:
        form: What `native_form` gave, or an existing VLM's model type.
        model: The bundle's model with its adapter.

    Raises:
        UserError: It is refused; the message says why.
    """
    if form != "llava":
        raise UserError(KEPT.format(f"the names of a {form}'s layers were never compared with vLLM's"))
    config = model.peft_config["default"]
    said = {
        "DoRA": config.use_dora,
        "rows of new tokens (lora.add_tokens)": config.trainable_token_indices,
        "parts trained whole by PEFT (modules_to_save)": config.modules_to_save,
        "trained biases (bias)": config.bias != "none",
    }
    for what, given in said.items():
        if given:
            raise UserError(KEPT.format(f"its loader knows no {what}"))
    inner = "base_model.model.model.language_model."
    for name, _ in model.named_parameters():
        if ".lora_" in name and not name.startswith(inner):
            layer = name.split(".lora_")[0].removeprefix("base_model.model.")
            raise UserError(KEPT.format(f"it puts LoRA into language models, and this one is in {layer!r} too"))


def most_ranks(model: PeftModel) -> int:
    """The largest rank of an adapter's layers, which vLLM asks for when it starts (`--max-lora-rank`)."""
    config = model.peft_config["default"]
    return max([config.r, *(config.rank_pattern or {}).values()])


def _check_prompt(processor: VLMProcessor) -> None:
    """Refuses prompts, as servers render them, that do not begin with the image."""
    template, tokenizer = native_template(processor), processor.tokenizer
    options = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    options |= {"add_generation_prompt": True}
    ((whole,), _), ((bare,), _) = (
        render_jinja_template([QUESTION[:1]], chat_template=source, **options)
        for source in (template, without_images(template))
    )
    if whole != processor.image_token + bare:
        raise UserError(
            "vLLM puts the image of a BLIP-2 in front of the whole prompt, and this bundle's prompts do not begin with "
            "{{ image_token }}; use --to transformers, or train with a template that begins with the image (blip2_vqa)."
        )


def without_images(template: str) -> str:
    """A chat template that prints no placeholder: vLLM adds those of a BLIP-2 to whatever a template prints."""
    return "{%- set image_token = '' -%}" + template


def named_tensors(native: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a native LLaVA or BLIP-2 under the names that vLLM's loader reads; tied ones once."""
    names = NAMES if native.config.model_type == "llava" else {}
    tied = set(getattr(native, "all_tied_weights_keys", {})) if native.config.tie_word_embeddings else set()
    return {renamed(name, names): p.detach() for name, p in native.state_dict().items() if name not in tied}
