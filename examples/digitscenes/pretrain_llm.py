"""Pretrain the language model: a small LLaMA with its own bilingual BPE, on text alone (see scene_text.py)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from scene_text import LONGEST_ANSWER, Piece, describe, document, join, random_scene, turn, vocabulary_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH = 128
VOCABULARY = 640
INIT_STD = 0.07  # transformers' 0.02 is far too small at this width
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents: any text encodes; digits and Chinese characters stand alone.

    Single characters let the model recombine what it knows; otherwise whole Chinese phrases would become one token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = [join(document(rng)).replace("<s>", "").replace("</s>", "") for _ in range(4000)]
    tokenizer.train_from_iterator(texts + vocabulary_text() * 20, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model: width 128, 4 layers, about 0.9M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[list[Piece]]) -> list[tuple[list[int], list[float]]]:
    """Tokenise documents piece by piece into token ids and the weight of each token in the loss."""
    texts = [text for pieces in documents for text, _ in pieces]
    ids = iter(tokenizer(texts, add_special_tokens=False).input_ids)
    encoded = []
    for pieces in documents:
        tokens: list[int] = []
        weights: list[float] = []
        for _, weight in pieces:
            piece = next(ids)
            tokens += piece
            weights += [weight] * len(piece)
        encoded.append((tokens, weights))
    return encoded


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, shorthand: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw documents for ever, in batches of like length, padded on the right.

    Yields:
        Token ids and loss weights, both of shape (size, length).
    """
    pad = tokenizer.pad_token_id
    while True:
        encoded = sorted(
            encode(tokenizer, [document(rng, shorthand) for _ in range(8 * size)]), key=lambda item: len(item[0])
        )
        groups = [encoded[start : start + size] for start in range(0, len(encoded), size)]
        rng.shuffle(groups)
        for group in groups:
            length = max(len(tokens) for tokens, _ in group)
            ids = [tokens + [pad] * (length - len(tokens)) for tokens, _ in group]
            weights = [row + [0.0] * (length - len(row)) for _, row in group]
            yield torch.tensor(ids), torch.tensor(weights)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Next-token cross-entropy, averaged with the weights of the predicted tokens."""
    logits = model(input_ids=ids[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.inference_mode()
def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[Piece]]) -> list[str]:
    """Continue prompts by greedy decoding, in batches of 100 padded on the left.

    Prompts are pieces, as documents are, so that a word of a description never melts into the question behind it.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), 100):
        rows = [{"input_ids": tokens} for tokens, _ in encode(tokenizer, prompts[start : start + 100])]
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: int = 400) -> dict[str, float]:
    """Shares of answers and of captions that the model gives exactly right about scenes described in text."""
    rng = random.Random(77_777)  # its own stream: none of these dialogues is drawn for training
    prompts, replies, kinds = [], [], []
    for number in range(scenes):
        scene, shorthand = random_scene(rng), number % 2
        question, reply = turn(scene, rng)
        texts = ("<s><human>:", describe(scene, rng, float(shorthand)), f"{question}\n<bot>:")
        prompts.append([(text, 0.0) for text in texts])
        replies.append(reply)
        kind = "answers" if len(reply) <= LONGEST_ANSWER else "captions"
        kinds.append(f"{kind} from {'shorthand' if shorthand else 'sentences'}")
    right: dict[str, list[bool]] = {}
    for text, reply, kind in zip(complete(model, tokenizer, prompts), replies, kinds, strict=True):
        right.setdefault(kind, []).append(text == reply)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}


def make_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (twice as quick here as AdamW alone), AdamW for all other parameters."""
    inner = [tensor for tensor in model.model.layers.parameters() if tensor.ndim == 2]
    known = {id(tensor) for tensor in inner}
    others = [tensor for tensor in model.parameters() if id(tensor) not in known]
    muon = torch.optim.Muon(inner, lr=peak, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.98))]


def train(
    seed: int, steps: int = 2200, batch: int = 48, peak: float = 3e-3
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model from nothing.

    The first 35 % of the steps see shorthand only: looking things up is learnt sooner on short texts.

    Args:
        seed: of weights and documents.
        steps: optimizer steps.
        batch: documents a step.
        peak: highest learning rate (warm-up over 100 steps, then cosine to 0).
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    model = build_model(tokenizer)
    optimizers = make_optimizers(model, peak)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for optimizer in optimizers
    ]
    first = int(0.35 * steps)
    early = batches(tokenizer, random.Random(seed + 1), batch, shorthand=1.0)
    late = batches(tokenizer, random.Random(seed + 2), batch, shorthand=0.6)
    start = time.perf_counter()
    for step, (ids, weights) in enumerate(chain(islice(early, first), islice(late, steps - first)), start=1):
        loss = weighted_loss(model, ids, weights)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        if step % 250 == 0:
            scores = score(model, tokenizer)
            print(f"llm {step:5d} {time.perf_counter() - start:4.0f} s loss {loss.item():.3f} {scores}", flush=True)
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model, rounded to bfloat16, and its tokenizer as transformers does."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
