"""VQA + LLM: a caption, a question and the likeliest answers of a VQA model → one prompt → a language model's answer.

The scheme that VLE's authors propose (github.com/iflytek/VLE, VQA+LLM): the encoder sees, the language model reasons
and writes. `vlm-sft answer … --llm LLM --captioner CAPTIONER`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..base.console import tell
from ..base.errors import RowError, UserError
from ..base.names import Options, Record
from ..base.whole_files import digest
from ..base.words import CHINESE, language_of, one_line, short
from ..batch.pictures import Pictures, check_pictures
from ..inference.encoder import Asked, answer_many, answer_with
from ..metrics.choices import REFUSAL, can_infer, lettered
from .captioner import Captioner, load_captioner
from .language_model import LanguageModel, Served, is_server, load_language

REPLIES = ("sentence", "letter")
CAPTION = "picture_caption"
KEPT_CAPTIONS = 256  # rows of a file often ask several questions about one picture, one behind the other

_PROMPTS = {
    "en": (
        "A picture shows: {caption}\n"
        "Question about the picture: {question}\n"
        "A model that sees the picture gives these answers, each with its confidence: {answers}.\n"
        "{options}The caption leaves things out, and the answers may be wrong. {wish}"
    ),
    "zh": (
        "一张图片的内容：{caption}\n"
        "关于图片的问题：{question}\n"
        "一个看得到图片的模型给出的答案及其置信度：{answers}。\n"
        "{options}描述并不完整，答案也可能有误。{wish}"
    ),
}
_WISHES = {
    ("en", "sentence"): "Answer the question in one sentence.",
    ("en", "letter"): "Answer with the letter of the right option alone.",
    ("zh", "sentence"): "请用一句话回答问题。",
    ("zh", "letter"): "请只回答正确选项的字母。",
}
_OPTIONS = {"en": ("Options: ", "; ", ".\n"), "zh": ("选项：", "；", "。\n")}
_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_LISTED = re.compile(r"(?:^|[\s(（])([A-Z])\s*[.)）、:：．]\s*")


@dataclass(frozen=True)
class Scheme:
    """How a question is asked on.

    Attributes:
        llm: Folder, Hub id or bundle of a language model, or the address of its server.
        captioner: See `load_captioner`.
        name: Of the model at the server.
        key: Name of the environment variable with the server's key.
        settings: For the language model.
        reply: One of `REPLIES`.
        language: Of the prompt, `en` or `zh`; None: that of the question.
    """

    llm: str
    captioner: str
    name: str | None = None
    key: str | None = None
    settings: Options = field(default_factory=dict)
    reply: str = "sentence"
    language: str | None = None

    def __post_init__(self) -> None:
        """Looks at what is said before anything is loaded.

        Raises:
            UserError: Something does not go together.
        """
        if self.reply not in REPLIES:
            raise UserError(f"--reply must be one of {', '.join(REPLIES)}, not {self.reply}.")
        if self.language not in (None, *_PROMPTS):
            raise UserError(f"--language must be one of {', '.join(_PROMPTS)}, not {self.language}.")
        if is_server(self.llm) and not self.name:
            raise UserError("--llm names a server; name the model there too, with --llm-model.")
        if not is_server(self.llm) and (self.name or self.key):
            given = "--llm-model" if self.name else "--llm-key"
            raise UserError(f"{given} belongs to a server, and --llm {self.llm} is none: leave it out, or give a URL.")

    def language_model(self, kept: Path | None = None) -> LanguageModel:
        """The language model; that of a server is not asked yet.

        Args:
            kept: File in which the replies of a server are kept.

        Raises:
            UserError: It cannot be had.
        """
        if is_server(self.llm):
            return Served(self.llm, self.name or "", self.key, self.settings, kept)
        return load_language(self.llm, self.settings)


class Explainer:
    """Turns the likeliest answers of a VQA model into a language model's.

    Args:
        scheme: How.
        llm: The language model, within its context.
    """

    def __init__(self, scheme: Scheme, llm: LanguageModel) -> None:
        self.scheme, self.llm = scheme, llm
        self.captioner: Captioner = load_captioner(scheme.captioner, {})
        self._captions: dict[bytes, str | RowError] = {}

    def __call__(self, asked: Sequence[Asked]) -> None:
        """Writes into each question's line the caption and, as `answer`, what the language model says; or `error`."""
        told: list[tuple[Record, str, Mapping[str, str], str]] = []
        for each in asked:
            line = each.line
            try:
                language = self.scheme.language or language_of(each.text)
                line[CAPTION] = caption = self._caption(each, language)
                question, choices = self._choices(each)
                prompt = prompt_of(caption, question, line["top_answers"], choices, self.scheme.reply, language)
                told.append((line, prompt, choices, each.where))
            except RowError as error:
                _fail(line, error)
        replies = self.llm([prompt for _, prompt, *_ in told]) if told else []
        for (line, _, choices, where), said in zip(told, replies, strict=True):
            try:
                line["answer"] = self._answer(said, choices, where)
            except RowError as error:
                _fail(line, error)

    def _answer(self, said: str | RowError, choices: Mapping[str, str], where: str) -> str:
        if isinstance(said, RowError):
            raise RowError(f"{where}: {said}", where=where, reason=said.reason)
        if not said:
            raise RowError(f"{where}: the language model said nothing.", where=where, reason="no answer")
        if self.scheme.reply == "sentence":
            return said
        if (letter := letter_of(said, choices)) is None:
            sentence = f"{where}: the language model names none of the letters {', '.join(choices)}: {short(said)!r}."
            raise RowError(sentence, where=where, reason="no letter")
        return letter

    def _choices(self, asked: Asked) -> tuple[str, Mapping[str, str]]:
        """The question, and letter → option where one is to be chosen.

        Raises:
            RowError: A letter is wanted, and there are no options.
        """
        given = asked.line.get("options")
        if isinstance(given, Mapping):
            given = list(given.values()) if list(given) == list(lettered(list(given)[:26])) else None
        if isinstance(given, list) and 2 <= len(given) <= 26 and all(isinstance(each, str | int) for each in given):
            return asked.text, lettered([one_line(each) for each in given])
        if self.scheme.reply == "sentence":
            return asked.text, {}
        if found := options_in(asked.text):
            return asked.text, found
        sentence = (
            f"{asked.where}: a letter is wanted, and there are no options: give a list of 2 to 26 texts under `options`"
            f", or write them into the question (A. … B. …)."
        )
        raise RowError(sentence, where=asked.where, reason="no options")

    def _caption(self, asked: Asked, language: str) -> str:
        """What the picture shows, said in a language where the captioner can be asked in it."""
        key = digest(repr((language, asked.image.size)).encode() + asked.image.tobytes())
        if key not in self._captions:
            if len(self._captions) >= KEPT_CAPTIONS:
                self._captions.pop(next(iter(self._captions)))
            self._captions[key] = self._made(asked, language)
        if isinstance(caption := self._captions[key], RowError):
            raise RowError(f"{asked.where}: {caption}", where=asked.where, reason=caption.reason)
        return caption

    def _made(self, asked: Asked, language: str) -> str | RowError:
        prompts = self.captioner.prompts
        prompt = prompts.get(language, next(iter(prompts.values())))
        row = Pictures([asked.image])
        try:
            check_pictures(self.captioner.reader, row)
            said = next(iter(self.captioner.captions([row], prompt, 1)))[0]
        except RowError as error:
            return error
        return said if isinstance(said, RowError) else one_line(said)


