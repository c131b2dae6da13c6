"""Prepared records are made once, whole or not at all, and are mapped rather than read."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.files import cache_folder
from lorica.tasks.cache import ABANDONED_SECONDS, Arrays, cached_arrays
from lorica.tasks.causal import conversations
from lorica.tasks.causal import tokenising as causal_tokenising
from lorica.tasks.causal.tokenising import tokenise_causal
from lorica.tasks.loading import load_task
from lorica.tasks.questions import tokenising as question_tokenising
from lorica.tasks.questions.objective import evaluate
from lorica.tasks.questions.records import QuestionRecords
from lorica.tasks.questions.tokenising import tokenise_questions
from lorica.tasks.readers import Source
from lorica.tasks.records import Records
from lorica.tasks.text import TextRecords
from tests.causal import BEGIN, CHAT, END, MARKED, PAIRS, source, tokenizer
from tests.tasks.conftest import write_tokenizer
from tests.tasks.preparing import make, prepare


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / "home"))


def fail(arrays: Arrays) -> None:
    raise AssertionError("made again")


def test_arrays_are_made_once_and_mapped() -> None:
    first = cached_arrays(["a"], make)
    again = cached_arrays(["a"], fail)
    for found in (first, again):
        assert isinstance(found["tokens"], np.memmap)
        np.testing.assert_array_equal(found["tokens"], np.arange(7))
        assert found["pixels"].shape == (2, 3, 4)
        assert found["none"].shape == (0, 2)
        with pytest.raises(ValueError, match="read-only"):
            found["tokens"][0] = 1
    with pytest.raises(AssertionError, match="made again"):
        cached_arrays(["b"], fail)


def test_nothing_half_made_stays_and_nobody_else_can_read() -> None:
    def crash(arrays: Arrays) -> None:
        make(arrays)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_arrays(["a"], crash)
    assert list((cache_folder() / "records").iterdir()) == []
    cached_arrays(["a"], make)
    (folder,) = (cache_folder() / "records").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_of_two_runs_that_make_the_same_one_is_kept() -> None:
    """The other run finishes while this one is at it."""

    def late(arrays: Arrays) -> None:
        cached_arrays(["a"], make)
        make(arrays)

    np.testing.assert_array_equal(cached_arrays(["a"], late)["tokens"], np.arange(7))
    assert len(list((cache_folder() / "records").iterdir())) == 1


def test_rows_of_one_kind_only(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    arrays.append("x", np.zeros((1, 2)))
    with pytest.raises(ValueError, match="rows of x"):
        arrays.append("x", np.zeros((1, 3)))


def test_parallel_runs_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=prepare, args=(str(tmp_path / "home"), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [21, 21, 21]
    for process in processes:
        process.join()
    assert len(list((tmp_path / "home" / "cache" / "records").iterdir())) == 1


def test_texts_are_tokenised_again_only_for_other_data_lengths_or_tokenizers(tmp_path: Path) -> None:
    base, other = write_tokenizer(tmp_path / "base"), write_tokenizer(tmp_path / "other", frame=False)
    data, more = tmp_path / "data.csv", tmp_path / "more.csv"
    data.write_text("text,label\na fine film,p\nnot at all dull,n\n")
    more.write_text("text,label\na fine film,p\nnot at all bad,n\n")

    def count(source: Path, tokenizer: str, **keys: int) -> int:
        config = TaskConfig(type="text-classification", train=str(source), test=str(source), **keys)
        records = load_task(config, tokenizer).train
        assert isinstance(records, TextRecords)
        assert isinstance(records.tokens, np.memmap)
        return len(list((cache_folder() / "records").iterdir()))

    assert count(data, base) == 1
    assert count(data, base) == 1
    assert count(more, base) == 2
    assert count(data, base, max_length=4) == 3
    assert count(data, other) == 4


TALKS = {
    "messages": [
        [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a fine film"}],
        [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it is"}],
        [{"role": "user", "content": "at"}, {"role": "assistant", "content": "no secret"}],
    ]
}
TEXTS = {"text": ["what is it", "it is a fine film", "no secret at all"]}
QUESTIONS = [
    ("not dull", "a fine film not at all dull and long good bad plot", "not at"),
    ("fine", "a fine film not at all dull and long good bad plot", "good"),
    ("plot", "long plot and good plot", "good plot"),
    ("a good plot", "dull film", None),
    ("bad", "a fine film not at all dull and long good bad plot", "bad plot"),
]


def questions(rows: list[tuple[str, str, str | None]]) -> Source:
    answers = [
        {"text": [] if text is None else [text], "answer_start": [] if text is None else [told.index(text)]}
        for _, told, text in rows
    ]
    kind = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
    columns = {"question": [row[0] for row in rows], "context": [row[1] for row in rows]}
    table = pa.table(columns).append_column("answers", pa.array(answers, type=kind))
    return Source("task.test", "memory", table, Path())


def load(kind: str, base: str) -> Records:
    if kind == "questions":
        words = transformers.AutoTokenizer.from_pretrained(base)
        names = ("question", "context", "answers")
        return tokenise_questions(questions(QUESTIONS), *names, words, 10, 2, 4, keep_texts=True)
    columns = {"pairs": PAIRS, "texts": TEXTS, "talks": TALKS}[kind]
    return tokenise_causal(source(columns), list(columns), tokenizer(chat_template=CHAT), 64)


def contents(records: Records) -> list[Any]:
    """All that training and evaluation see."""
    batches = [records.batch(np.array([index])) for index in range(len(records))]
    found = [records.fingerprint(), records.labels.tolist()]
    found += [{name: value.tolist() for name, value in batch.inputs.items()} for batch in batches]
    found += [batch.labels.tolist() for batch in batches]
    if isinstance(records, QuestionRecords):
        found.append(evaluate(First(), records, 64, "cpu", None))
    return found


class First(torch.nn.Module):
    """Scores early places higher, so that what it answers shows where tokens are in their context."""

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> Any:
        scores = -torch.arange(input_ids.shape[1]).expand(input_ids.shape).float()
        return transformers.modeling_outputs.QuestionAnsweringModelOutput(start_logits=scores, end_logits=-scores)


KINDS = ["pairs", "texts", "talks", "questions"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_load_gives_the_same_records_and_tokenises_none(
    kind: str, text_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(kind, text_base)
    assert isinstance(first.tokens, np.memmap)
    words = type(tokenizer())
    call: Callable[..., Any] = words.__call__
    seen: list[str] = []

    def spy(self: Any, texts: Any, *rest: Any, **options: Any) -> Any:
        seen.extend([texts] if isinstance(texts, str) else texts)
        return call(self, texts, *rest, **options)

    monkeypatch.setattr(words, "__call__", spy)
    again = load(kind, text_base)
    # What a tokenizer puts around texts is asked with texts that are no records.
    assert set(seen) <= {"", "a"}
    assert contents(again) == contents(first)
    assert len(list((cache_folder() / "records").iterdir())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_records_do_not_depend_on_how_many_are_tokenised_at_a_time(
    kind: str, text_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = contents(load(kind, text_base))
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / "another"))
    for module in (causal_tokenising, conversations, question_tokenising):
        monkeypatch.setattr(module, "SLICE", 2)
    assert contents(load(kind, text_base)) == together


def test_errors_count_records_from_the_first_and_not_from_the_slice(
    text_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (causal_tokenising, conversations, question_tokenising):
        monkeypatch.setattr(module, "SLICE", 2)
    silent = source({"text": ["what is", "it is", ""]})
    with pytest.raises(UserError, match=r"record 2 .*nothing to learn"):
        tokenise_causal(silent, ["text"], tokenizer(eos_token=None), 64)
    incomplete = source({"messages": [*TALKS["messages"], [{"role": "user", "content": None}]]})
    with pytest.raises(UserError, match=r"record 3 .*not a list of messages"):
        tokenise_causal(incomplete, ["messages"], tokenizer(chat_template=CHAT), 64)
    refusing = CHAT.replace("{{ '<|' + m", "{{ raise_exception('') if 'secret' in m.content else '<|' + m")
    with pytest.raises(UserError, match=r"the chat template failed on record 2 "):
        tokenise_causal(source(TALKS), ["messages"], tokenizer(chat_template=refusing), 64)
    words = transformers.AutoTokenizer.from_pretrained(text_base)
    names = ("question", "context", "answers")
    with pytest.raises(UserError, match=r"record 3 .*no tokens in column 'context'"):
        tokenise_questions(questions([*QUESTIONS[:3], ("fine", " ", None)]), *names, words, 10, 2, 4)
    moved = questions(QUESTIONS).table.set_column(1, "context", [[row[1] for row in QUESTIONS[:4]] + ["no such words"]])
    with pytest.raises(UserError, match=r"record 4 .*does not match column 'context' at"):
        tokenise_questions(Source("task.test", "memory", moved, Path()), *names, words, 10, 2, 4)


def test_language_modelling_records_of_other_input_are_not_served_from_the_cache() -> None:
    def count(columns: dict[str, Any], max_length: int = 64, **options: Any) -> int:
        tokenise_causal(source(columns), list(columns), tokenizer(**options), max_length)
        return len(list((cache_folder() / "records").iterdir()))

    assert count(PAIRS) == 1
    assert count(PAIRS | {"completion": [*PAIRS["completion"][:3], " it"]}) == 2
    assert count({"prompt": ["what is"], "completion": [" it"]}) == 3
    assert count({"prompt": ["what"], "completion": ["is it"]}) == 4
    assert count(PAIRS, max_length=20) == 5
    assert count(PAIRS, model_max_length=21) == 6
    assert count(PAIRS, bos_token=BEGIN) == 7
    assert count(PAIRS, eos_token=None) == 8
    assert count(TALKS, chat_template=CHAT) == 9
    assert count(TALKS, chat_template=MARKED) == 10
    # The same texts in the same order, but neither a turn nor learned alike.
    assert count({"prompt": ["assistant"], "completion": [END]}) == 11
    assert count({"messages": [[{"role": "assistant", "content": END}]]}, chat_template=MARKED) == 12
    assert count(PAIRS) == count(TALKS, chat_template=CHAT) == 12


def test_a_template_that_writes_the_date_is_written_out_anew_each_day(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + MARKED

    def count(template: str, day: int) -> int:
        class Date(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return cls(2026, 11, day)

        monkeypatch.setattr(causal_tokenising, "date", Date)
        tokenise_causal(source(TALKS), ["messages"], tokenizer(chat_template=template), 64)
        return len(list((cache_folder() / "records").iterdir()))

    assert [count(dated, 1), count(dated, 1), count(dated, 2)] == [1, 1, 2]
    assert [count(MARKED, 1), count(MARKED, 2)] == [3, 3]


def test_questions_of_other_input_are_not_served_from_the_cache(tmp_path: Path) -> None:
    base, other = write_tokenizer(tmp_path / "base"), write_tokenizer(tmp_path / "other", model_max_length=9)

    def count(rows: Any = QUESTIONS, folder: str = base, lengths: tuple[int, int, int] = (10, 1, 4)) -> int:
        words = transformers.AutoTokenizer.from_pretrained(folder)
        tokenise_questions(questions(rows), "question", "context", "answers", words, *lengths)
        return len(list((cache_folder() / "records").iterdir()))

    assert count() == 1
    assert count([*QUESTIONS[:4], ("good", *QUESTIONS[4][1:])]) == 2
    assert count([*QUESTIONS[:3], ("a good plot", "dull plot", None), QUESTIONS[4]]) == 3
    assert count([*QUESTIONS[:4], (*QUESTIONS[4][:2], "long")]) == 4
    assert count(lengths=(11, 1, 4)) == 5
    assert count(lengths=(10, 2, 4)) == 6
    assert count(lengths=(10, 1, 3)) == 7
    assert count(folder=other) == 8
    assert count() == 8


def test_what_a_killed_process_left_is_deleted_after_a_day() -> None:
    place = cache_folder() / "records"
    for name, age in ((".old.x", 2 * ABANDONED_SECONDS), (".new.x", 0.0)):
        (place / name).mkdir(parents=True)
        (place / name / "pixels").write_bytes(b"private")
        then = time.time() - age
        os.utime(place / name, (then, then))
    cached_arrays(["key"], lambda arrays: arrays.append("x", np.arange(3)))
    assert {path.name for path in place.glob(".*")} == {".new.x"}
