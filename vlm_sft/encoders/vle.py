"""A published VLE with one of its heads, out of its files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..base.errors import RowError, UserError
from ..base.names import Options
from ..base.words import short
from ..pieces.load_parts import load_module, make_empty
from ..pieces.part_configs import load_image_processor, load_tokenizer
from ..pieces.piece import Piece
from ..systems.vle import VLEConfig
from ..systems.vle_heads import TASKS, VLEForTask, VLEForVCR, VLEForVQA
from .answers import AnswerList, answers_of_rows, read_answer_list
from .encoder import Answer, Encoder, piece_of
from .processor import EncoderProcessor
from .vcr import FIRST_TYPE, VCRProcessor

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

MODELS: dict[str, type[VLEForTask]] = {"vqa": VLEForVQA, "vcr": VLEForVCR}
"""What a VLE is trained for, as a recipe names it."""
THINGS = 2 + 78  # token types of VCR: text, picture, and as many things as an 80-token text could name (ours)


class VLE(Encoder):
    """VLE with what makes its inputs."""

    model: VLEForTask

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """N images and N texts → what the head says of each pair, (N, …) in fp32 on the CPU."""
        inputs = {**self.text_inputs(texts), **self.image_inputs(images)}
        device = self.model.device
        return self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu()

    def answers(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        top: int,
        candidates: Sequence[str] = (),
        settings: Options | None = None,
    ) -> list[list[Answer]]:
        """See `Encoder.answers`; the score is a share, and those of all answers that may be given add up to 1."""
        names = self.model.config.id2label
        if strangers := sorted(set(candidates) - set(names.values())):
            raise UserError(f"This model does not know the answer {strangers[0]!r}: leave it out of the candidates.")
        logits = self(images, questions)
        if candidates:
            out = torch.tensor([names[number] not in candidates for number in range(logits.shape[-1])])
            logits = logits.masked_fill(out, -torch.inf)
        best = logits.softmax(-1).topk(min(top, len(set(candidates)) or logits.shape[-1]), dim=-1)
        return [
            [Answer(names[number], score) for number, score in zip(numbers, scores, strict=True)]
            for numbers, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class VLEProcessor(EncoderProcessor):
    """Of a VLE that answers questions: an answer is learned by how many annotators gave it."""

    asks = VLE
    cuts_answers = False

    def check_answers(self, given: Sequence[str], where: str) -> None:
        """See `EncoderProcessor.check_answers`."""
        if not self.known.scores(given):
            mend = "add it to `encoder.answers`, or remove the row"
            sentence = f"{where}: the model has no answer {short(given[0])!r}; {mend}."
            raise RowError(sentence, where=where, reason="answer not in the list")

    def targets(self, given: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """N rows → `labels` (N, A), how right each answer is."""
        labels = torch.zeros(len(given), len(self.known.answers))
        for row, answers in zip(labels, given, strict=True):
            for number, score in self.known.scores(answers).items():
                row[number] = score
        return {"labels": labels}


class VLESystem:
    """How a VLE is composed and loaded; see `kind.System`."""

    @staticmethod
    def config(piece: Piece[Any], recipe: Recipe) -> VLEConfig:
        """Its configuration, with the answers that it is to have in `id2label`."""
        config = copy.deepcopy(piece.whole)
        spec = recipe.encoder
        assert spec is not None
        if spec.config:
            where = recipe.where(("encoder", "config"))
            raise UserError(f"{where}: the files of a VLE tell all its sizes; remove `encoder.config`.")
        config.trained_for = spec.task
        config.vision_config.image_size = spec.image_size or config.vision_config.image_size
        if spec.task == "vcr":
            if spec.answers:
                where = recipe.where(("encoder", "answers"))
                raise UserError(f"{where}: rows of VCR bring their choices along; remove `encoder.answers`.")
            # A type for each thing that a text may name.
            config.num_token_types = max(config.num_token_types, THINGS)
            return config
        own = _own_answers(config, piece)
        answers = read_answer_list(spec.answers, recipe.where(("encoder", "answers"))) if spec.answers else own
        if not answers and recipe.data.streaming:
            where = recipe.where(("data", "streaming"))
            raise UserError(f"{where}: a stream has no list of its answers; name one: `encoder.answers`.")
        answers = answers or answers_of_rows(recipe, spec.min_count)
        config.num_vqa_labels, config.id2label = len(answers), dict(enumerate(answers))
        config.label2id = {answer: number for number, answer in enumerate(answers)}
        return config

    @staticmethod
    def processor(piece: Piece[Any], config: VLEConfig) -> EncoderProcessor:
        """What lies beside its weights."""
        tokenizer, images = load_tokenizer(piece), load_image_processor(piece, config.vision_config.image_size)
        if len(tokenizer) > (rows := config.text_config.vocab_size):
            raise UserError(
                f"{piece.where}: its tokenizer has {len(tokenizer):,} tokens, and its text encoder knows {rows:,}; "
                f"fetch the checkpoint again."
            )
        kind: type[EncoderProcessor] = VCRProcessor if config.trained_for == "vcr" else VLEProcessor
        processor = kind(images, tokenizer, longest=config.text_config.max_position_embeddings)
        if isinstance(processor, VCRProcessor):
            processor.most_things = config.num_token_types - FIRST_TYPE
            processor.side = config.vision_config.image_size // config.vision_config.patch_size
        elif config.num_vqa_labels == len(config.id2label):
            processor.known = AnswerList([config.id2label[number] for number in range(config.num_vqa_labels)])
        return processor

    @staticmethod
    def load(piece: Piece[Any], config: VLEConfig) -> VLEForTask:
        """Its weights; a head for other answers than the checkpoint's is new, and so are heads that it lacks."""
        made = MODELS[config.trained_for]
        heads = (made.head, *made.more_heads)
        missing = [head for head in heads if not any(name.startswith(f"{head}.") for name in piece.checkpoint.files)]
        wanted = list(config.id2label.values())
        if config.trained_for == "vqa" and _own_answers(copy.deepcopy(piece.whole), piece) != wanted:
            missing = list(heads)
        types, own = config.num_token_types, piece.whole.num_token_types
        config.num_token_types = own
        model: VLEForTask = make_empty(made, config, piece.checkpoint)
        for head in missing:
            delattr(model, head)
        load_module(model, piece.checkpoint, torch.float32, patches=config.num_patches)
        for head in missing:
            model.add_module(head, made.make_head(config))
            model.get_submodule(head).apply(model._init_weights)
        config.num_token_types = types
        if types > own:
            more = torch.nn.Embedding(types, config.hidden_size)
            # The same each time: where the fusion stays frozen, no file has them.
            torch.nn.init.normal_(more.weight, std=config.initializer_range, generator=torch.Generator().manual_seed(0))
            more.weight.data[:own] = model.vle.token_type_embeddings.weight.data
            model.vle.token_type_embeddings = more
        return model

    @staticmethod
    def empty(config: VLEConfig) -> VLEForTask:
        """The same without weights."""
        with torch.device("meta"):
            return MODELS[config.trained_for](config)


