"""The composed model: vision tower → resampler → projector → language model, as one `PreTrainedModel`.

Legend of shapes: B rows, S tokens a row, N images of the whole batch (rows share one flat list, in reading order),
T image tokens an image, D width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from ..base.names import INSTRUCTION
from .answering import Answering
from .configuration import VLMConfig, blank_size
from .encoder_decoder import behind_encoder, core_of, is_tied
from .losses import Head, VLMOutput, add_balance, mean_loss, router_flag
from .parts import Cached, Parts, mark_initialised, parts_from_config
from .positions import ExactRotations, kept_apart, own_positions
from .sharding import others_wait_for
from .towers import keep_all_patches, resample, see


class VLMPreTrainedModel(ExactRotations, PreTrainedModel):
    """Common base: names, abilities, and an initialisation that leaves the pieces alone."""

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["resampler"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Only the learned queries: projectors keep torch's own initialisation, the pieces have theirs."""
        if (queries := getattr(module, "query_tokens", None)) is not None:
            nn.init.normal_(queries, std=0.02)


class VLMModel(VLMPreTrainedModel):
    """The composed model without its head.

    Args:
        config: Configuration.
        parts: Loaded parts; None makes all of them from the configuration, with random weights.
    """

    def __init__(self, config: VLMConfig, parts: Parts | None = None) -> None:
        super().__init__(config)
        parts = parts or parts_from_config(config)
        self.vision_tower = keep_all_patches(parts.vision_tower)
        self.resampler = parts.resampler
        self.projector = parts.projector
        self.language_model = core_of(parts.causal_lm)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> VLMModel:
        """Training mode for what is trained; the frozen image path stays in evaluation mode.

        A frozen Q-Former would otherwise drop 10 % of its activations at random (MiniGPT-4 and LAVIS set it to
        evaluation mode for the same reason).
        """
        super().train(mode)
        for part in (self.vision_tower, self.resampler):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def encode_images(self, pixel_values: torch.Tensor, **instruction: torch.Tensor | None) -> torch.Tensor:
        """Vision tower and resampler: (N, 3, H, W) → (N, T before a folding projector, V or R).

        Args:
            pixel_values: Images.
            **instruction: `INSTRUCTION`, for a resampler that reads it; others ignore it.

        Raises:
            ValueError: The resampler reads the instruction and there is none, or not one for each image.
        """
        features = see(self.vision_tower, self.config, pixel_values)
        return features if self.resampler is None else resample(self.resampler, features, **instruction)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **instruction: torch.Tensor | None,
    ) -> torch.Tensor:
        """The whole image path: (N, 3, H, W) → (N, T, D); see `encode_images` for the instruction.

        `image_features` in place of pixels are (N, T, W): what comes out of the last part that is `Cached`.
        """
        if image_features is None:
            assert pixel_values is not None
            image_features = self.encode_images(pixel_values, **instruction)
        elif self.resampler is not None and not isinstance(self.resampler, Cached):
            image_features = resample(self.resampler, image_features, **instruction)
        return self.projector(image_features.to(next(self.projector.parameters()).dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_token_count: int | None = None,
        row_lengths: torch.Tensor | None = None,
        row_heads: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Puts the image features where the image tokens stand and runs the language model.

        Args:
            input_ids: (B, S) token ids; `config.image_token_id` marks the places of the image features.
            pixel_values: (N, 3, H, W) images of all rows, in reading order; None for text alone.
            attention_mask: (B, S), 1 for tokens and 0 for padding.
            position_ids: (B, S), or as `own_positions` gives them; None leaves them to the model.
            past_key_values, inputs_embeds: Cache of earlier tokens; (B, S, D) in place of `input_ids` and images.
            qformer_input_ids, qformer_attention_mask: (N, L) the instruction of each image, for a resampler.
            image_token_count: How often the image token stands in `input_ids`; None to count, which the host waits for.
            row_lengths, row_heads: (B, R) in place of mask and positions, where rows are packed; see `kept_apart`.
            image_features, image_sizes: See `get_image_features`; (I, 2) pixels of images whose tiles are laid out.
            encoder_outputs: What an encoder made of the prompt, in place of ids; see `behind_encoder`.
            **kwargs: Passed on to the language model.

        Raises:
            ValueError: The number of image tokens is not the number of image features.
        """
        if inputs_embeds is None and encoder_outputs is None:
            if input_ids is None:
                raise ValueError("Give input_ids or inputs_embeds.")
            given = dict(zip(INSTRUCTION, (qformer_input_ids, qformer_attention_mask), strict=True))
            given |= {"image_features": image_features, "image_sizes": image_sizes}
            inputs_embeds = self.embed(input_ids, pixel_values, image_token_count, **given)
        elif pixel_values is not None:
            raise ValueError("Give the images with input_ids: inputs_embeds leaves no place to put them.")
        lm = self.language_model
        if self.config.is_encoder_decoder:
            kwargs |= {"encoder_outputs": encoder_outputs, "past_key_values": past_key_values}
            return behind_encoder(lm, inputs_embeds, attention_mask, row_lengths, **kwargs)
        assert inputs_embeds is not None
        if input_ids is not None and position_ids is None and past_key_values is None:
            position_ids = own_positions(lm, input_ids, attention_mask, row_lengths)
        if row_lengths is not None:
            attention_mask, position_ids = kept_apart(lm, inputs_embeds, row_lengths, position_ids, row_heads)
        return lm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs | router_flag(lm, self.training),
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_token_count: int | None = None,
        image_sizes: torch.Tensor | None = None,
        **given: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, S) ids and (N, 3, H, W) images → (B, S, D) embeddings with the image features in place.

        A batch without images still runs the image path once, with weight zero, where other processes wait for it.
        """
        table, image_mask = self.get_input_embeddings(), input_ids == self.config.image_token_id
        # The placeholder and a pad token may lie beyond the matrix (which PEFT may wrap); neither is looked at.
        rows = getattr(table, "original_module", table).num_embeddings
        embeds = table(torch.where(image_mask | (input_ids >= rows), 0, input_ids))
        tokens = int(image_mask.sum()) if image_token_count is None else image_token_count
        if pixel_values is None and given.get("image_features") is None:
            self._check_image_count(tokens, 0)
            parts = (part for part in (self.vision_tower, self.resampler, self.projector) if part is not None)
            path = (p for part in parts for p in part.parameters())
            return embeds + self._zero_from_image_path(embeds) if others_wait_for(path, self.training) else embeds
        features = self._as_tokens(self.get_image_features(pixel_values, **given), image_sizes)
        features = features.to(embeds.device, embeds.dtype)
        self._check_image_count(tokens, len(features))
        return embeds.masked_scatter(image_mask.unsqueeze(-1), features)

    def _as_tokens(self, features: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        """(N, T, D) → (tokens of all images, D); see `TileLayout`."""
        layout = getattr(self.projector, "layout", None)
        return features.flatten(0, 1) if layout is None else layout(features, image_sizes)

    def _zero_from_image_path(self, like: torch.Tensor) -> torch.Tensor:
        given = {"qformer_input_ids": torch.zeros(1, 1, dtype=torch.long, device=like.device)}
        if isinstance(self.vision_tower, Cached):
            given["image_features"] = torch.zeros(1, *self.vision_tower.shape, device=like.device)
        else:
            given["pixel_values"] = torch.zeros(1, 3, *blank_size(self.config, self.projector), device=like.device)
        features = self._as_tokens(self.get_image_features(**given), None)
        return (features.float().sum() * 0.0).to(like.dtype)  # fp16 would not hold the sum, and infinity times 0 is NaN

    def _check_image_count(self, tokens: int, features: int) -> None:
        if tokens != features:
            raise ValueError(
                f"The batch has {tokens} image tokens but {features} image features "
                f"({self.config.num_image_tokens} an image): each image needs its placeholder, and truncation must "
                f"never cut an image span."
            )


class VLMForConditionalGeneration(VLMPreTrainedModel, Answering, GenerationMixin):
    """The composed model with the language model's head: trains through `labels`, answers through `generate`.

    Args:
        config: Configuration.
        parts: Loaded parts; None makes all of them from the configuration, with random weights.
    """

    def __init__(self, config: VLMConfig, parts: Parts | None = None) -> None:
        super().__init__(config)
        if parts is None:
            parts = parts_from_config(config)
        else:
            for module in (parts.vision_tower, parts.resampler, parts.projector, parts.causal_lm):
                mark_initialised(module)
        self.model = VLMModel(config, parts)
        self.lm_head = parts.causal_lm.get_output_embeddings()
        if parts.causal_lm.generation_config is not None:
            self.generation_config = parts.causal_lm.generation_config
        self._tied_weights_keys = self._find_tied_head(parts.causal_lm)
        self.post_init()

    def _find_tied_head(self, causal_lm: PreTrainedModel) -> dict[str, str]:
        if not is_tied(causal_lm.config.get_text_config()):
            return {}
        self.config.tie_word_embeddings = True
        table = self.get_input_embeddings()
        name = next(n for n, m in self.named_modules() if m is table)
        return {"lm_head.weight": f"{name}.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the language model."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head of the language model."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head of the language model."""
        self.lm_head = new_embeddings

    def get_image_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The whole image path: (N, 3, H, W) → (N, T, D); see `VLMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        supervised_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Runs the model; see `VLMModel.forward`.

        Args:
            input_ids, pixel_values, image_sizes, attention_mask, position_ids, past_key_values, inputs_embeds: There.
            labels: (B, S), or (B, L) as `decoder_input_ids`; -100: not learned; at s scored by the output at s - 1.
            loss_weights: (B, S) factors on the loss of each label; default 1.
            label_positions: `supervised_positions` of the labels, where the batch brings them.
            supervised_only: Scores only the positions with a label, a chunk at a time: the loss needs no full logits.
            num_items_in_batch: What the summed loss is divided by; default the number of labels here.
            logits_to_keep: Number of last positions to score, or their indices; 0 for all.
            decoder_input_ids, encoder_outputs: See `behind_encoder`; of an encoder–decoder alone.
            **kwargs: Passed on to `VLMModel.forward`.
        """
        if self.config.is_encoder_decoder:
            kwargs |= {"decoder_input_ids": decoder_input_ids, "encoder_outputs": encoder_outputs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        result = VLMOutput(
            past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        head = Head(self.lm_head, self.config.get_text_config())
        if not supervised_only:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = head(hidden[:, keep, :])
        if labels is not None:
            result.loss, losses, hits = mean_loss(
                head, hidden, labels, loss_weights, num_items_in_batch, label_positions
            )
            add_balance(result, self.model.language_model, outputs, attention_mask, kwargs, losses, num_items_in_batch)
            if supervised_only:
                result.token_losses, result.token_hits = losses, hits
        return result


AutoConfig.register("vlm_sft", VLMConfig)
AutoModel.register(VLMConfig, VLMModel)
AutoModelForImageTextToText.register(VLMConfig, VLMForConditionalGeneration)
