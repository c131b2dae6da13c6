"""Questions: their windows, labels, loss, one clip for all windows, and answers back in words."""

from __future__ import annotations

import json
import math
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from torch import Tensor, nn

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import BaseModel
from lorica.config import LoraSection, ModelConfig
from lorica.errors import UserError
from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.isolation import check_isolation
from lorica.privacy.mechanism import Terms, noisy_gradient
from lorica.privacy.randomness import ReproducibleRandomness
from lorica.tasks.groups import grouped
from lorica.tasks.questions.metrics import exact_match, f1
from lorica.tasks.questions.objective import evaluate, losses
from lorica.tasks.questions.records import QuestionRecords
from lorica.tasks.questions.squad_json import read_squad_json
from lorica.tasks.questions.tokenising import tokenise_questions
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch
from lorica.testing.models import TEXT
from tests.tasks.conftest import WORDS, write_tokenizer

CLS, SEP = 2, 3
VOCABULARY = 4 + len(WORDS)
CONTEXT = "a fine film not at all dull and long good bad plot"


def ids(text: str) -> list[int]:
    return [4 + WORDS.index(word) for word in text.split()]


def table(*rows: tuple[str, str, list[tuple[str, int]]]) -> pa.Table:
    """Columns of (question, context, answers with their starts)."""
    answer = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
    answers = [{"text": [text for text, _ in pairs], "answer_start": [at for _, at in pairs]} for *_, pairs in rows]
    columns = {"question": [row[0] for row in rows], "context": [row[1] for row in rows]}
    return pa.table(columns).append_column("answers", pa.array(answers, type=answer))


def tokenised(content: pa.Table, tokenizer: Any, *lengths: int, keep_texts: bool = False) -> QuestionRecords:
    source = Source("task.train", "memory", content, Path())
    return tokenise_questions(source, "question", "context", "answers", tokenizer, *lengths, keep_texts=keep_texts)


def answer(text: str, context: str = CONTEXT) -> list[tuple[str, int]]:
    return [(text, context.index(text))]


@pytest.fixture(scope="session")
def words(text_base: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(text_base)


@pytest.fixture(scope="session")
def pieces() -> Any:
    """RoBERTa's: byte pairs, blanks inside tokens, two separators, no token types."""
    from tokenizers import ByteLevelBPETokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([CONTEXT, "what is plot", "Übermaß 6½ 😀"], vocab_size=320, special_tokens=special)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    return transformers.RobertaTokenizerFast(vocab=state["vocab"], merges=merges)


def rows(records: QuestionRecords, index: int) -> list[list[int]]:
    """The windows of one record, without padding, by way of a batch."""
    inputs = records.batch(np.array([index])).inputs
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in pairs]


THREE = table(
    ("not dull", CONTEXT, answer("not at")),
    ("fine", CONTEXT, answer("good bad") + answer("plot")),
    ("a good plot", "dull film", []),
)


def test_windows_overlap_and_the_last_one_ends_the_context(words: Any) -> None:
    records = tokenised(THREE, words, 10, 2, 4)
    # 10 tokens less three special ones and two of the question leave 5 of context, 2 of them shared.
    parts = ["a fine film not at", "not at all dull and", "dull and long good bad", "good bad plot"]
    assert rows(records, 0) == [[CLS, *ids("not dull"), SEP, *ids(part), SEP] for part in parts]
    assert records.row_counts.tolist() == [4, 3, 1]
    assert records.lengths.tolist() == [10, 10, 8]
    batch = records.batch(np.array([2, 0]))
    assert len(batch) == 2
    assert batch.example_of_row.tolist() == [0, 1, 1, 1, 1]
    assert batch.inputs["token_type_ids"][0].tolist() == [0] * 5 + [1] * 3 + [0] * 2


def test_labels_are_places_in_each_window_or_cls(words: Any) -> None:
    records = tokenised(THREE, words, 10, 2, 4)
    assert records.labels.tolist() == [1, 1, 0]
    # "not at" is whole in the first two windows: after [CLS] not dull [SEP], its places are 3 and 4, then 0 and 1.
    assert records.batch(np.array([0])).labels.tolist() == [[7, 8], [4, 5], [0, 0], [0, 0]]
    # Windows of six tokens: "a … all", "at … good", "long good bad plot". The first answer counts, and only whole.
    assert records.batch(np.array([1])).labels.tolist() == [[0, 0], [0, 0], [4, 5]]
    assert records.batch(np.array([2])).labels.tolist() == [[0, 0]]


