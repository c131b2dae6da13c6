"""Exact match and F1, each rule by a case made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lorica.tasks.questions.metrics import exact_match, f1, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Denver Broncos", "denver broncos"),
        ("  Denver \t Broncos\n", "denver broncos"),
        ("U.S.", "us"),
        ("(1,000)", "1000"),
        ("The Panthers", "panthers"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("theatre anthem area", "theatre anthem area"),
        # Punctuation goes first, so an article that it had set apart is one no more.
        ("the-best", "thebest"),
        ("A.", ""),
        ("a\u00a0cat", "cat"),
        # Only ASCII punctuation goes.
        ("“Gold”", "“gold”"),
        ("24–10", "24–10"),
        ("6½", "6½"),
        ("The the THE", ""),
        ("an_the", "anthe"),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "score"),
    [
        ("the Broncos!", ["Broncos"], 1, 1),
        ("Denver Broncos", ["Broncos"], 0, 2 / 3),
        ("Broncos", ["Denver Broncos of Colorado"], 0, 2 * 1 * 0.25 / 1.25),
        ("Panthers", ["Broncos"], 0, 0),
        # The best answer counts, each score by itself.
        ("Denver Broncos", ["Broncos", "the Denver Broncos", "Colorado"], 1, 1),
        ("Denver team", ["Denver", "Denver Broncos team"], 0, 0.8),
        # A word counts as often as both have it.
        ("no no no", ["no no yes"], 0, 2 / 3),
        ("one", ["one one one"], 0, 0.5),
        # Order does not matter to F1.
        ("Broncos Denver", ["Denver Broncos"], 0, 1),
        # No answer: all or nothing.
        ("", [], 1, 1),
        ("Denver", [], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", [], 1, 1),
        ("the", ["Denver"], 0, 0),
        # An answer without words counts as none, and beside another one not at all.
        ("", ["a"], 1, 1),
        ("", ["a", "Denver"], 0, 0),
        ("Denver", ["a", "Denver"], 1, 1),
    ],
)
def test_scores(prediction: str, answers: list[str], match: float, score: float) -> None:
    assert exact_match(prediction, answers) == match
    assert f1(prediction, answers) == pytest.approx(score)


WORDS = st.lists(st.sampled_from(["the", "A", "cat,", "Cat", "dog.", "x-y", "½", " ", "\t"]), max_size=6).map(" ".join)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_what_must_hold_of_any_two_texts(prediction: str, answers: list[str]) -> None:
    assert 0 <= exact_match(prediction, answers) <= f1(prediction, answers) <= 1
    assert exact_match(prediction.upper() + " the !", answers) == exact_match(prediction, answers)
    assert all(f1(answer, answers) == exact_match(answer, answers) == 1 for answer in answers if normalised(answer))


def test_the_answers_of_squad_are_right(shared_data) -> None:
    answers = parquet.read_table(shared_data / "squad_v11_validation_1190.parquet")["answers"].to_pylist()
    texts = [answer["text"] for answer in answers]
    assert len(texts) == 1190
    assert all(normalised(text) for golds in texts for text in golds)
    assert all(exact_match(f"The {golds[0]}.", golds) == f1(golds[0], golds) == 1 for golds in texts)
    assert not any(exact_match("", golds) or f1("", golds) for golds in texts)
