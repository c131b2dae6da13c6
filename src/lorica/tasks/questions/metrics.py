"""Exact match and F1 of answers, as the official SQuAD scripts define them.

Rajpurkar et al., arXiv 1606.05250, section 6.1 (v1.1); Rajpurkar et al., arXiv 1806.03822, section 5 (v2.0).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an and the, words one blank apart.

    In this order: "the-best" is one word once its hyphen is gone, and keeps its "the".
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers once both are normalised, else 0.

    Args:
        prediction: "" for no answer.
        answers: all that count as right; none where the question has no answer.
    """
    return float(normalised(prediction) in {normalised(answer) for answer in _that_count(answers)})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over the answers: harmonic mean of precision and recall of words, repetitions counted.

    Where the prediction or the answer has no words, 1 if neither has any, else 0. That, and that answers without words
    do not count beside others, is v2.0's rule; v1.1's script would give 0 where neither has words.

    Args:
        prediction: "" for no answer.
        answers: all that count as right; none where the question has no answer.
    """
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in _that_count(answers))


def _f1(predicted: list[str], true: list[str]) -> float:
    if not predicted or not true:
        return float(predicted == true)
    return 2 * (Counter(predicted) & Counter(true)).total() / (len(predicted) + len(true))


def _that_count(answers: Sequence[str]) -> list[str]:
    return [answer for answer in answers if normalised(answer)] or [""]