def test_an_answer_beside_another_token_without_a_blank(words: Any) -> None:
    context = "fine-plot,good"
    content = table(("dull", context, [("plot", 5)]), ("dull", context, [("fine", 0)]), ("dull", context, [("lo", 6)]))
    # After [CLS] dull [SEP]: fine - plot , good. The token that holds "lo" is the answer's.
    assert tokenised(content, words, 20, 2, 4).batch(np.arange(3)).labels.tolist() == [[5, 5], [3, 3], [5, 5]]


def test_a_long_question_is_cut(words: Any) -> None:
    record = tokenised(table(("a good plot not bad", "dull film", [])), words, 10, 2, 3)
    assert rows(record, 0) == [[CLS, *ids("a good plot"), SEP, *ids("dull film"), SEP]]


@given(
    question=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4),
    context=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40),
    max_length=st.integers(12, 24),
    stride=st.integers(0, 3),
    kind=st.sampled_from(["words", "pieces"]),
)
def test_windows_equal_those_of_transformers(
    words: Any, pieces: Any, question: list[str], context: list[str], max_length: int, stride: int, kind: str
) -> None:
    tokenizer = {"words": words, "pieces": pieces}[kind]
    texts = " ".join(question), " ".join(context)
    frame, most = {"words": (3, 4), "pieces": (4, 4)}[kind]
    if len(tokenizer(texts[0], add_special_tokens=False)["input_ids"]) > most or max_length - frame - most <= stride:
        return
    record = tokenised(table((*texts, [])), tokenizer, max_length, stride, most)
    expected = tokenizer(
        *texts, truncation="only_second", max_length=max_length, stride=stride, return_overflowing_tokens=True
    )
    assert rows(record, 0) == expected["input_ids"]
    inputs = record.batch(np.array([0])).inputs
    if kind == "words":
        found = [t[m.bool()].tolist() for t, m in zip(inputs["token_type_ids"], inputs["attention_mask"], strict=True)]
        assert found == expected["token_type_ids"]
    else:
        assert "token_type_ids" not in inputs


def test_a_subset_shares_the_tokens_and_has_its_own_questions(words: Any) -> None:
    records = tokenised(THREE, words, 10, 2, 4)
    some = records.subset(np.array([2, 1]))
    assert some.tokens is records.tokens
    assert some.labels.tolist() == [0, 1]
    assert some.row_counts.tolist() == [1, 3]
    assert rows(some, 1) == rows(records, 1)
    assert some.subset(np.array([1])).batch(np.array([0])).labels.tolist() == [[0, 0], [0, 0], [4, 5]]


def test_records_to_train_on_keep_no_text(words: Any) -> None:
    records = tokenised(THREE, words, 10, 2, 4)
    assert records.texts is None
    with pytest.raises(ValueError, match="training records have no texts"):
        evaluate(Lookup(), records, 100, "cpu", None)


def test_fingerprint_belongs_to_the_data_and_not_to_the_windows(words: Any, pieces: Any) -> None:
    found = tokenised(THREE, words, 10, 2, 4).fingerprint()
    assert tokenised(THREE, words, 20, 0, 2, keep_texts=True).fingerprint() == found
    assert tokenised(THREE, pieces, 40, 2, 4).fingerprint() == found
    one = ("fine", CONTEXT, answer("plot"))
    others = [("good", *one[1:]), ("fine", CONTEXT + " a", one[2]), (*one[:2], []), (*one[:2], answer("bad"))]
    twice = "bad plot bad"
    places = [table(("fine", twice, [("bad", at)])) for at in (0, 9)]
    prints = {tokenised(content, words, 10, 2, 4).fingerprint() for content in [*map(table, [one, *others]), *places]}
    assert len(prints) == 7


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), tokens=st.integers(1, 120))
def test_micro_batches_stay_within_the_budget(words: Any, sizes: list[int], tokens: int) -> None:
    content = table(*(("fine", " ".join(["plot"] * size), []) for size in sizes))
    records = tokenised(content, words, 12, 2, 4)
    seen = 0
    for batch in records.micro_batches(np.arange(len(records)), tokens):
        assert batch.inputs["input_ids"].numel() <= tokens or len(batch) == 1
        seen += len(batch)
    assert seen == len(sizes)


