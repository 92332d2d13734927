"""Is the answer one of the right ones? Exact match for English and Chinese, and GQA's rule."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

# Full-width forms (U+FF01..U+FF5E) mirror ASCII at a fixed distance; the rest is what Chinese keyboards type.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_HALF_WIDTH = FULL_WIDTH | {
    ord("。"): ".",
    ord("、"): ",",
    ord("“"): '"',
    ord("”"): '"',
    ord("‘"): "'",
    ord("’"): "'",
}


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which two answers are compared.

    Case, outer and repeated white space, full-width against half-width characters (``３``, ``，``) and periods at the
    end (``.`` and ``。``) make no difference. Words, articles and inner punctuation do; Chinese characters stay as they
    are.
    """
    text = " ".join(text.translate(_HALF_WIDTH).lower().split())
    return text.rstrip(". ")


def exact_match(prediction: str, references: str | Sequence[str]) -> bool:
    """Whether the prediction equals one of the references after `normalise_answer`.

    Args:
        prediction: what the model answered.
        references: one right answer, or several of which any is right.

    Raises:
        ValueError: when there is no reference.
    """
    references = [references] if isinstance(references, str) else references
    if not references:
        raise ValueError("exact_match needs at least one reference.")
    wanted = normalise_answer(prediction)
    return any(wanted == normalise_answer(reference) for reference in references)


def contains(prediction: str, references: Sequence[str]) -> bool:
    """Whether one of the references stands in the prediction, after `normalise_answer`, as whole words.

    Of Chinese, which has no spaces, any place in the text will do.
    """
    said = normalise_answer(prediction)
    return any(_stands_in(normalise_answer(reference), said) for reference in references)


def _stands_in(wanted: str, said: str) -> bool:
    # A letter or digit of ASCII beside one makes it a part of another word: "cat" is not in "category".
    before, after = ("" if not end.isascii() or not end.isalnum() else "[a-z0-9]" for end in (wanted[:1], wanted[-1:]))
    pattern = (f"(?<!{before})" if before else "") + re.escape(wanted) + (f"(?!{after})" if after else "")
    return bool(wanted) and re.search(pattern, said) is not None


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa_exact_match(prediction: str, answer: str) -> bool:
    """GQA's exact match as lmms-eval computes it: without case and without ASCII punctuation, nothing else.

    Punctuation is deleted, not replaced by a space: ``tshirt`` equals ``t-shirt`` and ``t shirt`` does not.
    """

    def clean(text: str) -> str:
        # Upstream passes through NumPy string arrays, which lose trailing NULs.
        return text.rstrip("\0").lower().translate(_NO_PUNCTUATION)

    return clean(prediction.strip()) == clean(answer)
