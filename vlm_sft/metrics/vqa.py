"""The two VQA accuracies: the official script of VQA-v2 to the letter, and EvalAI's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)], strict=True))
_ARTICLES = frozenset({"a", "an", "the"})
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# Upstream's look-behind is misspelled, so that only a digit after the period protects it.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # upstream hands re.UNICODE (32) to the position of `count`

# The contractions that the official script restores. Its table maps each of them with exactly one apostrophe missing
# (dont, couldnt've, couldn'tve) to the full form; entries that can never match lower-cased text are left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's that'd've there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # upstream has this pair the wrong way round


def vqa_accuracy(
    prediction: str, human_answers: Sequence[str], style: Literal["official", "evalai"] = "official"
) -> float:
    """VQA-v2 accuracy of one answer: mean over the leave-one-out sets of ``min(1, matches / 3)``.

    Args:
        prediction: what the model answered.
        human_answers: the annotators' answers, ten in VQA-v2.
        style: ``official`` is the script of VQA-v2 to the letter (LAVIS ``vqa_eval.py``): the prediction is normalised
            in full, the human answers lose only their punctuation, and only where they disagree, so a unanimous
            ``t-shirt`` can never be matched. ``evalai`` (Pythia, MMF, LLaVA) normalises both sides in full, always.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: when there is no human answer or the style is unknown.
    """
    if not human_answers:
        raise ValueError("vqa_accuracy needs at least one human answer.")
    if style == "evalai":
        prediction = normalised(prediction)
        answers = [normalised(answer) for answer in human_answers]
    elif style == "official":
        prediction = _words(_without_marks(re.sub("[\n\t]", " ", prediction).strip()))
        answers = list(human_answers)
        if len(set(answers)) > 1:
            answers = [_without_marks(answer) for answer in answers]
    else:
        raise ValueError(f'style is "{style}", but it must be "official" or "evalai".')
    matches = sum(answer == prediction for answer in answers)
    # Leaving out one that matches leaves matches - 1 among the others; the sum over all annotators follows.
    hit, miss = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * hit + (len(answers) - matches) * miss) / len(answers)


def normalised(text: str) -> str:
    """Normalise as EvalAI's answer processor: its tokenisation, then marks, numbers, articles, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_without_marks(re.sub("[\n\t]", " ", text).strip()))


def _without_marks(text: str) -> str:
    """Delete marks that touch a space (all marks where a number is written 1,000); replace the others by a space."""
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _MARKS:
        delete = delete_all or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def _words(text: str) -> str:
    """Lower-case, write numbers as digits, drop articles, restore the apostrophes of contractions."""
    words = [str(_NUMBERS.get(word, word)) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
