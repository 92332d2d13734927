"""Yes or no: how POPE and MME read an answer, and what they make of all answers."""

from __future__ import annotations

_NO = frozenset(("No", "not", "no"))


def pope_says_yes(answer: str) -> bool:
    """Whether an answer means yes by the rule of POPE's authors: no "No", "no" or "not" in its first sentence."""
    return not _NO & set(answer.split(".")[0].replace(",", "").split(" "))


def mme_says(answer: str) -> str:
    """`yes`, `no` or `other`: MME's `calculation.py` looks at the first four letters."""
    answer = answer.lower().strip().replace(".", "")
    if answer in ("yes", "no"):
        return answer
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "other")
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")