class Lookup(nn.Module):
    """Logits of a token by its id alone; those of [CLS] by all ids of its window."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.scores = torch.randn(VOCABULARY, 2, generator=torch.Generator().manual_seed(seed)) * 3

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(windows, longest, 2)."""
        by_token = self.scores[input_ids]
        by_window = (by_token * attention_mask[:, :, None]).sum(1, keepdim=True) / 4
        return torch.cat([by_window, by_token[:, 1:]], 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Any:
        start, end = self.logits(input_ids, attention_mask).unbind(-1)
        return types.SimpleNamespace(start_logits=start, end_logits=end)


def window_logits(model: Lookup, row: list[int]) -> Tensor:
    """(tokens, 2), of one window alone."""
    return model.logits(torch.tensor([row]), torch.ones(1, len(row)))[0]


def test_losses_written_out(words: Any) -> None:
    records, model = tokenised(THREE, words, 10, 2, 4), Lookup()
    batch = records.batch(np.arange(3))
    found = losses(model(**batch.inputs), batch)
    for index in range(3):
        each = []
        for row, (start, end) in zip(rows(records, index), records.batch(np.array([index])).labels, strict=True):
            scores = window_logits(model, row).double().numpy()
            entropies = np.log(np.exp(scores).sum(0)) - scores[[start, end], [0, 1]]
            each.append(entropies.mean())
        assert found[index].item() == pytest.approx(np.mean(each), rel=1e-5)


FAMILIES = {
    "bert": (transformers.BertForQuestionAnswering, transformers.BertConfig, {}),
    "roberta": (transformers.RobertaForQuestionAnswering, transformers.RobertaConfig, {"pad_token_id": 1}),
}


def question_model(family: str, vocabulary: int) -> AdaptedModel:
    torch.manual_seed(0)
    model, config, options = FAMILIES[family]
    settings = {name: value for name, value in TEXT.items() if name != "num_labels"}
    base = model(config(**(settings | options | {"vocab_size": vocabulary}))).eval().requires_grad_(False)
    section = LoraSection(r=2, lora_alpha=4, target_modules=["query", "value"])
    adapted = adapt(BaseModel(base, "qa_outputs", True, []), section, ModelConfig(base="tiny"), 0, torch.device("cpu"))
    adapted.write({name: 0.3 * torch.randn(value.shape) for name, value in adapted.read().items()})
    return adapted


def model_losses(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model(**batch.inputs), batch)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, words: Any, pieces: Any) -> tuple[AdaptedModel, QuestionRecords]:
    if request.param == "bert":
        return question_model("bert", VOCABULARY), tokenised(THREE, words, 10, 2, 4)
    return question_model("roberta", len(pieces)), tokenised(THREE, pieces, 20, 4, 8)


def by_autograd(model: AdaptedModel, records: QuestionRecords) -> list[dict[str, Tensor]]:
    """Each question's gradient, from transformers' own loss of each of its windows alone, in a batch of one."""
    parameters = {name: getattr(module, kind).requires_grad_() for name, (module, kind, _) in model.tensors.items()}
    found = []
    for index in range(len(records)):
        batch = records.batch(np.array([index]))
        windows = []
        for row, mask in enumerate(batch.inputs["attention_mask"].bool()):
            inputs = {name: value[row : row + 1, mask] for name, value in batch.inputs.items()}
            start, end = batch.labels[row : row + 1].unbind(1)
            windows.append(model.peft_model(**inputs, start_positions=start, end_positions=end).loss)
        gradients = torch.autograd.grad(torch.stack(windows).mean(), list(parameters.values()))
        found.append(dict(zip(parameters, gradients, strict=True)))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return found


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradients.values()))


def test_gradients_equal_those_of_transformers_own_loss(case: tuple[AdaptedModel, QuestionRecords]) -> None:
    model, records = case
    batch = records.batch(np.arange(3))
    found = per_example_gradients(lambda: model_losses(model.peft_model, batch), model.tensors, 3, batch.example_of_row)
    for index, expected in enumerate(by_autograd(model, records)):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_dp_step_clips_each_question_once(case: tuple[AdaptedModel, QuestionRecords]) -> None:
    """All windows of a question together are scaled to C: clipped apart, four of them could bring four times that."""
    model, records = case
    clip_norm = 0.02
    terms = Terms(sampling_rate=1.0, batch_size=2, clip_norm=clip_norm, noise_multiplier=0.0)
    for tokens in (1, 60, 10**6):
        found = noisy_gradient(
            model.peft_model, model_losses, model.tensors, records, terms, ReproducibleRandomness(0, 1, 1, 0), tokens
        )
        each = by_autograd(model, records)
        assert records.row_counts.max() > 2
        assert min(map(norm, each)) > clip_norm
        for name, value in found.items():
            expected = sum(clip_norm * gradient[name] / norm(gradient) for gradient in each) / 2
            torch.testing.assert_close(value.tensor, expected, rtol=1e-3, atol=1e-6)


