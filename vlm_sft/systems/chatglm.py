"""ChatGLM-6B, first generation: the language model of VisualGLM-6B, with the names of its checkpoints.

Du et al. 2022 (GLM, arXiv 2103.10360). A prompt is read in both directions, up to `<sop>`; what follows sees itself
only backwards. Upstream: THUDM's `modeling_chatglm.py`. transformers has later generations alone (`glm`, `glm4`).

Legend of shapes: B rows, S tokens, D width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..base.names import Options
from .chatglm_layers import ChatGLMAttention, ChatGLMBlock, ChatGLMConfig, rotations


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Common base: names and abilities. Flash attention is none of them: it has no mask for prompts."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    # VisualGLM's image path lies in the same checkpoint; the rates of the rotations are computed.
    _keys_to_ignore_on_load_unexpected = [r"^image_encoder\.", r"rotary_emb\.inv_freq$"]


class ChatGLMModel(ChatGLMPreTrainedModel):
    """ChatGLM without its head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings."""
        self.word_embeddings = value

    def positions_of(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Positions of tokens, which depend on where the prompt of a row ends.

        Both of a token's numbers grow by one with each token that is generated, as transformers lets them. What
        upstream calls the position of a token (which stands still from `<sop>` on, at the place of `[gMASK]`) is the
        difference of the two.

        Args:
            input_ids: (B, S). A prompt ends before its first `<sop>`; a row without one is a prompt as a whole.
            attention_mask: (B, S), 0 for padding; None for tokens alone.
            rows: (B, S) the number, from zero, of the row that a token belongs to, where rows are packed.

        Returns:
            (2, B, S): the place of a token in its row, and how far behind the end of its prompt it is (0 inside).
        """
        config, length = self.config, input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        rows = torch.zeros_like(input_ids) if rows is None else rows
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()

        def first(found: torch.Tensor) -> torch.Tensor:
            """(B, S) the first place in the row of each token where something was found; `length` where nothing was."""
            table = places.new_full((len(input_ids), length + 1), length)
            where = torch.where(found & real, places, length)
            return table.scatter_reduce(1, rows, where, "amin").gather(1, rows)

        start, end = first(real), first(input_ids == config.bos_token_id)
        mark = first(input_ids == config.gmask_token_id)
        mark = torch.where(mark < length, mark, first(input_ids == config.mask_token_id))
        behind = (places - end + 1).clamp(min=0) * real
        # A prompt that names no place to fill goes on from its last token.
        still = torch.where(mark < length, mark, end - 1) - start
        place = torch.where(behind > 0, still + behind, places - start)
        return torch.stack([place.clamp(min=0) * real, behind])

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S'), 1 for tokens and 0 for padding, those in the cache included; or a whole mask.
            position_ids: (2, B, S) as `positions_of` gives them; None to ask it for those of `input_ids`.
            past_key_values: Cache of earlier tokens; prompts go into it as a whole.
            inputs_embeds: (B, S, D) in place of `input_ids`.
            use_cache: Whether to make a cache where none is given.
            **kwargs: Passed on to the attention.

        Raises:
            ValueError: Not one of ids and embeddings is given, or no positions where the ids do not tell them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None and input_ids is not None and not past:
            position_ids = self.positions_of(input_ids, attention_mask)
        if position_ids is None or position_ids.dim() != 3:
            raise ValueError(
                "ChatGLM's positions depend on where the prompt ends: give position_ids as `positions_of` makes them "
                "of the ids."
            )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Tokens of one block see each other; a prompt is one, and nothing else is in any.
            block_sequence_ids=None if past else torch.where(position_ids[1] == 0, 0, -1),
        )
        hidden = inputs_embeds
        turns = rotations(
            torch.stack([position_ids[0] - position_ids[1], position_ids[1]]), self.layers[0].attention.head_dim,
            hidden.dtype,
        )  # fmt: skip
        for layer in self.layers:
            hidden = layer(
                hidden, position_embeddings=turns, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), past_key_values=past_key_values)


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its head, under the name of transformers' language models."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: Options) -> torch.Tensor:
        """Of ids; without them, forward says that positions are needed."""
        if inputs_tensor.dim() != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return self.transformer.positions_of(inputs_tensor, model_kwargs.get("attention_mask"))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the model; see `ChatGLMModel.forward`.

        Args:
            input_ids: As there.
            labels: (B, S), -100 where nothing is learned; position s is scored by the output at s - 1.
            logits_to_keep: Number of last positions to score, or their indices; 0 for all.
            attention_mask: As there, like the next three.
            position_ids: As above.
            past_key_values: As above.
            inputs_embeds: As above.
            **kwargs: Passed on.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig)
AutoModel.register(ChatGLMConfig, ChatGLMModel)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM)
