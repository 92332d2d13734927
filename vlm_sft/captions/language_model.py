"""A language model that reads prompts of words alone: one of this machine or of the Hub, a bundle's, or a server's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..base.errors import RowError, UserError
from ..base.names import MANIFEST, Json, Options
from ..base.whole_files import read_text
from ..base.words import one_line
from ..batch.typed_text import control_tokens
from ..inference.generation import answer_each, position_limit
from ..inference.settings import DEFAULTS, SAMPLING, check_options, open_bundle, refusal, tidy
from ..judging.judge import PATIENCE, ask_together
from ..judging.server import TAKEN, ChatServer, Names
from ..judging.verdicts import THOUGHT, Kept, key_of
from ..model.encoder_decoder import answer_start_of, reads_by_encoder
from ..pieces.checkpoints import fetch_file
from ..pieces.load_parts import load_language_model
from ..pieces.part_configs import find_language_model, load_tokenizer
from ..recipe.safety import check_length, most_bytes
from ..recipe.sections import LanguageModel as Section
from ..rows.messages import text_part
from ..templates.process import ask
from ..templates.sandbox import MARKS

TEMPLATE = "chat_template.jinja"
_URL = re.compile(r"https?://", re.IGNORECASE)
# What is rendered for a prompt alone needs no marks of what is learned, which the sandbox asks for.
_UNMARKED = "{% generation %}{% endgeneration %}"
USUAL: Options = {"temperature": 0, "max_tokens": 256}
_NAMES = Names("--llm", "language model", "replies")


class LanguageModel(Protocol):
    """What answers prompts; a context, in which it is asked."""

    def __enter__(self) -> LanguageModel:
        """Begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        """Ends what is under way."""

    def __call__(self, prompts: Sequence[str]) -> list[str | RowError]:
        """What it says to each of some prompts, or why it says nothing."""


def is_server(llm: str) -> bool:
    """Whether a language model is named by the address of its server."""
    return _URL.match(llm) is not None


class Served(ExitStack):
    """The language model of an OpenAI-compatible server, asked at that address alone; see `LanguageModel`.

    Args:
        url: Its address, up to `/v1`.
        name: Of the model there.
        key: Name of the environment variable that holds the key; None: none is sent.
        settings: For the server, over `USUAL`: `temperature`, `max_tokens` and their like; None leaves one out.
        kept: File in which replies are kept, so that none is paid for twice; None: nowhere.

    Raises:
        UserError: The address is none, or the key cannot be had or would go over the open network unencrypted.
    """

    def __init__(self, url: str, name: str, key: str | None, settings: Options, kept: Path | None) -> None:
        super().__init__()
        if taken := TAKEN & settings.keys():
            raise UserError(f"--llm-set {min(taken)} is not yours to set; leave it out.")
        self.name, self.settings, self.file = name, {**USUAL, **settings}, kept
        self._open = lambda: ChatServer(url, name, key, names=_NAMES)
        with closing(self._open()):  # the address and the key are looked at before anything is loaded
            pass
        self._kept: Kept | None = None
        self._answered = self._refused = 0

    def __call__(self, prompts: Sequence[str]) -> list[str | RowError]:
        """See `LanguageModel`.

        Raises:
            UserError: It cannot be reached, or refuses everything.
        """
        if self._kept is None and self.file is not None:
            self._kept = self.enter_context(Kept(self.file, "reply"))
        asked: list[list[dict[str, str]]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        keys = [key_of(self.name, messages, self.settings) for messages in asked]
        said = dict(self._kept.replies) if self._kept is not None else {}
        refused: dict[str, RowError] = {}
        missing = {key: messages for key, messages in zip(keys, asked, strict=True) if key not in said}
        if missing:
            with closing(ask_together(self._open(), missing, self.settings, len(missing))) as replies:
                for key, found in replies:
                    if isinstance(found, RowError):
                        refused[key] = found
                        self._refused += 1
                        if self._refused >= PATIENCE and not self._answered:
                            raise UserError(str(found))
                        continue
                    self._answered += 1
                    said[key] = found
                    if self._kept is not None:
                        self._kept.add(key, self.name, found)
        return [refused[key] if key in refused else _spoken(said[key].text) for key in keys]


class Local:
    """A language model on this machine; see `LanguageModel`.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: Its own.
        template: Jinja source of its chat template; "" for a model that goes on with what it is given.
        options: For transformers' `generate`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str, options: Options
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options = {**DEFAULTS, **({"do_sample": True} if SAMPLING.keys() & options.keys() else {}), **options}

    def __enter__(self) -> Local:
        """Begins."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Ends."""

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> list[str | RowError]:
        """See `LanguageModel`."""
        ids = [self._ids(prompt) for prompt in prompts]
        limit = position_limit(self.model)
        found: list[str | RowError] = [
            _too_long(len(each), limit) if limit is not None and len(each) >= limit else "" for each in ids
        ]
        asked = [number for number, each in enumerate(found) if not isinstance(each, RowError)]
        if not asked:
            return found
        longest = max(len(ids[number]) for number in asked)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        given = torch.tensor([[pad] * (longest - len(ids[n])) + ids[n] for n in asked], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(ids[n])) + [1] * len(ids[n]) for n in asked], device=given.device)
        new = self.options["max_new_tokens"] if limit is None else min(self.options["max_new_tokens"], limit - longest)
        settings = {**self.options, "max_new_tokens": new, "pad_token_id": pad, "eos_token_id": self._ends()}
        if (start := answer_start_of(self.model.config)) is not None:
            settings["decoder_start_token_id"] = start
        config = GenerationConfig(**settings)
        try:
            written = self.model.generate(input_ids=given, attention_mask=mask, generation_config=config)
        except (ValueError, TypeError, ImportError, OverflowError) as error:
            raise refusal(error) from error
        except torch.OutOfMemoryError:
            raise UserError(
                f"The GPU's memory does not hold {len(asked)} prompts at a time: run again with a smaller --batch-size "
                f"(the answers so far are kept)."
            ) from None
        begins = 0 if reads_by_encoder(self.model.config) else longest
        for number, row in zip(asked, written[:, begins:].tolist(), strict=True):
            found[number] = _spoken(self.tokenizer.decode(row, skip_special_tokens=True))
        return found

    def _ids(self, prompt: str) -> list[int]:
        for token in control_tokens(self.tokenizer, self.template):  # what a caption or a question says is text
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        if not self.template:
            whole: list[int] = self.tokenizer(prompt)["input_ids"]
            return whole
        text = ask(
            "render", self.template + _UNMARKED, "the language model's chat template",
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, tools=None, documents=None,
            bos_token=self.tokenizer.bos_token or "", eos_token=self.tokenizer.eos_token or "", **{MARKS: ("", "")},
        )  # fmt: skip
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _ends(self) -> list[int] | None:
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        return sorted(ends) or None