def load_vle(
    pretrained: str, task: str, revision: str | None = None, key: str = "MODEL", device: str | None = None
) -> VLE:
    """Loads a published VLE for one task.

    Args:
        pretrained: Folder or Hub id of a VLE.
        task: A key of `TASKS`; the checkpoint must hold its head.
        revision: Branch, tag or commit on the Hub.
        key: What messages call the checkpoint.
        device: Where it runs; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: It cannot be had, is no VLE, or has another head.
    """
    piece = piece_of(pretrained, revision, key)
    if (kind := piece.raw.get("model_type")) != VLEConfig.model_type and piece.raw:
        raise UserError(f"{piece.where} is a {kind!r} model; name a VLE, such as hfl/vle-base-for-vqa.")
    chosen, files = TASKS[task], piece.checkpoint.files
    if not _holds(chosen.model, files):
        held = " and ".join(each.what for each in TASKS.values() if _holds(each.model, files))
        raise UserError(
            f"{piece.where} has no head that {chosen.what}: it {held or 'is an encoder alone'}; name one that has."
        )
    config = piece.whole
    if task == "vqa":
        _check_answers(config, piece)
    model = make_empty(chosen.model, config, piece.checkpoint)
    load_module(model, piece.checkpoint, torch.float32)
    processor = VLESystem.processor(piece, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return VLE(model.eval().requires_grad_(False).to(device), processor.tokenizer, processor.image_processor)


def _holds(model: type[VLEForTask], names: Iterable[str]) -> bool:
    """Whether the tensors of a checkpoint are those of this head too."""
    return any(name.startswith(f"{model.head}.") for name in names)


def _own_answers(config: VLEConfig, piece: Piece[Any]) -> list[str]:
    """The answers of the checkpoint's head, in order; none where it has no such head."""
    _check_answers(config, piece)
    return [config.id2label[number] for number in range(config.num_vqa_labels or 0)]


def _check_answers(config: VLEConfig, piece: Piece[Any]) -> None:
    """Sets how many answers the head has by its own tensor, and compares it with the answers that are named."""
    last = f"{VLEForVQA.head}.3.bias"
    config.num_vqa_labels = piece.checkpoint.shapes([last])[last][0] if last in piece.checkpoint.files else None
    if config.num_vqa_labels is not None and sorted(config.id2label) != list(range(config.num_vqa_labels)):
        raise UserError(
            f"{piece.where}: its head has {config.num_vqa_labels:,} answers and its config.json names "
            f"{len(config.id2label):,} (id2label); fetch the checkpoint again."
        )
