"""What the answers to the rows of a format are measured by.

Everything in this room takes and returns plain strings and numbers, so that it can be tested without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .exact_match import exact_match, gqa_exact_match
from .vqa import vqa_accuracy

Metric = Callable[[str, Sequence[str]], float]

EXACT_MATCH: dict[str, Metric] = {"exact_match": exact_match}
_VCR: dict[str, Metric] = {"VCR_accuracy": lambda prediction, references: float(prediction == references[0])}
METRICS: dict[str, dict[str, Metric]] = {
    "vqav2": {"VQA_accuracy": vqa_accuracy, "VQA_accuracy_EvalAI": partial(vqa_accuracy, style="evalai")},
    **dict.fromkeys(("vcr", "vcr_q2a", "vcr_qa2r"), _VCR),
    "gqa": {"GQA_exact_match": lambda prediction, references: gqa_exact_match(prediction, references[0])},
}
"""Format of a source → what its benchmark is measured by, first what counts as its accuracy. All other sources are
measured by `EXACT_MATCH`."""
