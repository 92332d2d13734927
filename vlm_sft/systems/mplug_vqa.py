"""mPLUG for visual question answering: text joins the image by skip-connected fusion, and a decoder writes the answer.

Li et al. 2022 (arXiv 2205.12005). Upstream: `models/model_vqa_mplug.py`, `modeling_mplug.py` and `clip/model.py` of
X-PLUG/mPLUG; the names are those of its checkpoints, transformers has no class for it.

Legend of shapes: B questions, N answers of all of them, L tokens, P patches, V and D widths of the tower and the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertLMHeadModel, BertModel, PreTrainedModel
from transformers.activations import QuickGELUActivation
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.utils import ModelOutput

from .cross_layers import CrossLayer, added

IGNORED = -100
# As upstream answers.
WRITING: dict[str, Any] = {
    "num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": 0.6, "do_sample": False,
}  # fmt: skip


class MPlugConfig(BertConfig):
    """Sizes of an mPLUG, under the names of its `config_bert.json`, with its tower's; the defaults are mPLUG-large's.

    Attributes:
        text_encoder_layers: Layers that the question passes by itself.
        fusion_layers: Last of the `num_hidden_layers` in which it reads the image; those before are never run.
        stride_layer: Every so many of these, text and image attend to each other as one, and the image changes.
        text_decode_layers: Layers of the decoder.
        vision_width: V; where it is not D, a projection and a norm lie between.
        ranks: Whether it chooses its answer from those in `id2label`; else it writes one.
    """

    model_type = "mplug_vqa"

    text_encoder_layers: int = 6
    fusion_layers: int = 6
    stride_layer: int = 6
    text_decode_layers: int = 12
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_patch_size: int = 14
    vision_output_dim: int = 768
    image_size: int = 336
    ranks: bool = False

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.vision_patch_size) ** 2

    def bert(self, layers: int, **more: Any) -> BertConfig:
        """Of one of its parts, which are BERTs."""
        sizes = {name: value for name, value in self.to_dict().items() if name in BertConfig().to_dict()}
        return BertConfig(**{**sizes, "num_hidden_layers": layers, "model_type": "bert", **more})


class VisionBlock(GradientCheckpointingLayer):
    """A layer of CLIP's tower under OpenAI's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": QuickGELUActivation(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, 1 + P, V) → the same shape."""
        seen = self.ln_1(states)
        states = states + self.attn(seen, seen, seen, need_weights=False)[0]
        return states + self.mlp(self.ln_2(states))


class VisionTower(nn.Module):
    """CLIP's tower under OpenAI's names; every token through its last norm, and none through its projection."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((config.image_size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [VisionBlock(width, config.vision_heads) for _ in range(config.vision_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, config.vision_output_dim))  # in every checkpoint, and never used

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 1 + P, V)."""
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        states = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            states = block(states)
        return self.ln_post(states)


class FusionEncoder(nn.Module):
    """Question and image → both, fused."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        bert = config.bert(config.num_hidden_layers)
        self.stride = config.stride_layer
        self.used = min(config.fusion_layers, config.num_hidden_layers)
        self.embeddings = BertEmbeddings(bert)  # in every checkpoint, and never used
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(CrossLayer(bert) for _ in range(config.num_hidden_layers))}
        )

    def forward(self, text: torch.Tensor, mask: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) with its (B, L) mask and (B, 1 + P, D) → image and text, of the same shapes."""
        text_mask = added(mask, text.dtype)
        image_mask = torch.zeros_like(image[:, None, None, :, 0])
        for number, layer in enumerate(self.encoder["layer"][-self.used :]):
            if number and number % self.stride == 0:
                both = layer(torch.cat([image, text], dim=1), torch.cat([image_mask, text_mask], dim=-1))
                image, text = image + both[:, : image.shape[1]], both[:, image.shape[1] :]
            else:
                text = layer(text, text_mask, image, image_mask)
        return image, text


