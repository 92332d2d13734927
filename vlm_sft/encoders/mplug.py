"""mPLUG's VQA model out of its files: ModelScope's folders, the authors' weight files, and folders of transformers."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BertTokenizer, BlipImageProcessorPil

from ..base.errors import UserError, refused_by_library
from ..base.names import Json, Options, Values
from ..base.whole_files import read_text
from ..pieces.beside import check_tokenizer
from ..pieces.checkpoints import Checkpoint, fetch_file
from ..pieces.expected import TOKENIZER, WHOLE, laid_out
from ..pieces.load_parts import from_pretrained, load_module, make_empty
from ..pieces.piece import Piece
from ..recipe.safety import check_config, check_length, most_bytes
from ..systems.mplug_vqa import MPlugConfig, MPlugForVQA
from .answers import AnswerList, read_answer_list
from .encoder import Answer, Encoder, Published, told
from .processor import EncoderProcessor

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

BERT_CONFIG = "config_bert.json"
VISION = "visual_encoder.visual."
# Of the published models: heads are of 64 numbers; the small one has no projection, and its own stride.
HEAD_WIDTH, STRIDES, FUSION_LAYERS = 64, {True: 6, False: 3}, 6
# What stands in the names of a checkpoint before it was tuned to answer, and is left out then (upstream: vqa_mplug.py).
BEFORE_TUNING = re.compile(r"(?<=text_encoder\.)bert\.|(?<=fusion_encoder\.)fusion\.")

ANNOTATORS, ANSWER_TOKENS = 10, 8
"""Of VQAv2: answers that a question has at most, and tokens of a long one; together more than a caption has."""


class MPlug(Encoder):
    """mPLUG with what makes its inputs. It writes its answers, or ranks those that it is given."""

    model: MPlugForVQA

    @torch.inference_mode()
    def answers(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        top: int,
        candidates: Sequence[str] = (),
        settings: Options | None = None,
    ) -> list[list[Answer]]:
        """See `Encoder.answers`. Written answers have their probability for a score, candidates their share."""
        inputs = {**self.text_inputs(questions), **self.image_inputs(images)}
        states, mask = self.model.read(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()})
        if candidates:
            made = self.tokenizer(
                [f"{each}{self.tokenizer.sep_token}" for each in candidates], padding=True, return_tensors="pt"
            ).to(self.model.device)
            chosen, shares = self.model.rank(states, mask, made["input_ids"], made["attention_mask"], top)
            return [
                [Answer(candidates[n], s) for n, s in zip(*row, strict=True)]
                for row in zip(chosen.tolist(), shares.tolist(), strict=True)
            ]
        begin, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids = self.model.write(states, mask, begin, end, **self._settings(settings or {}, top))
        states, mask = (each.repeat_interleave(top, dim=0) for each in (states, mask))
        _, losses = self.model.score(states, mask, ids, (ids != self.tokenizer.pad_token_id).long())
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found = [Answer(text, score) for text, score in zip(texts, losses.neg().exp().tolist(), strict=True)]
        return [found[start : start + top] for start in range(0, len(found), top)]

    def _settings(self, given: Options, top: int) -> Options:
        """Settings of `generate`: those given over those of the model, as far as there are positions and beams."""
        own, room = self.model.generation_config, self.longest - 1  # the answer begins behind `[CLS]`
        longest = given.get("max_new_tokens") or (given.get("max_length") or 0) - 1
        longest = longest if longest > 0 else own.max_new_tokens
        beams = max(given.get("num_beams") or own.num_beams, top)
        kept = {name: value for name, value in given.items() if name != "max_length"}
        return {**kept, "max_new_tokens": min(longest, room), "num_beams": beams, "num_return_sequences": top}


def load_mplug(
    piece: Piece[Published],
    tokenizer: str | None = None,
    device: str | None = None,
    sizes: Values | None = None,
) -> MPlug:
    """Loads a published mPLUG for VQA.

    Args:
        piece: Its checkpoint.
        tokenizer: Folder or Hub id of its tokenizer (BERT's, lower case), where the checkpoint brings none.
        device: Where it runs; None: the first GPU if there is one, else the CPU.
        sizes: What tensors and `config_bert.json` do not tell, as `MPlugConfig` names it.

    Raises:
        UserError: It cannot be had, or is no mPLUG for VQA.
    """
    config = find_config(piece, sizes or {})
    model = MPlugSystem.load(piece, config)
    processor = processor_of(piece, config, tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return MPlug(model.eval().requires_grad_(False).to(device), processor.tokenizer, processor.image_processor)


class MPlugProcessor(EncoderProcessor):
    """Of an mPLUG: each answer that an annotator gave is learned, by how many gave it."""

    asks = MPlug

    def targets(self, given: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """B rows → `answer_ids` and `answer_mask` (N, L), `answers` (B,), how many are of each, and `weights` (N,)."""
        counts = [Counter(answers) for answers in given]
        texts = [f"{answer}{self.tokenizer.sep_token}" for each in counts for answer in each]  # two ends, as upstream
        made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        return {
            "answer_ids": made["input_ids"],
            "answer_mask": made["attention_mask"],
            "answers": torch.tensor([len(each) for each in counts]),
            "weights": torch.tensor([count / each.total() for each in counts for count in each.values()]),
        }

    def fullest(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Rows of which each annotator answers otherwise; see `EncoderProcessor.fullest`."""
        shape = (rows * ANNOTATORS, min(ANSWER_TOKENS, self.longest))
        return {
            "answer_ids": torch.full(shape, self.tokenizer.unk_token_id),
            "answer_mask": torch.ones(shape, dtype=torch.long),
            "answers": torch.full((rows,), ANNOTATORS),
            "weights": torch.full(shape[:1], 1 / ANNOTATORS),
        }

    def reads(self, length: int, patches: int) -> dict[str, int]:
        """See `EncoderProcessor.reads`: its head is a decoder, which reads the answers."""
        return {**super().reads(length, patches), "head": ANNOTATORS * ANSWER_TOKENS}

    @property
    def writes(self) -> bool:
        """See `EncoderProcessor.writes`."""
        return not self.known.answers

    @property
    def candidates(self) -> Sequence[str]:
        """The answers of `encoder.answers`, which are ranked; without, answers are written."""
        return self.known.answers


class MPlugSystem:
    """How an mPLUG is composed and loaded; see `kind.System`."""

    @staticmethod
    def config(piece: Piece[Any], recipe: Recipe) -> MPlugConfig:
        """Its configuration, with the answers that it is to choose from in `id2label`, if any."""
        spec = recipe.encoder
        assert spec is not None
        check_config(spec.config, f"{piece.section}.config")
        config = find_config(piece, spec.config)
        config.image_size = spec.image_size or config.image_size
        if spec.answers:
            answers = read_answer_list(spec.answers, recipe.where(("encoder", "answers")))
            config.id2label = dict(enumerate(answers))
            config.ranks = True
        return config

    @staticmethod
    def processor(piece: Piece[Any], config: MPlugConfig) -> MPlugProcessor:
        """What lies beside its weights, or is named in its place."""
        return processor_of(piece, config, piece.spec.tokenizer)

    @staticmethod
    def load(piece: Piece[Any], config: MPlugConfig) -> MPlugForVQA:
        """Its weights."""
        if told(piece).get("model_type") == MPlugConfig.model_type:
            piece.config = config
            return from_pretrained(MPlugForVQA, piece, dtype=torch.float32)  # type: ignore[return-value]
        model: MPlugForVQA = make_empty(MPlugForVQA, config, piece.checkpoint)
        load_module(model, piece.checkpoint, torch.float32, patches=config.num_patches)
        model.tie_weights()  # what was tied has two tensors in a file
        return model

    @staticmethod
    def empty(config: MPlugConfig) -> MPlugForVQA:
        """The same without weights."""
        with torch.device("meta"):
            return MPlugForVQA(config)


def processor_of(piece: Piece[Any], config: MPlugConfig, tokenizer: str | None) -> MPlugProcessor:
    """Makes the processor of an mPLUG: BERT's tokenizer, BLIP's pictures, and the answers that it ranks where it does.

    Args:
        piece: Says in messages which key of the recipe named it.
        config: Of its model: size of pictures, longest text, number of words, ranked answers.
        tokenizer: Folder or Hub name of the tokenizer; None for the piece's own.

    Raises:
        UserError: The tokenizer has more words than the model.
    """
    words = _tokenizer(tokenizer or piece.pretrained, piece)
    if len(words) > config.vocab_size:
        raise UserError(
            f"{piece.where}: its tokenizer has {len(words):,} tokens, and the model knows {config.vocab_size:,}; name "
            f"BERT's, in lower case."
        )
    pictures = BlipImageProcessorPil(size={"height": config.image_size, "width": config.image_size})
    processor = MPlugProcessor(pictures, words, longest=config.max_position_embeddings)
    if config.ranks:
        processor.known = AnswerList([config.id2label[number] for number in range(len(config.id2label))])
    return processor


class Renamed(Checkpoint):
    """A checkpoint under other names, of which its own beginnings are left out.

    Args:
        inner: As it is.
        pattern: What is left out of a name.
    """

    def __init__(self, inner: Checkpoint, pattern: re.Pattern[str]) -> None:
        self.__dict__ |= inner.__dict__
        self._inner, self._own = inner, {pattern.sub("", name): name for name in inner.files}
        self.files = {name: inner.files[own] for name, own in self._own.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See `Checkpoint.read`."""
        own = {name: self._own[name] for name in names}
        found = self._inner.read(own.values())
        return {name: found[theirs] for name, theirs in own.items()}

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """See `Checkpoint.shapes`."""
        own = {name: self._own[name] for name in names}
        found = self._inner.shapes(own.values())
        return {name: found[theirs] for name, theirs in own.items()}

    def fingerprint(self, names: Any = None) -> str:
        """See `Checkpoint.fingerprint`: that of the file as it is."""
        return self._inner.fingerprint(names)


def find_config(piece: Piece[Any], sizes: Values) -> MPlugConfig:
    """The configuration of a published mPLUG, as its files and `sizes` tell it."""
    if told(piece).get("model_type") == MPlugConfig.model_type:
        return copy.deepcopy(piece.whole)
    if any(map(BEFORE_TUNING.search, piece.checkpoint.files)):
        piece.checkpoint = Renamed(piece.checkpoint, BEFORE_TUNING)
    return _config(piece, sizes)


def _config(piece: Piece[Published], sizes: Values) -> MPlugConfig:
    """What its tensors, its `config_bert.json` and `sizes` tell, the last one first."""
    names = piece.checkpoint.files
    prefix = next((n.removesuffix(f"{VISION}conv1.weight") for n in names if n.endswith(f"{VISION}conv1.weight")), None)
    if prefix is None or f"{prefix}text_decoder.cls.predictions.bias" not in names:
        raise UserError(f"{piece.where} holds no mPLUG for VQA: name its folder or weight file.")
    conv, table, words = (
        f"{prefix}{VISION}conv1.weight",
        f"{prefix}{VISION}positional_embedding",
        "embeddings.word_embeddings.weight",
    )
    inner = f"{prefix}text_encoder.encoder.layer.0.intermediate.dense.weight"
    places = f"{prefix}text_encoder.embeddings.position_embeddings.weight"
    wanted = [conv, table, f"{prefix}{VISION}proj", f"{prefix}text_encoder.{words}", inner, places]
    with refused_by_library(f"{piece.where} holds no mPLUG for VQA"):
        shapes = piece.checkpoint.shapes(wanted)
        vocabulary, width = shapes[wanted[3]]
        vision, _, _, patch = shapes[conv]
        side = round((shapes[table][0] - 1) ** 0.5) * patch

        def layers(part: str) -> int:
            start = f"{prefix}{part}"
            return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})

        told = {
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": shapes[inner][0],
            "max_position_embeddings": shapes[places][0], "num_attention_heads": width // HEAD_WIDTH,
            "num_hidden_layers": layers("fusion_encoder.encoder.layer."),
            "text_encoder_layers": layers("text_encoder.encoder.layer."),
            "text_decode_layers": layers("text_decoder.bert.encoder.layer."), "fusion_layers": FUSION_LAYERS,
            "stride_layer": STRIDES[vision != width], "vision_width": vision, "image_size": side,
            "vision_layers": layers(f"{VISION}transformer.resblocks."), "vision_heads": vision // HEAD_WIDTH,
            "vision_patch_size": patch, "vision_output_dim": shapes[f"{prefix}{VISION}proj"][1],
        }  # fmt: skip
        return MPlugConfig(**{**told, **_bert_config(piece), **sizes})


def _bert_config(piece: Piece[Published]) -> Json:
    """The counts that tensors do not tell, of a folder that has a `config_bert.json`."""
    if Path(piece.pretrained).is_file():
        return {}
    path = fetch_file(piece.pretrained, BERT_CONFIG, piece.revision, piece.key, required=False)
    if path is None:
        return {}
    check_length(path, most_bytes(BERT_CONFIG))
    with refused_by_library(f"{piece.where}: its {BERT_CONFIG} cannot be read"):
        told = dict(json.loads(read_text(path)))
    check_config(told, piece.where, BERT_CONFIG)
    wanted = ("num_attention_heads", "fusion_layers", "stride_layer", "layer_norm_eps", "hidden_act")
    return {name: told[name] for name in wanted if name in told}


def _tokenizer(source: str, piece: Piece[Published]) -> BertTokenizer:
    key = piece.key if source == piece.pretrained else "--tokenizer"
    if Path(source).is_file():
        raise UserError(
            f"{piece.where} is a weight file without a tokenizer: give --tokenizer google-bert/bert-base-uncased."
        )
    revision = piece.revision if source == piece.pretrained else None
    check_tokenizer(source, revision, key)
    if all(fetch_file(source, name, revision, key, required=False) is None for name in (WHOLE, "vocab.txt")):
        raise UserError(
            f"{key}: {source!r} has no tokenizer (vocab.txt): give --tokenizer google-bert/bert-base-uncased."
        )
    with refused_by_library(f"{key}: {source!r} has no tokenizer of BERT's kind"):
        return BertTokenizer.from_pretrained(laid_out(source, revision, key, TOKENIZER))
