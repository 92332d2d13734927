"""CIDEr, BLEU and ROUGE-L of captions by pycocoevalcap; BLEU-4 and ROUGE-L of Chinese by sacrebleu and rouge-chinese.

pycocoevalcap's own tokeniser is a Java program. Without it captions are cut by `words_of`, which follows its rules for
the words that captions have; `ptb` asks for the program itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.errors import UserError
from ..base.names import Values

EXTRA = 'pip install "vlm-sft[eval]"'
_ENDINGS = re.compile(r"(n't|'s|'re|'ve|'ll|'d|'m)\b|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\d)(?=[ap]m\b)")
_BRACKETS = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_WORD = re.compile(r"-[lr][rsc]b-|n't|'(?:s|re|ve|ll|d|m)\b|(?:\b[a-z]\.){2,}|#?\w+(?:[-./,:]\w+)*|[&$%@]|[!?]{2,}")


class CaptionScores(NamedTuple):
    """What pycocoevalcap says of N captions.

    Attributes:
        cider: (N,) of each; that of all is their mean.
        rouge: (N,) likewise.
        bleu: (N, 10) what BLEU is made of, to be summed: n-grams that are right and that there are, of 1 to 4 words,
            words of the captions and of the closest references.
    """

    cider: NDArray[np.float64]
    rouge: NDArray[np.float64]
    bleu: NDArray[np.float64]


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokens: str = "words"
) -> CaptionScores:
    """Scores captions; each against its own references, of which those of all give CIDEr its weights.

    Args:
        candidates: N captions.
        references: Of each, at least one.
        tokens: A key of `TOKENS`.

    Raises:
        UserError: pycocoevalcap is not installed, or what `tokens` asks for.
        ValueError: There is no caption, or one has no reference.
    """
    if not candidates or not all(references):
        raise ValueError("captions are scored against at least one reference each, and there must be some.")
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise _missing("pycocoevalcap", error) from None
    said, right = TOKENS[tokens](candidates, references)
    ours = {number: [text] for number, text in enumerate(said)}
    theirs = dict(enumerate(right))
    with redirect_stdout(StringIO()):
        _, cider = Cider().compute_score(theirs, ours)
        _, rouge = Rouge().compute_score(theirs, ours)
        scorer = BleuScorer(n=4)
        for number, text in enumerate(said):
            scorer += (text, right[number])
        scorer.compute_score(option="closest", verbose=0)
    counts = [[*each["correct"], *each["guess"], each["testlen"], _closest(each)] for each in scorer.ctest]
    return CaptionScores(np.asarray(cider, float), np.asarray(rouge, float), np.asarray(counts, float))


def _closest(entry: Values) -> float:
    """Words of the reference whose length is closest, of two the shorter."""
    said = entry["testlen"]
    return float(min((abs(length - said), length) for length in entry["reflen"])[1])


def bleu_of(sums: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """(…, 10) sums of `CaptionScores.bleu` → (…) BLEU of 1 to n words, with the constants of pycocoevalcap."""
    small, tiny = 1e-9, 1e-15
    right, there = sums[..., :4], sums[..., 4:8]
    score = np.prod((right[..., :n] + tiny) / (there[..., :n] + small), axis=-1) ** (1.0 / n)
    ratio = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    return score * np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)


def score_chinese(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float64], list[float]]:
    """Chinese BLEU-4 by sacrebleu (`tokenize="zh"`) and ROUGE-L by rouge-chinese over jieba's words.

    Returns:
        (N, 10) what BLEU is made of, to be summed, for `sacrebleu_of`; and N F1 scores of ROUGE-L, each of the
        reference that gives the most.

    Raises:
        UserError: One of the three is not installed.
    """
    try:
        import jieba
        from rouge_chinese import Rouge
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing("sacrebleu, rouge-chinese or jieba", error) from None
    bleu = BLEU(tokenize="zh", effective_order=True)  # without `effective_order` it warns; the counts are the same
    counts = []
    for said, right in zip(candidates, references, strict=True):
        found = bleu.sentence_score(said, list(right))
        counts.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    jieba.setLogLevel(60)
    rouge = Rouge(metrics=["rouge-l"])

    def cut(text: str) -> str:
        return " ".join(jieba.cut(text))

    def best(said: str, right: Sequence[str]) -> float:
        pairs = [(cut(said), cut(each)) for each in right]
        scores = (rouge.get_scores(*pair)[0]["rouge-l"] for pair in pairs if all(text.strip() for text in pair))
        return max((float(score["f"]) for score in scores), default=0.0)

    return np.asarray(counts, float), [best(a, b) for a, b in zip(candidates, references, strict=True)]


def sacrebleu_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…, 10) sums of `score_chinese` → (…) BLEU-4 from 0 to 1, as sacrebleu computes it of the corpus."""
    from sacrebleu.metrics import BLEU

    flat = sums.reshape(-1, 10)
    found = [
        BLEU.compute_bleu(row[:4].tolist(), row[4:8].tolist(), int(row[8]), int(row[9]), smooth_method="exp").score
        / 100
        for row in flat.astype(int)
    ]
    return np.asarray(found).reshape(sums.shape[:-1])


def words_of(text: str) -> str:
    """English cut into words, without punctuation, in lower case, as pycocoevalcap's PTB tokeniser cuts captions."""
    text = text.lower().translate(_BRACKETS)
    return " ".join(_WORD.findall(_ENDINGS.sub(lambda found: f" {found[0]}", text)))


def characters_of(text: str) -> str:
    """Chinese cut into characters."""
    return " ".join(text.replace(" ", ""))


Texts = Sequence[str]
Cut = Callable[[Texts, Sequence[Texts]], tuple[list[str], list[list[str]]]]


def _each(cut: Callable[[str], str]) -> Cut:
    def run(candidates: Texts, references: Sequence[Texts]) -> tuple[list[str], list[list[str]]]:
        return [cut(text) for text in candidates], [[cut(text) for text in right] for right in references]

    return run


def _ptb(candidates: Texts, references: Sequence[Texts]) -> tuple[list[str], list[list[str]]]:
    if shutil.which("java") is None:
        raise UserError('tokens "ptb" is a Java program, and there is no `java`: install it, or use "words".')
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def run(texts: Mapping[int, Texts]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({n: [{"caption": text} for text in each] for n, each in texts.items()})

    said, right = run({n: [text] for n, text in enumerate(candidates)}), run(dict(enumerate(references)))
    return [said[n][0] for n in range(len(candidates))], [right[n] for n in range(len(references))]


TOKENS: dict[str, Cut] = {
    "words": _each(words_of),
    "whitespace": _each(lambda text: text),
    "characters": _each(characters_of),
    "ptb": _ptb,
}
"""How captions are cut."""


def _missing(what: str, error: ImportError) -> UserError:
    return UserError(f"This metric needs {what}, which is not installed ({error.name}): {EXTRA}.")
