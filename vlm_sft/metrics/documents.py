"""Answers read off documents, charts and signs: ANLS, relaxed accuracy, OCRBench's rule."""

from __future__ import annotations

from collections.abc import Sequence

from .exact_match import FULL_WIDTH

ANLS_THRESHOLD = 0.5
MOST_CHANGE = 0.05  # share by which a number may be wrong for relaxed accuracy


def anls(prediction: str, references: Sequence[str]) -> float:
    """1 - normalised edit distance to the nearest reference, 0 below `ANLS_THRESHOLD`; as lmms-eval and Qwen-VL.

    The distance is between the texts in lower case with single spaces, its length that of the raw texts in upper case
    (upstream has it so: more spaces make a text longer, and an ß counts two).

    Raises:
        ValueError: There is no reference.
    """
    if not references:
        raise ValueError("anls needs at least one reference.")
    said = " ".join(prediction.lower().split())
    shares = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))
        shares.append(distance(" ".join(reference.lower().split()), said) / length if length else 0.0)
    score = 1 - min(shares)
    return score if score >= ANLS_THRESHOLD else 0.0


def distance(one: str, other: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions from one text to the other."""
    one, other = sorted((one, other), key=len)
    row = list(range(len(one) + 1))
    for i, letter in enumerate(other, start=1):
        last, row[0] = row[0], i
        for j, mine in enumerate(one, start=1):
            last, row[j] = row[j], last if mine == letter else 1 + min(last, row[j], row[j - 1])
    return row[-1]


def relaxed_match(prediction: str, target: str) -> bool:
    """ChartQA's relaxed accuracy: a number within 5 % of the right one, else the same text but for case.

    As Qwen-VL and lmms-eval have it: `5%` is 0.05, and where the right number is 0 the texts are compared.
    """
    said, right = _number(prediction), _number(target)
    if said is not None and right:
        return abs(said - right) / abs(right) <= MOST_CHANGE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocr_contains(prediction: str, references: Sequence[str], formula: bool = False) -> bool:
    """OCRBench's rule: one of the right answers stands in what the model says.

    Args:
        prediction: What the model said.
        references: Right answers.
        formula: A handwritten formula (HME100k), where case counts and spaces do not.
    """

    def clean(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(FULL_WIDTH).lower().strip().replace("\n", " ")

    return any(clean(reference) in clean(prediction.strip()) for reference in references)