def _fail(line: Record, error: RowError) -> None:
    line.pop("answer", None)
    line["error"] = str(error)


def prompt_of(
    caption: str,
    question: str,
    answers: Sequence[Sequence[object]],
    choices: Mapping[str, str],
    reply: str,
    language: str,
) -> str:
    """The prompt that a language model gets.

    Args:
        caption: What the picture shows.
        question: About it.
        answers: `[answer, share]`, the likeliest first.
        choices: Letter → option; none where the question has them itself, or a sentence is wanted.
        reply: One of `REPLIES`.
        language: `en` or `zh`.
    """
    between = "、" if language == CHINESE else ", "
    said = between.join(f"{one_line(answer)} ({float(share):.1%})" for answer, share in answers)  # type: ignore[arg-type]
    begin, comma, end = _OPTIONS[language]
    named = [] if options_in(question) else [f"{letter}. {option}" for letter, option in choices.items()]
    options = f"{begin}{comma.join(named)}{end}" if named else ""
    wish = _WISHES[language, reply]
    return _PROMPTS[language].format(caption=caption, question=question, answers=said, options=options, wish=wish)


def options_in(question: str) -> dict[str, str]:
    """Letter → option where a question lists them from A on; else nothing."""
    found = list(_LISTED.finditer(question))
    letters = [each[1] for each in found]
    if len(found) < 2 or letters != list(lettered(letters)):
        return {}
    ends = [each.start() for each in found[1:]] + [len(question)]
    return {each[1]: question[each.end() : end].strip() for each, end in zip(found, ends, strict=True)}


def letter_of(said: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, alone, as in 答案是B, or by its option's words; None where it is not clear."""
    found = can_infer(said, choices)
    if found is None and language_of(said) == CHINESE:
        named = {each for each in _LETTER.findall(said) if each in choices}
        found = named.pop() if len(named) == 1 else None
    return None if found == REFUSAL and REFUSAL not in choices else found


def explain_one(
    model: str,
    question: str,
    image: str,
    top: int,
    scheme: Scheme,
    candidates: str | None = None,
    tokenizer: str | None = None,
) -> Record:
    """Prints a language model's answer to a question about an image; on standard error the caption and the VQA model's.

    Returns:
        `answer`, `top_answers` and `picture_caption`.

    Raises:
        UserError: A model, the question or the image is wrong.
    """
    with scheme.language_model() as llm:
        asked = answer_with(model, question, image, top, candidates, tokenizer)
        Explainer(scheme, llm)([asked])
    line = asked.line
    tell(line.get(CAPTION, ""), stderr=True)
    for answer, share in line["top_answers"]:
        tell(f"{share:.4f}\t{one_line(answer)}", stderr=True)
    if "error" in line:
        raise UserError(line["error"])
    tell(line["answer"])
    return line


def explain_many(
    model: str,
    questions: str,
    output: str,
    top: int,
    batch_size: int,
    scheme: Scheme,
    images: str | None = None,
    image_folders: Sequence[str] = (),
    candidates: str | None = None,
    tokenizer: str | None = None,
) -> Record:
    """Answers a file of questions by the scheme into a JSONL file; a rerun goes on, and no reply is paid for twice.

    Args: as `answer_many`, and the scheme. Each line has `answer`, `top_answers` and `picture_caption`; or `error`.

    Returns:
        As `answer_many`.

    Raises:
        UserError: As `answer_many`.
    """
    file = Path(output).expanduser()
    kept = file.with_name(f"{file.name}.llm.jsonl")
    # That of a server looks at its address before anything else is done.
    server = scheme.language_model(kept) if is_server(scheme.llm) else None
    with ExitStack() as held:

        def open_next() -> Explainer:
            return Explainer(scheme, held.enter_context(server or scheme.language_model()))

        return answer_many(
            model, questions, output, top, batch_size, images, image_folders, candidates, tokenizer, open_next=open_next
        )
