"""What a benchmark is measured by: answers → a score of each question, and totals with what their intervals need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import mmmu
from .captions import bleu_of, sacrebleu_of, score_captions, score_chinese
from .choices import can_infer, can_infer_option, option_of_ai2d, option_of_llava, option_of_seed
from .documents import anls, ocr_contains, relaxed_match
from .exact_match import contains, exact_match, gqa_exact_match
from .intervals import Total, mean_of, ratio
from .vqa import vqa_accuracy
from .yes_no import mme_says, pope_says_yes


class Answered(NamedTuple):
    """A question that was answered.

    Attributes:
        answer: What the model said.
        answers: What is right, all of it; of choices the letters.
        choices: Letter to option, or none.
        kind: The benchmark's own category, or "".
        group: Questions of one group belong together: the rotations of one, the two about one picture.
        verdicts: Of a judge: what each gives the reference and the answer, or None where it names no scores. The
            reference comes first in those of even places; an answer judged alone has one, with the top of the scale.
    """

    answer: str
    answers: Sequence[str]
    choices: dict[str, str] = {}
    kind: str = ""
    group: str = ""
    verdicts: Sequence[tuple[float, float] | None] = ()


class Measured(NamedTuple):
    """What a measure finds.

    Attributes:
        each: A score of each question, in order.
        totals: Name of a score to the score, first what the benchmark is ranked by.
    """

    each: list[float]
    totals: dict[str, Total]


_LETTERS = dict.fromkeys("ABCD", "")  # letters of options that stand in the question itself

Measure = Callable[[Sequence[Answered]], Measured]


def _share(name: str, score: Callable[[Answered], float]) -> Measure:
    """The mean of a score of each question."""

    def measure(asked: Sequence[Answered]) -> Measured:
        each = [float(score(one)) for one in asked]
        return Measured(each, {name: mean_of(each)})

    return measure


def _vqa(asked: Sequence[Answered], first: str = "official") -> Measured:
    """Both VQA accuracies."""
    found = {
        "VQA_accuracy": [vqa_accuracy(one.answer, one.answers) for one in asked],
        "VQA_accuracy_EvalAI": [vqa_accuracy(one.answer, one.answers, "evalai") for one in asked],
    }
    names = list(found) if first == "official" else list(found)[::-1]
    return Measured(found[names[0]], {name: mean_of(found[name]) for name in names})


def _choice_is_right(one: Answered) -> bool:
    return can_infer(one.answer, one.choices) in one.answers


def _mmmu_is_right(one: Answered) -> bool:
    if one.choices:
        return mmmu.choice(one.answer, one.choices) in one.answers
    return mmmu.open_is_right(one.answer, one.answers)


def _ocrbench(one: Answered) -> float:
    return ocr_contains(one.answer, one.answers, formula=one.kind == "Handwritten Mathematical Expression Recognition")


def _circular(asked: Sequence[Answered]) -> Measured:
    """MMBench: a question is right where every rotation of its options is."""
    each = [float(_choice_is_right(one)) for one in asked]
    whole: dict[str, float] = {}
    for one, hit in zip(asked, each, strict=True):
        whole[one.group] = min(hit, whole.get(one.group, 1.0))
    return Measured(each, {"circular_accuracy": mean_of(list(whole.values())), "accuracy": mean_of(each)})


def _pope(asked: Sequence[Answered]) -> Measured:
    """POPE: yes is what is looked for; `accuracy_strict` takes only an answer of that one word, as lmms-eval does."""
    says = np.array([pope_says_yes(one.answer) for one in asked])
    right = np.array([one.answers[0].strip().lower() == "yes" for one in asked])
    strict = [float(one.answer.strip().lower() == one.answers[0].strip().lower()) for one in asked]
    each = (says == right).astype(float)
    parts = np.stack([says & right, says & ~right, ~says & right, np.ones(len(asked), bool)], axis=1).astype(float)

    def safe(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        return above / np.maximum(below, 1)

    totals = {
        "accuracy": mean_of(each),
        "F1": Total(parts, lambda s: safe(2 * s[..., 0], 2 * s[..., 0] + s[..., 1] + s[..., 2])),
        "precision": Total(parts, lambda s: safe(s[..., 0], s[..., 0] + s[..., 1])),
        "recall": Total(parts, lambda s: safe(s[..., 0], s[..., 0] + s[..., 2])),
        "yes_share": Total(parts, lambda s: safe(s[..., 0] + s[..., 1], s[..., 3])),
        "accuracy_strict": mean_of(strict),
    }
    return Measured(each.tolist(), totals)


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def _mme(asked: Sequence[Answered]) -> Measured:
    """MME: of each subtask 100 x (share of right answers + share of pictures with all answers right), summed."""
    each = [float(mme_says(one.answer) == one.answers[0].strip().lower().replace(".", "")) for one in asked]
    pairs: dict[tuple[str, str], list[float]] = {}
    for one, hit in zip(asked, each, strict=True):
        pairs.setdefault((one.kind, one.group), []).append(hit)
    kinds = sorted({kind for kind, _ in pairs})

    def points(wanted: Sequence[str]) -> Total:
        """Of each picture: by subtask, the sum of its points, and that it is there."""
        parts = np.zeros((len(pairs), 2 * len(wanted)))
        for number, ((kind, _), hits) in enumerate(pairs.items()):
            if kind in wanted:
                place = wanted.index(kind)
                parts[number, place] = 100 * (sum(hits) / len(hits) + float(all(hits)))
                parts[number, len(wanted) + place] = 1
        count = len(wanted)
        return Total(parts, lambda s: (s[..., :count] / np.maximum(s[..., count:], 1)).sum(axis=-1))

    totals = {
        name: points(wanted)
        for name, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        if (wanted := [kind for kind in kinds if kind in names])
    }
    others = [kind for kind in kinds if kind not in (*PERCEPTION, *COGNITION)]
    totals |= {"points": points(others)} if others else {}
    return Measured(each, {**totals, "accuracy": mean_of(each)})


def _captions(asked: Sequence[Answered], tokens: str = "words") -> Measured:
    found = score_captions([one.answer for one in asked], [one.answers for one in asked], tokens)
    bleus = {f"BLEU-{n}": Total(found.bleu, partial(bleu_of, n=n)) for n in (4, 3, 2, 1)}
    return Measured(found.cider.tolist(), {"CIDEr": mean_of(found.cider), "ROUGE-L": mean_of(found.rouge), **bleus})


def _chinese(asked: Sequence[Answered]) -> Measured:
    counts, rouge = score_chinese([one.answer for one in asked], [one.answers for one in asked])
    return Measured(rouge, {"ROUGE-L": mean_of(rouge), "BLEU-4": Total(counts, sacrebleu_of)})


def _judge(asked: Sequence[Answered]) -> Measured:
    """LLaVA-Bench: 100 x the sum of the scores of answers / that of their references, and what being shown first gives.

    A verdict that names no scores counts nowhere; a question without any has no score (nan).
    """
    # For each question and order: sums of the reference's and the answer's scores, and how many.
    orders = np.zeros((len(asked), 2, 3))
    for number, one in enumerate(asked):
        for place, verdict in enumerate(one.verdicts):
            orders[number, place] += (0, 0, 0) if verdict is None else (*verdict, 1)
    both = orders.sum(axis=1)
    judged = both[:, 2] > 0

    def relative(parts: NDArray[np.float64]) -> Total:
        parts = parts[parts[:, 2] > 0]
        return Total(parts if len(parts) else np.zeros((1, 3)), lambda s: 100 * s[..., 1] / np.maximum(s[..., 0], 1e-9))

    totals = {"relative_score": relative(both)}
    kinds = list(dict.fromkeys(one.kind for one in asked))
    if len(kinds) > 1:
        totals |= {f"relative_{kind or 'other'}": relative(both[[one.kind == kind for one in asked]]) for kind in kinds}
    totals["answer_score"] = Total(both[judged][:, 1:], ratio) if judged.any() else mean_of([0.0])
    totals["reference_score"] = Total(both[judged][:, ::2], ratio) if judged.any() else mean_of([0.0])
    if orders[:, 1, 2].any():
        totals |= {"relative_reference_first": relative(orders[:, 0]), "relative_answer_first": relative(orders[:, 1])}
        pairs = orders[(orders[:, :, 2] > 0).all(axis=1)]
        first, second = pairs[:, 0, 0] + pairs[:, 1, 1], pairs[:, 1, 0] + pairs[:, 0, 1]
        shown = np.stack([first, second], axis=1) if len(pairs) else np.ones((1, 2))
        totals["gain_of_first"] = Total(shown, lambda s: s[..., 0] / s[..., 1] - 1)
    each = np.where(judged, both[:, 1] / np.maximum(both[:, 0], 1e-9), np.nan)
    return Measured(each.tolist(), totals)


def _any(score: Callable[[str, str], float]) -> Callable[[Answered], float]:
    return lambda one: max(score(one.answer, right) for right in one.answers)


MEASURES: dict[str, Measure] = {
    "exact_match": _share("exact_match", lambda one: exact_match(one.answer, one.answers)),
    "contains": _share("contains", lambda one: contains(one.answer, one.answers)),
    "gqa": _share("accuracy", _any(gqa_exact_match)),
    "vqa": _vqa,
    "vqa_evalai": partial(_vqa, first="evalai"),
    "choice": _share("accuracy", _choice_is_right),
    "choice_circular": _circular,
    "letter": _share("accuracy", lambda one: can_infer_option(one.answer, _LETTERS) in one.answers),
    "choice_llava": _share("accuracy", lambda one: option_of_llava(one.answer, one.choices) in one.answers),
    "choice_seed": _share("accuracy", lambda one: option_of_seed(one.answer) in one.answers),
    "choice_ai2d": _share("accuracy", lambda one: gqa_exact_match(option_of_ai2d(one.answer), one.answers[0])),
    "mmmu": _share("accuracy", _mmmu_is_right),
    "pope": _pope,
    "mme": _mme,
    "anls": _share("ANLS", lambda one: anls(one.answer, one.answers)),
    "relaxed": _share("relaxed_accuracy", _any(relaxed_match)),
    "ocrbench": _share("accuracy", _ocrbench),
    "captions": _captions,
    "captions_whitespace": partial(_captions, tokens="whitespace"),
    "captions_ptb": partial(_captions, tokens="ptb"),
    "captions_characters": partial(_captions, tokens="characters"),
    "chinese": _chinese,
    "judge": _judge,
}  # fmt: skip
"""Name of a metric, as a task has it → how it is measured."""

NEEDS_CHOICES = frozenset(name for name in MEASURES if name.startswith("choice"))
