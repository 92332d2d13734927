"""The native class of transformers that a composed stack equals: what `export` writes.

A stack has a native form only where the class computes the same; what it cannot express is refused in one sentence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from ..base.errors import UserError
from ..base.names import Options
from ..batch.processor import VLMProcessor
from ..inference.settings import generation_options
from ..model.configuration import count_patches, image_size_of
from ..model.encoder_decoder import with_head
from ..model.modeling import VLMForConditionalGeneration
from ..stack.vocabulary import grow_vocabulary

NO_FORM = "This bundle has no native form in transformers: {}; use --to bundle-merged, or load it with vlm_sft."
# Resampler → model type, name, and the towers that its class holds (the two ViTs compute the same).
BLIP_FORMS = {
    "qformer": ("blip-2", "BLIP-2", ("blip_2_vision_model",)),
    "instruct_qformer": ("instructblip", "InstructBLIP", ("instructblip_vision_model", "blip_2_vision_model")),
}
# Without tiles and with those of anyres: model type → classes.
LLAVA_FORMS: dict[str, tuple[type[Any], type[Any]]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
# What some language models put after their head, which LLaVA's class leaves out.
SCALINGS = ("logit_scale", "logits_scaling", "final_logit_softcapping")


def native_form(model: VLMForConditionalGeneration) -> str:
    """`llava`, `llava_next`, `blip-2` or `instructblip`: the model type that a stack can be exported as.

    Raises:
        UserError: There is none; the message says what stands in the way.
    """
    config = model.config
    text = model.model.language_model.config
    if not type(text).__module__.startswith("transformers."):
        raise UserError(NO_FORM.format(f"its language model ({text.model_type}) is none of transformers' own"))
    if (projector := config.projector_type).startswith("pixel_shuffle"):
        raise UserError(NO_FORM.format(f"no class has a {projector} projector in front of any language model"))
    if config.tiles is not None and config.tiles["type"] == "dynamic":
        raise UserError(NO_FORM.format("the classes that export knows do not cut an image into `dynamic` tiles"))
    if config.resampler_type:
        if config.resampler_type not in BLIP_FORMS:
            raise UserError(NO_FORM.format(f"no class has a resampler of the type {config.resampler_type}"))
        form, name, towers = BLIP_FORMS[config.resampler_type]
        _refuse_blip(model, name, towers)
        return form
    if config.is_encoder_decoder:
        raise UserError(NO_FORM.format(f"LLaVA's class has no encoder for a prompt, as {text.model_type!r} has one"))
    if config.projector_type != "mlp" or (config.projector_options or {})["depth"] != 2:
        raise UserError(NO_FORM.format("without a resampler, LLaVA's projector is an mlp of depth 2, and this is not"))
    if type(config.tower) not in AutoModel._model_mapping:
        raise UserError(NO_FORM.format(f"LLaVA's class cannot hold a {config.tower.model_type!r} as its vision tower"))
    head = model.lm_head
    if any(getattr(text, name, None) for name in SCALINGS) or getattr(head, "bias", None) is not None:
        raise UserError(NO_FORM.format(f"LLaVA's class leaves out what {text.model_type!r} does after its head"))
    table = model.get_input_embeddings()
    if getattr(table, "original_module", table).embedding_dim != text.hidden_size:
        raise UserError(NO_FORM.format("its language model embeds narrower than it computes"))
    llava_features(model)
    return "llava" if config.tiles is None else "llava_next"


def _refuse_blip(model: VLMForConditionalGeneration, name: str, towers: tuple[str, ...]) -> None:
    config = model.config
    if (tower := config.tower.model_type) not in towers:
        raise UserError(NO_FORM.format(f"a Q-Former behind a {tower!r}, where {name}'s class has its own ViT"))
    if config.projector_type != "linear":
        raise UserError(NO_FORM.format(f"{name}'s projector is linear, this one is {config.projector_type}"))
    if (config.vision_feature_layer, config.vision_feature_select) != (-1, "full"):
        raise UserError(NO_FORM.format(f"{name}'s class reads every token after the ViT's last norm, this does not"))
    # LAVIS has another epsilon in the last norm than in the layers; these classes have one for all.
    wanted = config.tower.layer_norm_eps
    for place, module in model.model.vision_tower.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != wanted:
            what = f"{place} of its ViT has the epsilon {module.eps:g}, {name}'s class {wanted:g} throughout"
            raise UserError(NO_FORM.format(what))


@torch.no_grad()
def llava_features(model: VLMForConditionalGeneration) -> tuple[str, int]:
    """LLaVA's `vision_feature_select_strategy` and how many tokens stand before the patches."""
    config = model.config
    tower, layer = model.model.vision_tower, config.vision_feature_layer
    height, width = image_size_of(config.tower)
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(tower.device, tower.dtype)
    output = tower(pixels, output_hidden_states=True)
    if layer == -1 and not torch.equal(output.hidden_states[-1], output.last_hidden_state):
        what = "feature_layer -1 is read after the tower's last norm here, and before it by LLaVA's class"
        raise UserError(NO_FORM.format(f"{what} (train with feature_layer -2, as LLaVA does, to have one)"))
    extra = output.hidden_states[layer].shape[1] - count_patches(config.tower, height, width)
    if config.vision_feature_select == "patch" and extra > 1:
        raise UserError(NO_FORM.format(f"LLaVA's class drops one token before the patches, this tower has {extra}"))
    return ("default" if config.vision_feature_select == "patch" and extra == 1 else "full"), extra


