"""What is asked of a VLE: an answer, a match, the patches that a text means, a word, a choice. One class a head.

Upstream: `models/VLE/modeling_vle.py` of iflytek/VLE. A published checkpoint holds the encoder and one head or
more, under these names.

Legend of shapes: B rows, L text tokens, P patches, C choices, A answers, D width of the encoder.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import LegacyDebertaV2OnlyMLMHead
from transformers.utils import ModelOutput

from .vle import Boxes, VLEConfig, VLEModel, VLEOutput, VLEPreTrainedModel


def _classifier(width: int, classes: int) -> nn.Sequential:
    # Upstream leaves the norm at torch's own epsilon, whatever the configuration says of the others.
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, classes))


@dataclass
class VLETaskOutput(ModelOutput):
    """What a VLE with a head returns.

    Attributes:
        loss: Scalar, the mean over what is asked; with labels.
        logits: What the head says.
        hits: One number for each that is asked: how right the likeliest is, 0 … 1; with labels.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hits: torch.Tensor | None = None


class VLEForTask(VLEPreTrainedModel):
    """VLE with one head; `forward` gives what it says and, with `labels`, its loss."""

    head: ClassVar[str]
    more_heads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: VLEConfig) -> None:
        super().__init__(config)
        self.vle = VLEModel(config)
        for head in (self.head, *self.more_heads):
            self.add_module(head, self.make_head(config))
        self.post_init()

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        """The layers of the head."""
        raise NotImplementedError

    def read(self, output: VLEOutput) -> torch.Tensor:
        """What the head says of the encoder's output."""
        return self.get_submodule(self.head)(output.pooler_output)

    def chosen(self, logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Of what the head says of choices, (B, C, …), what is asked: all of it."""
        return logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the right class, a scalar."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)

    def hits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How right the likeliest class of each is, of those that are asked."""
        return (logits.argmax(-1) == labels)[labels != -100].float()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boxes: Boxes | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> VLETaskOutput:
        """Runs encoder and head.

        Args:
            input_ids: As `VLEModel.forward`, like all but the next one; (B, C, L) for choices, and so the mask. Boxes
                are those of the B·C choices then, of a row's behind each other.
            labels: What is right, as the class says; None for no loss.
            pixel_values: As above.
            attention_mask: As above.
            boxes: As above.
            image_features: As above.
            **kwargs: What the class says besides; nothing else is read.
        """
        # The features are made once for all choices.
        if choices := input_ids.shape[1] if input_ids.dim() == 3 else None:
            features = self.vle.get_image_features(pixel_values) if image_features is None else image_features
            pixel_values, image_features = None, features.repeat_interleave(choices, dim=0)
            input_ids = input_ids.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        logits = self.read(self.vle(input_ids, pixel_values, attention_mask, boxes, image_features))
        logits = self.chosen(logits.view(-1, choices, *logits.shape[2:]), **kwargs) if choices else logits
        if labels is None:
            return VLETaskOutput(logits=logits)
        labels = labels.to(logits.device)
        return VLETaskOutput(self.loss(logits, labels), logits, self.hits(logits.detach(), labels))


class VLEForVQA(VLEForTask):
    """A question → (B, A) scores of the answers in `config.id2label`; `labels` (B, A), how right each of them is."""

    head = "vqa_classifier"

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        return _classifier(2 * config.hidden_size, config.num_vqa_labels or config.num_labels)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over rows of binary cross entropies summed over answers, as in METER."""
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)) * labels.shape[1]

    def hits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) what the likeliest answer of each row scores."""
        return labels.gather(1, logits.argmax(-1, keepdim=True))[:, 0]


class VLEForITM(VLEForTask):
    """A text → (B, 2) scores that it does not and that it does belong to the image; `labels` (B,), 1 if it does."""

    head = "itm_score"

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        return nn.Sequential(OrderedDict(fc=nn.Linear(2 * config.hidden_size, 2)))


class VLEForPBC(VLEForTask):
    """A text → (B, P, 2) scores that a patch does not and that it does show it; `labels` (B, P), 1 if it does."""

    head = "pbc_classifier"

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        return _classifier(config.hidden_size, 2)

    def read(self, output: VLEOutput) -> torch.Tensor:
        assert output.image_embeds is not None
        return self.pbc_classifier(output.image_embeds[:, 1 : 1 + self.config.num_patches])


class VLEForMLM(VLEForTask):
    """A text with masked tokens → (B, L, V) scores of what they are; `labels` (B, L), -100 where nothing is asked."""

    head = "mlm_score"

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        text = config.text_config
        return nn.Sequential(nn.Linear(config.hidden_size, text.hidden_size), LegacyDebertaV2OnlyMLMHead(text))

    def read(self, output: VLEOutput) -> torch.Tensor:
        return self.mlm_score(output.text_embeds)


class _VLEForChoice(VLEForTask):
    """Choices of one question → (B, C) scores; `input_ids` and the mask are (B, C, L), `labels` (B,) the right one."""

    @staticmethod
    def make_head(config: VLEConfig) -> nn.Module:
        return _classifier(2 * config.hidden_size, 1)


class VLEForVCRQ2A(_VLEForChoice):
    """Which of four answers is right (VCR, Q→A)."""

    head = "vcr_q2a_logit"


class VLEForVCRQA2R(_VLEForChoice):
    """Which of four reasons is right for the right answer (VCR, QA→R)."""

    head = "vcr_qa2r_logit"


class VLEForVCR(_VLEForChoice):
    """Both heads on one encoder: `tasks` (B,) says which a row asks, 0 answers and 1 reasons; boxes come as tensors."""

    head = VLEForVCRQ2A.head
    more_heads = (VLEForVCRQA2R.head,)

    def read(self, output: VLEOutput) -> torch.Tensor:
        """(B·C, 1, 2), a number of each head."""
        heads = (self.head, *self.more_heads)
        return torch.stack([self.get_submodule(head)(output.pooler_output) for head in heads], dim=-1)

    def chosen(self, logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, C, 2) and `tasks` → (B, C)."""
        return logits.gather(2, kwargs["tasks"].view(-1, 1, 1).expand(-1, logits.shape[1], 1))[..., 0]

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        tasks: torch.Tensor,
        box_patches: torch.Tensor | None = None,
        box_types: torch.Tensor | None = None,
        text_types: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> VLETaskOutput:
        """As `VLEForTask.forward`, which takes the rest.

        Args:
            input_ids: (B, C, L).
            tasks: (B,).
            box_patches: (B·C, N, P), see `Boxes`; None for no boxes, and so the next two.
            box_types: (B·C, N).
            text_types: (B·C, L).
            **kwargs: As above.
        """
        boxes = None
        if box_patches is not None and box_types is not None and text_types is not None:
            boxes = Boxes(box_patches, box_types, text_types)
        return super().forward(input_ids, boxes=boxes, tasks=tasks, **kwargs)


class Task(NamedTuple):
    """A head as a user names it.

    Attributes:
        model: Its class; its name stands in `architectures`.
        what: What it does, in words that end a sentence.
    """

    model: type[VLEForTask]
    what: str


TASKS = {
    "vqa": Task(VLEForVQA, "answers questions"),
    "itm": Task(VLEForITM, "says whether a text belongs to an image"),
    "pbc": Task(VLEForPBC, "finds the patches that a text means"),
    "mlm": Task(VLEForMLM, "fills masked words in"),
    "vcr_q2a": Task(VLEForVCRQ2A, "chooses answers"),
    "vcr_qa2r": Task(VLEForVCRQA2R, "chooses reasons"),
}
