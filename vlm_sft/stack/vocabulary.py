"""New words: one token each, and rows of the language model's tables, which grow where they have no spare ones.

A word starts as the mean of the pieces that it was cut into before, as in "fast vocabulary transfer" (Gee et al., EMNLP
2022): it lies where the model already reads its pieces, so the first loss is near that of before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..base.errors import UserError
from ..batch.encoding import Word
from ..batch.typed_text import control_tokens
from ..templates.literals import literals


def add_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], template: str, own: Iterable[str] = ()
) -> list[Word]:
    """Adds words to a tokenizer, as plain text that is never cut.

    They are no special tokens: `skip_special_tokens` leaves them in an answer, and typed by people they count as words.

    Args:
        tokenizer: A fast tokenizer; changed.
        words: The words, each other than the rest.
        template: Jinja source of the chat template.
        own: Texts of control tokens that are added later, such as the image token.

    Raises:
        UserError: A word cannot be one, is one token already, or stands in what the template writes.
    """
    if not words:
        return []
    try:
        written = [*literals(template), *own]
    except UserError:  # a template of an unusual kind, which is said where it is rendered
        written = [*own]
    control = {*control_tokens(tokenizer, template), *own}
    pieces = [_pieces(tokenizer, word) for word in words]
    for word, cut in zip(words, pieces, strict=True):
        if reason := _refusal(tokenizer, word, cut, written, control):
            raise UserError(f"lora.add_tokens: {word!r} {reason}.")
        if words.count(word) > 1:
            raise UserError(f"lora.add_tokens: {word!r} is named twice; once is enough.")
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    known = set(tokenizer.all_special_ids) | {tokenizer.unk_token_id}
    return [
        Word(word, int(tokenizer.convert_tokens_to_ids(word)), tuple(piece for piece in cut if piece not in known))
        for word, cut in zip(words, pieces, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """What a word is cut into, without the mark of white space that some tokenizers put in front."""
    output = tokenizer(word, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(output.input_ids)
    blank = bool(ids) and not tokenizer.decode(ids[:1]).strip()
    return ids[1:] if blank and len(ids) > 1 else ids


def _refusal(
    tokenizer: PreTrainedTokenizerBase, word: str, pieces: list[int], written: list[str], control: Collection[str]
) -> str:
    """Why a text cannot become a word, or ""."""
    if word != word.strip():
        return "begins or ends with white space, which would be lost between words; write the word alone"
    if word in tokenizer.get_vocab() or (len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id):
        return "is one token of this tokenizer already; remove it, LoRA learns it as it is"
    if found := next((token for token in control if token in word), None):
        return f"holds the control token {found!r}, which is text where people write it; choose another"
    if found := next((text for text in written if word in text), None):
        return f"stands in what the chat template writes ({found.strip()!r}), which would be cut otherwise; change it"
    return ""


def make_room(model: PreTrainedModel, words: Sequence[Word]) -> None:
    """Gives a model rows for words that its tokenizer was given, where it has no spare ones.

    Args:
        model: A stack or an existing VLM, maybe on the meta device; it remembers the words' ids for `lora_config`.
        words: What `add_words` gave.

    Raises:
        UserError: The head has a bias, which PEFT would leave out.
    """
    if not words:
        return
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"lora.add_tokens: the head of this language model ({model.config.get_text_config().model_type}) has a "
            f"bias, beside which PEFT cannot train rows of it; remove add_tokens, or use another language model."
        )
    grow_vocabulary(model, max(word.id for word in words) + 1)
    model.word_ids = [word.id for word in words]


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Gives embeddings and head at least so many rows.

    A new row is the mean of the others, so its logit is the mean of theirs and never the highest.

    Args:
        model: A stack or an existing VLM.
        rows: How many there must be.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is table.weight
    old = len(table.weight)
    if rows <= old:
        return
    for module, names in ((table, ("weight",)), (head, ("weight", "bias"))):
        for name in names:
            if getattr(module, name, None) is None or (tied and module is head and name == "weight"):
                continue
            before = getattr(module, name)
            mean = before.data.float().mean(0, keepdim=True).to(before.dtype)
            grown = torch.cat([before.data, mean.expand(rows - old, *before.shape[1:])])
            setattr(module, name, nn.Parameter(grown, requires_grad=before.requires_grad))
    if tied:
        head.weight = table.weight
    table.num_embeddings = head.out_features = rows
    # An inner language model has its own copy of the configuration, from which it may be made again.
    for each in (model, getattr(model.base_model, "language_model", model)):
        each.config.get_text_config().vocab_size = rows


@torch.no_grad()
def start_words(model: PreTrainedModel, words: Sequence[Word]) -> None:
    """Puts the mean of its pieces into the rows of each word; one without any has the mean of all rows.

    Args:
        model: A stack or an existing VLM with its weights, before PEFT is put around it.
        words: What `add_words` gave.
    """
    if not words:
        return
    first = min(word.id for word in words)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        means = [weight[list(word.pieces) or slice(first)].float().mean(0) for word in words]
        for word, mean in zip(words, means, strict=True):
            weight[word.id] = mean.to(weight.dtype)