def test_a_noisy_step_of_sampled_questions(case: tuple[AdaptedModel, QuestionRecords]) -> None:
    model, records = case
    terms = Terms(sampling_rate=0.5, batch_size=2, clip_norm=1.0, noise_multiplier=1.0)
    found = noisy_gradient(
        model.peft_model, model_losses, model.tensors, records, terms, ReproducibleRandomness(0, 1, 1, 0), 40
    )
    values = torch.cat([value.tensor.flatten() for value in found.values()])
    assert abs(float(values.std()) / 0.5 - 1) < 0.25


def test_no_question_moves_the_sum_by_more_than_c(case: tuple[AdaptedModel, QuestionRecords]) -> None:
    model, records = case

    def total(indices: list[int]) -> dict[str, Tensor]:
        batch = records.batch(np.array(indices))
        found = per_example_gradients(
            lambda: model_losses(model.peft_model, batch), model.tensors, len(batch), batch.example_of_row
        )
        return clipped_sum(found, 0.05)

    everything = total([0, 1, 2])
    for leave in range(3):
        without = total([index for index in range(3) if index != leave])
        assert norm({name: everything[name] - without[name] for name in everything}) <= 0.05 * (1 + 1e-4)


def test_padding_left_in_the_softmax_would_mix_questions(case: tuple[AdaptedModel, QuestionRecords]) -> None:
    model, records = case
    batch = records.batch(np.arange(3))
    check_isolation(model.peft_model, model_losses, model.tensors, batch, 1e-3, "tiny")

    def unmasked(module: nn.Module, some: Batch) -> Tensor:
        outputs = module(**some.inputs)
        everywhere = torch.ones_like(some.inputs["attention_mask"])
        return losses(outputs, Batch({"attention_mask": everywhere}, some.labels, some.example_of_row))

    shorter = Batch.example(batch, 2)
    longest = int(shorter.inputs["attention_mask"].sum())
    shorter = Batch({name: value[:, :longest] for name, value in shorter.inputs.items()}, shorter.labels)
    for function, same in ((model_losses, True), (unmasked, False)):
        alone, beside = function(model.peft_model, shorter)[0], function(model.peft_model, batch)[2]
        assert torch.allclose(alone, beside, rtol=1e-4) == same


def test_questions_in_groups_count_equally_whatever_their_windows(words: Any) -> None:
    model, records = question_model("bert", VOCABULARY), tokenised(THREE, words, 10, 2, 4)
    groups = grouped(records, np.array(["p", "q", "p"]), 5, 0)
    batch = groups.batch(np.arange(2))
    assert batch.example_of_row.tolist() == [0] * 5 + [1] * 3
    assert groups.row_counts.tolist() == [5, 3]
    found = per_example_gradients(lambda: model_losses(model.peft_model, batch), model.tensors, 2, batch.example_of_row)
    first, second, third = by_autograd(model, records)
    for name in found:
        torch.testing.assert_close(found[name][0], (first[name] + third[name]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name][1], second[name], rtol=1e-4, atol=1e-6)


def slow_answer(model: Lookup, windows: list[list[int]], place: int, threshold: float | None, most: int) -> str:
    """Every span of every window tried; words are one token each, so a span of tokens is its words."""
    best, text, null = -math.inf, "", math.inf
    for row in windows:
        start, end = window_logits(model, row).unbind(1)
        null = min(null, float(start[0] + end[0]))
        for first in range(place, len(row) - 1):
            for last in range(first, min(first + most, len(row) - 1)):
                if float(start[first] + end[last]) > best:
                    best = float(start[first] + end[last])
                    text = " ".join(WORDS[token - 4] for token in row[first : last + 1])
    return "" if threshold is not None and null - best > threshold else text