class Bundle:
    """A bundle that is asked in words alone; see `LanguageModel`."""

    def __init__(self, path: str, options: Options) -> None:
        self.model, self.processor, self.settings = open_bundle(path, options)
        if self.processor.chooses:
            raise UserError(f"--llm {path} chooses among answers and writes none: give a model that writes.")

    def __enter__(self) -> Bundle:
        """Begins."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Ends."""

    def __call__(self, prompts: Sequence[str]) -> list[str | RowError]:
        """See `LanguageModel`."""
        rows: list[Json] = [
            {"messages": [{"role": "user", "content": [text_part(prompt)]}], "images": []} for prompt in prompts
        ]
        said = answer_each(self.model, self.processor, rows, **self.settings)
        return [each if isinstance(each, RowError) else _spoken(str(each)) for each in said]


def load_language(llm: str, options: Options, device: str | torch.device | None = None) -> LanguageModel:
    """Loads a language model of this machine, of the Hub, or of a bundle.

    Args:
        llm: Folder, Hub id, GGUF file or bundle.
        options: For transformers' `generate`.
        device: Where it runs; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: It cannot be had, or is none.
    """
    check_options(options)
    if fetch_file(llm, MANIFEST, None, "--llm", required=False) is not None:
        return Bundle(llm, options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    with _called_llm():
        piece = find_language_model(Section(pretrained=llm))
        tokenizer = load_tokenizer(piece)
        model = load_language_model(piece, dtype).to(device).eval().requires_grad_(False)
        template = _template_of(piece.place, tokenizer)
    return Local(model, tokenizer, template, tidy(options))


def _template_of(place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template beside a model, in a file of its own or with its tokenizer; "" where there is none."""
    path = fetch_file(place, TEMPLATE, None, "--llm", required=False)
    if path is not None:
        check_length(path, most_bytes(TEMPLATE))
        return read_text(path, errors="replace")
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""


@contextmanager
def _called_llm() -> Iterator[None]:
    """Lets messages name the option, where a recipe's key would stand."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("stack.language_model.pretrained", "--llm")) from error


def _spoken(text: str) -> str:
    """What is said behind what was thought aloud, in one line."""
    return one_line(text.rpartition(THOUGHT)[2])


def _too_long(length: int, limit: int) -> RowError:
    sentence = f"the prompt has {length:,} tokens, and the language model reads {limit:,}: shorten the question."
    return RowError(sentence, where="", reason="too long")