@dataclass
class MPlugOutput(ModelOutput):
    """What `MPlugForVQA` returns.

    Attributes:
        loss: Scalar: of each answer the summed loss of its tokens, times its weight, over the number of questions.
        logits: (N, L, tokens).
        answer_losses: (N,), the summed losses.
        hits: (B,) the share of the tokens of its answers that are the likeliest, for each question.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    answer_losses: torch.Tensor | None = None
    hits: torch.Tensor | None = None


class MPlugForVQA(PreTrainedModel):
    """mPLUG with the decoder that answers."""

    config_class = MPlugConfig
    config: MPlugConfig
    base_model_prefix = "mplug"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CrossLayer", "BertLayer", "VisionBlock"]
    _tied_weights_keys = {
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
    }
    _keys_to_ignore_on_load_unexpected = [r"position_ids$", r"^\w+_m\.", r"^visual_encoder\.(?!visual\.)"]

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__(config)
        self.visual_encoder = nn.ModuleDict({"visual": VisionTower(config)})
        if config.vision_width != config.hidden_size:
            self.visn_fc = nn.Linear(config.vision_width, config.hidden_size)
            self.visn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.text_encoder = BertModel(config.bert(config.text_encoder_layers), add_pooling_layer=False)
        self.fusion_encoder = FusionEncoder(config)
        decoder = config.bert(config.text_decode_layers, is_decoder=True, add_cross_attention=True)
        self.text_decoder = BertLMHeadModel(decoder)
        self.post_init()
        self.generation_config = self.text_decoder.generation_config
        self.generation_config.update(**WRITING)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the question."""
        return self.text_encoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head of the decoder."""
        return self.text_decoder.get_output_embeddings()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 1 + P, D)."""
        image = self.visual_encoder["visual"](pixel_values.to(self.dtype))
        if hasattr(self, "visn_fc"):
            image = self.dropout(self.visn_layer_norm(self.visn_fc(image)))
        return image

    def read(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and questions → (B, 1 + P + L, D) of what the decoder reads, and its mask."""
        image = self.get_image_features(pixel_values)
        text = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        fused = torch.cat(self.fusion_encoder(text, attention_mask, image), dim=1)
        return fused, torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        answer_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        answer_mask: torch.Tensor | None = None,
        answers: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MPlugOutput:
        """Scores answers.

        Args:
            input_ids: (B, L) of the questions.
            pixel_values: (B, 3, H, W).
            answer_ids: (N, L'), from `[CLS]` on; padding is not scored.
            attention_mask: (B, L), 1 for tokens; None for tokens alone.
            answer_mask: (N, L').
            answers: (B,), how many of the answers are of each question; None for one each.
            weights: (N,), by which each counts: the share of annotators who gave it (upstream); None for 1.
            **kwargs: Nothing else is read.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        answer_mask = torch.ones_like(answer_ids) if answer_mask is None else answer_mask
        states, mask = self.read(pixel_values, input_ids, attention_mask)
        if answers is not None:
            states, mask = (each.repeat_interleave(answers, dim=0) for each in (states, mask))
        logits, losses = self.score(states, mask, answer_ids, answer_mask)
        weighted = losses if weights is None else losses * weights
        hits = self._hits(logits.detach(), answer_ids, answer_mask, answers)
        return MPlugOutput(weighted.sum() / len(input_ids), logits, losses, hits)

    @staticmethod
    def _hits(
        logits: torch.Tensor, answer_ids: torch.Tensor, answer_mask: torch.Tensor, answers: torch.Tensor | None
    ) -> torch.Tensor:
        asked = answer_mask[:, 1:].bool()
        right = ((logits[:, :-1].argmax(-1) == answer_ids[:, 1:]) & asked).sum(1)
        if answers is None:
            return right / asked.sum(1)
        owners = torch.arange(len(answers), device=answers.device).repeat_interleave(answers)
        empty = torch.zeros(len(answers), device=logits.device)
        of = empty.index_add(0, owners, asked.sum(1).to(empty))
        return empty.index_add(0, owners, right.to(empty)) / of.clamp(min=1)

    def score(
        self, states: torch.Tensor, mask: torch.Tensor, answer_ids: torch.Tensor, answer_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder says of N answers, each to its own states: (N, L', tokens), and (N,) summed losses."""
        logits = self.text_decoder(
            answer_ids, attention_mask=answer_mask, encoder_hidden_states=states, encoder_attention_mask=mask
        ).logits
        wanted = answer_ids.masked_fill(answer_mask == 0, IGNORED)[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
        return logits, losses.sum(dim=1)

    @torch.no_grad()
    def rank(
        self,
        states: torch.Tensor,
        mask: torch.Tensor,
        candidate_ids: torch.Tensor,
        candidate_mask: torch.Tensor,
        top: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest of candidate answers, as upstream ranks them.

        The `top` with the likeliest first token are scored whole; that token counts twice, by itself and in the whole.

        Args:
            states: (B, 1 + P + L, D) as `read` gives them.
            mask: Theirs.
            candidate_ids: (C, L'), from `[CLS]` on.
            candidate_mask: (C, L').
            top: How many are scored and returned.

        Returns:
            (B, top) numbers of candidates, the likeliest first, and their shares, which add up to 1.
        """
        top = min(top, len(candidate_ids))
        begin = candidate_ids[:1, :1].expand(len(states), 1)
        first = self.text_decoder(begin, encoder_hidden_states=states, encoder_attention_mask=mask).logits[:, 0]
        chances = first.log_softmax(-1).index_select(1, candidate_ids[:, 1])
        chances, chosen = chances.topk(top, dim=1)
        states, mask = (each.repeat_interleave(top, dim=0) for each in (states, mask))
        _, losses = self.score(states, mask, candidate_ids[chosen.flatten()], candidate_mask[chosen.flatten()])
        shares, order = (chances - losses.view(-1, top)).softmax(-1).sort(dim=1, descending=True)
        return chosen.gather(1, order), shares

    @torch.no_grad()
    def write(self, states: torch.Tensor, mask: torch.Tensor, begin: int, end: int, **options: Any) -> torch.Tensor:
        """Answers by transformers' `generate`, (B · `num_return_sequences`, L') from `[CLS]` on.

        Args:
            states: (B, 1 + P + L, D) as `read` gives them.
            mask: Theirs.
            begin: Id of `[CLS]`.
            end: Id of `[SEP]`.
            **options: Of `generate`, over `generation_config`.
        """
        begins = torch.full((len(states), 1), begin, dtype=torch.long, device=states.device)
        cache = EncoderDecoderCache(*(DynamicCache(config=self.text_decoder.config) for _ in range(2)))
        given = {**options, "eos_token_id": end, "pad_token_id": self.config.pad_token_id, "use_cache": True}
        return self.text_decoder.generate(
            begins, past_key_values=cache, encoder_hidden_states=states, encoder_attention_mask=mask, **given
        )


AutoConfig.register(MPlugConfig.model_type, MPlugConfig)
AutoModel.register(MPlugConfig, MPlugForVQA)