@given(
    seed=st.integers(0, 10**6),
    contexts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=25), min_size=1, max_size=4),
    threshold=st.sampled_from([None, -2.0, 0.0, 2.0]),
    most=st.integers(1, 6),
    tokens=st.sampled_from([1, 50, 1000]),
)
def test_evaluation_equals_trying_every_span(
    words: Any, seed: int, contexts: list[list[str]], threshold: float | None, most: int, tokens: int
) -> None:
    model, generator = Lookup(seed), np.random.default_rng(seed)
    content = []
    for number, context in enumerate(contexts):
        text = " ".join(context)
        gold = " ".join(context[: 1 + generator.integers(3)])
        content.append(("good plot", text, [] if number % 2 else [(gold, 0)]))
    records = tokenised(table(*content), words, 12, 2, 4, keep_texts=True)
    order = generator.permutation(len(content))
    found = evaluate(model, records.subset(order), tokens, "cpu", threshold, most)
    expected = {"exact_match": [], "f1": []}
    for index, (_, _, pairs) in enumerate(content):
        # After [CLS] good plot [SEP].
        prediction = slow_answer(model, rows(records, index), 4, threshold, most)
        expected["exact_match"].append(exact_match(prediction, [text for text, _ in pairs]))
        expected["f1"].append(f1(prediction, [text for text, _ in pairs]))
    batch = records.batch(np.arange(len(records)))
    loss = losses(model(**batch.inputs), batch).mean().item()
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()} | {"loss": loss})


def test_answers_keep_the_contexts_own_writing(words: Any) -> None:
    """Character offsets, not decoded tokens: [UNK] and blanks come back as they stand in the context."""
    context = "a  fine -- Übermaß   good film"
    model = Lookup()
    model.scores = torch.zeros(VOCABULARY, 2)
    # The span starts at [UNK], id 1, and ends at "good".
    model.scores[1, 0], model.scores[4 + WORDS.index("good"), 1] = 5, 5
    content = table(("plot", context, [("-- Übermaß   good", context.index("--"))]))
    records = tokenised(content, words, 30, 2, 4, keep_texts=True)
    assert evaluate(model, records, 100, "cpu", None)["exact_match"] == 1
    assert evaluate(model, records, 100, "cpu", None, max_answer=1)["exact_match"] == 0


def test_the_least_score_of_no_answer_over_the_windows_counts(words: Any) -> None:
    model = Lookup()
    model.scores[:] = 0
    model.scores[4 + WORDS.index("bad")], model.scores[4 + WORDS.index("plot")] = -8, 3
    records = tokenised(table(("good", "bad a a plot", [("plot", 8)])), words, 6, 0, 1, keep_texts=True)
    # "plot" scores 6; [CLS] scores (-8 - 8) / 4 in the window "bad a" and (3 + 3) / 4 in "a plot".
    found = [evaluate(model, records, 100, "cpu", threshold)["exact_match"] for threshold in (-10.5, -9.5, -7.0)]
    assert found == [0, 1, 1]


def test_logits_that_are_not_finite_answer_nothing(words: Any) -> None:
    model = Lookup()
    model.scores[:] = math.nan
    records = tokenised(THREE, words, 10, 2, 4, keep_texts=True)
    found = evaluate(model, records, 100, "cpu", None)
    assert found["exact_match"] == found["f1"] == pytest.approx(1 / 3)
    assert math.isnan(found["loss"])