def to_causal_lm(model: VLMForConditionalGeneration) -> PreTrainedModel:
    """The language model of a stack with its head, as the class it was loaded from; the weights are shared."""
    base = model.model.language_model
    causal = with_head(base, model.lm_head)
    causal.generation_config = model.generation_config
    return causal


def native_model(
    model: VLMForConditionalGeneration, processor: VLMProcessor, generation: Options | None = None
) -> PreTrainedModel:
    """A stack, its adapters merged, as a native class of transformers; the weights are shared, so it is used up.

    Raises:
        UserError: It has no native form.
    """
    form = native_form(model)
    features = llava_features(model) if form in LLAVA_FORMS else None
    ends = native_generation(model, processor, generation or {})
    grow_vocabulary(model, len(processor.tokenizer))
    text = model.model.language_model.config
    # BLIP's classes generate by its language model, which only knows its own configuration.
    text.eos_token_id, text.pad_token_id = ends.eos_token_id, processor.tokenizer.pad_token_id
    if processor.answer_start is not None:
        text.decoder_start_token_id = processor.answer_start
    text.architectures = [type(to_causal_lm(model)).__name__]  # vLLM asks for it
    native = _as_llava(model, processor, form, features[0]) if features else _as_blip(model, processor, form)
    native.generation_config = ends
    native.config.architectures = [type(native).__name__]
    return native.eval()


def _as_llava(model: VLMForConditionalGeneration, processor: VLMProcessor, form: str, strategy: str) -> PreTrainedModel:
    config, (config_class, model_class) = model.config, LLAVA_FORMS[form]
    text = model.model.language_model.config
    if text.tie_word_embeddings and not hasattr(model.model.language_model, "embed_tokens"):
        # LLaVA's class looks for the tied embeddings there; OPT and GPT-2 have them elsewhere.
        text.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
    tiles = {} if config.tiles is None else {"image_grid_pinpoints": config.tiles["grids"]}
    made = config_class(
        vision_config=config.tower,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        projector_hidden_act=(config.projector_options or {})["activation"],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
        **tiles,
    )
    with torch.device("meta"):
        native = model_class(made)
    native.model.vision_tower = model.model.vision_tower
    native.model.language_model = model.model.language_model
    native.model.multi_modal_projector.linear_1 = model.model.projector.layers[0]
    native.model.multi_modal_projector.linear_2 = model.model.projector.layers[1]
    native.lm_head = model.lm_head
    if tiles:
        native.model.image_newline = model.model.projector.layout.newline
    return native


def _as_blip(model: VLMForConditionalGeneration, processor: VLMProcessor, form: str) -> PreTrainedModel:
    config = model.config
    shared = {
        "qformer_config": config.resampler_config,
        "text_config": model.model.language_model.config,
        "num_query_tokens": config.num_query_tokens,
        "image_token_index": processor.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    with torch.device("meta"):
        if form == "blip-2":
            native = Blip2ForConditionalGeneration(Blip2Config(vision_config=config.tower, **shared))
        else:
            vision = {k: v for k, v in config.tower.to_dict().items() if k not in ("model_type", "architectures")}
            made = InstructBlipConfig(vision_config=InstructBlipVisionConfig(**vision), **shared)
            native = InstructBlipForConditionalGeneration(made)
    native.vision_model = model.model.vision_tower
    resampler: Any = model.model.resampler
    native.query_tokens, native.qformer = resampler.query_tokens, resampler.qformer
    native.language_projection = model.model.projector.linear
    native.language_model = to_causal_lm(model)
    return native


def native_generation(model: PreTrainedModel, processor: VLMProcessor, options: Options) -> GenerationConfig:
    """The recipe's generation settings over the model's own, with the ids at which an answer ends."""
    settings = generation_options(model, processor, options)
    tokenizer = processor.tokenizer
    ends = set(settings.pop("eos_token_id") or [])
    settings.pop("tokenizer", None)
    for text in settings.pop("stop_strings", None) or []:  # `generate` takes these only together with a tokenizer
        if len(ids := tokenizer(text, add_special_tokens=False).input_ids) == 1:
            ends.add(ids[0])
    config = copy.deepcopy(model.generation_config)  # the model's own may say more, for instance a penalty
    config.update(**settings, eos_token_id=sorted(ends) or None, bos_token_id=tokenizer.bos_token_id)
    config._from_model_config = False  # where it is true, transformers may take the model's configuration instead
    return config


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with another beginning, where it has one of those given."""
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
