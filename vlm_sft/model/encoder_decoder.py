"""Language models that read their prompt by an encoder and write their answer by a decoder (FlanT5).

Legend of shapes: as in `modeling`, and L tokens of an answer, with the one that every answer begins behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

# Others put a bias behind their head (BART), want to be told a language (mBART, NLLB), or no row of padding (LongT5).
ENCODER_DECODERS = ("t5", "mt5")
# transformers' configurations of them say "tied" whatever the checkpoint has; this setting, which is ours, says it.
OWN_HEAD = "has_own_head"


def reads_by_encoder(config: PreTrainedConfig) -> bool:
    """Whether a language model has an encoder for its prompt."""
    return config.model_type in ENCODER_DECODERS


def answer_start_of(config: PreTrainedConfig) -> int | None:
    """The id that every answer of an encoder–decoder begins behind; None for other language models."""
    if not reads_by_encoder(config):
        return None
    start = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id or 0) if start is None else int(start)


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """transformers' class of all language models of this kind."""
    return AutoModelForSeq2SeqLM if reads_by_encoder(config) else AutoModelForCausalLM


def is_language_model(config: PreTrainedConfig) -> bool:
    """Whether a stack can have such a model as its language model."""
    return type(config) in auto_class(config)._model_mapping


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether the head of a language model is its table of embeddings."""
    return bool(config.tie_word_embeddings) and not getattr(config, OWN_HEAD, False)


def made_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a configuration, with random weights."""
    return untie(auto_class(config).from_config(config))


def untie(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a model a head of its own, where its configuration says `OWN_HEAD` and transformers tied it."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, OWN_HEAD, False) and head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone())
    return model


def core_of(model: PreTrainedModel) -> PreTrainedModel:
    """A language model without its head, the weights shared: what a stack calls."""
    if not reads_by_encoder(model.config):
        return model.base_model
    with torch.device("meta"):
        core = AutoModel.from_config(model.config)
    core.encoder, core.decoder, core.config = model.encoder, model.decoder, model.config
    core.set_input_embeddings(model.get_input_embeddings())  # one table in three places, which may be replaced
    return core


def with_head(core: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """The language model that `core_of` took the head from, the weights shared."""
    with torch.device("meta"):
        model = auto_class(core.config).from_config(core.config)
    if reads_by_encoder(core.config):
        model.encoder, model.decoder = core.encoder, core.decoder
        model.set_input_embeddings(core.get_input_embeddings())
    else:
        setattr(model, model.base_model_prefix, core)
    model.set_output_embeddings(head)
    return model


def behind_encoder(
    core: PreTrainedModel,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    row_lengths: torch.Tensor | None,
    decoder_input_ids: torch.Tensor | None = None,
    encoder_outputs: BaseModelOutput | None = None,
    past_key_values: Cache | None = None,
    **options: Any,
) -> BaseModelOutputWithPast:
    """Reads prompts by the encoder and answers by the decoder: (B, L, D), of the answers alone.

    Args:
        core: What `core_of` gave.
        inputs_embeds: (B, S, D) the prompts, image features in place.
        attention_mask: (B, S), 0 for padding, which may stand on either side.
        row_lengths: None: the encoder reads a row whole, and packed rows would see each other.
        decoder_input_ids: (B, L) the token that every answer begins behind, and the answer without its last.
        encoder_outputs: What the encoder made of the prompts, in place of them.
        past_key_values: Cache of earlier tokens of the answers.
        **options: Passed on.

    Raises:
        ValueError: There is no answer to read, or rows are packed.
    """
    if decoder_input_ids is None:
        raise ValueError("An encoder–decoder needs decoder_input_ids: what stands before each label.")
    if row_lengths is not None:
        raise ValueError("An encoder reads a row whole: rows can be neither packed nor share a prefix.")
    found = core(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        encoder_outputs=encoder_outputs,
        past_key_values=past_key_values,
        **options,
    )
    return BaseModelOutputWithPast(
        last_hidden_state=found.last_hidden_state,
        past_key_values=found.past_key_values,
        hidden_states=found.decoder_hidden_states,
        attentions=found.decoder_attentions,
    )