def test_modes_come_back(words: Any) -> None:
    model = Lookup().train()
    evaluate(model, tokenised(THREE, words, 10, 2, 4, keep_texts=True), 100, "cpu", 0.0)
    assert model.training


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("fine", CONTEXT, [("plot", 3)]), r"record 1 \(counted from 0\) has an answer in column 'answers'"),
        (("fine", CONTEXT, [("plot", -4)]), "does not match column 'context' at its answer_start"),
        (("fine", CONTEXT, [("secret", 0)]), "does not match column"),
        (("", CONTEXT, []), r"record 1 \(counted from 0\) has no tokens in column 'question'"),
        (("fine", " ", []), r"record 1 \(counted from 0\) has no tokens in column 'context'"),
    ],
)
def test_what_is_wrong_with_a_record_is_named_by_its_index(words: Any, row: tuple, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        tokenised(table(("fine", CONTEXT, []), row), words, 10, 2, 4)
    assert error.value.key == "task.train"
    assert not {"secret", "plot", "dull"} & set(str(error.value).replace("'", " ").split())


def test_columns_of_other_kinds_are_refused(words: Any) -> None:
    for column, key in (("question", "task.question"), ("answers", "task.answers")):
        content = THREE.set_column(THREE.column_names.index(column), column, pa.array([7531, 2, 3]))
        with pytest.raises(UserError, match="holds int64") as error:
            tokenised(content, words, 10, 2, 4)
        assert error.value.key == key
        assert "7531" not in str(error.value)


def test_lengths_without_room_for_context_are_refused(words: Any) -> None:
    with pytest.raises(UserError, match="3 tokens are left for context, which must be more than the stride of 3"):
        tokenised(THREE, words, 10, 3, 4)
    assert len(tokenised(THREE, words, 10, 2, 4)) == 3


def test_windows_are_cut_at_what_the_model_takes(words: Any, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "short", model_max_length=9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenised(THREE, tokenizer, 10, 1, 4).lengths.max() == 9


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Film",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "q1",
                            "question": "not dull",
                            "answers": [{"text": "not at", "answer_start": 12}],
                            "is_impossible": False,
                        },
                        {"id": "q2", "question": "fine", "answers": [{"text": "plot", "answer_start": 46}]},
                    ],
                },
                {
                    "context": "dull film",
                    "qas": [
                        {
                            "id": "q3",
                            "question": "good",
                            "answers": [],
                            "plausible_answers": [{"text": "film", "answer_start": 5}],
                            "is_impossible": True,
                        }
                    ],
                },
            ],
        }
    ],
}


def test_the_official_json_becomes_hugging_faces_columns(tmp_path: Path, words: Any) -> None:
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(SQUAD))
    found = read_squad_json(path)
    assert found.column_names == ["id", "title", "context", "question", "answers"]
    assert found["id"].to_pylist() == ["q1", "q2", "q3"]
    assert found["context"].to_pylist() == [CONTEXT, CONTEXT, "dull film"]
    assert found["answers"].to_pylist() == [
        {"text": ["not at"], "answer_start": [12]},
        {"text": ["plot"], "answer_start": [46]},
        {"text": [], "answer_start": []},
    ]
    same = table(("not dull", CONTEXT, [("not at", 12)]), ("fine", CONTEXT, [("plot", 46)]), ("good", "dull film", []))
    one, other = (tokenised(content, words, 10, 2, 4) for content in (found, same))
    assert one.fingerprint() == other.fingerprint()
    assert one.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "content",
    ["secret", "[]", '{"data": 3}', '{"data": [{"paragraphs": [{"context": "secret", "qas": [{"id": 1}]}]}]}'],
)
def test_other_json_is_refused_without_a_word_of_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not in SQuAD format") as error:
        read_squad_json(path, "task.test")
    assert error.value.key == "task.test"
    assert "secret" not in str(error.value)


class Knows(nn.Module):
    """Marks the places that the records' labels name, in the order in which evaluation asks."""

    def __init__(self, records: QuestionRecords, tokens: int) -> None:
        super().__init__()
        asked = records.micro_batches(np.arange(len(records)), tokens)
        self.labels = iter([batch.labels for batch in asked])

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        starts, ends = (nn.functional.one_hot(p, input_ids.shape[1]) * 20.0 for p in next(self.labels).unbind(1))
        return types.SimpleNamespace(start_logits=starts, end_logits=ends)


def test_squad_windows_equal_those_of_transformers_and_answers_come_back(shared_data: Path, minilm: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    content = parquet.read_table(shared_data / "squad_v11_validation_1190.parquet")
    records = tokenised(content, tokenizer, 128, 32, 48, keep_texts=True)
    assert len(records) == 1190
    assert records.labels.all()
    questions, contexts = content["question"].to_pylist(), content["context"].to_pylist()
    chosen = range(0, 1190, 17)
    expected = tokenizer(
        [questions[index] for index in chosen],
        [contexts[index] for index in chosen],
        truncation="only_second",
        max_length=128,
        stride=32,
        return_overflowing_tokens=True,
    )
    windows = [row for index in chosen for row in rows(records, index)]
    assert len(windows) > 1.5 * len(chosen)
    assert windows == expected["input_ids"]
    # A few answers are cut in two by every window, and a few begin or end within a token.
    found = evaluate(Knows(records, 4096), records, 4096, "cpu", None, max_answer=60)
    assert found["exact_match"] > 0.99
    assert found["f1"] > 0.99
    ends = [end for _, end in pairwise(np.cumsum([0, *records.row_counts]))]
    assert ends[-1] == len(records.starts)
