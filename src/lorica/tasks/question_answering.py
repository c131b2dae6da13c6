"""Extractive question answering (SQuAD v1.1 and v2.0): records, loss, and how well a model does.

Rajpurkar et al., arXiv 1606.05250 (v1.1) and arXiv 1806.03822 (v2.0, questions without an answer). Windows over long
contexts and the score of no answer: Devlin et al., arXiv 1810.04805, sections 4.2 and 4.3.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.errors import UserError
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.labels import is_text
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Records, digest, evaluating, stack_digests
from lorica.tasks.squad_metrics import exact_match, f1
from lorica.tasks.text import SLICE, laid_out, padded, tokenizer_identity

if TYPE_CHECKING:
    import pyarrow as pa

# Each with its first character's place in the context.
Answers = list[tuple[str, int]]
# A question, its context and the answers to it.
Row = tuple[str, str, Answers]


@dataclass(frozen=True)
class Texts:
    """What turns places of tokens back into words. Only records to evaluate on have it.

    Attributes:
        contexts: of each question.
        offsets: (tokens, 2) int32, where each token of the contexts begins and ends in its own, in characters; equal
            contexts of neighbouring questions stand there once.
        context_starts: int64 offsets into `offsets`, of each question.
        answers: all that count as right, of each question; none where it has no answer.
        places: int64, where the context begins in each window.
        firsts: int64, which token of the context that is.
        counts: int64, tokens of the context in each window.
    """

    contexts: list[str]
    offsets: np.ndarray
    context_starts: np.ndarray
    answers: list[list[str]]
    places: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class QuestionRecords(Records):
    """Questions, each with the windows over its context; record i is the question `questions[i]`.

    One question is one record, the unit of privacy: it is sampled once, and all its windows share one clip, however
    long its context is. (Questions about one context are still different records. Where the context itself is what
    must not be told, make it the unit with `lorica.tasks.groups`.)

    Question k has the windows `first_windows[k] … first_windows[k] + window_counts[k] - 1`; window w is
    `tokens[starts[w] : starts[w] + sizes[w]]`. Subsets share all of that.

    Attributes:
        labels: (n,) int64, 1 where the question has an answer, 0 where it has none.
        questions: (n,) int64.
        tokens: int32, the tokens of all windows one after another.
        token_types: int8, parallel to `tokens`; None where the model takes none.
        starts: int64 offsets into `tokens`.
        sizes: int64 tokens of each window.
        positions: (windows, 2) int64, the places of the answer's first and last token in the window; (0, 0), the place
            of [CLS], where the window does not hold the whole answer or there is none.
        first_windows: int64, of each question.
        window_counts: int64, of each question.
        pad: the token id that stands in padded, masked places.
        pad_type: the token type that stands there.
        texts: None for records to train on, which keep tokens only.
    """

    questions: np.ndarray
    tokens: np.ndarray
    token_types: np.ndarray | None
    starts: np.ndarray
    sizes: np.ndarray
    positions: np.ndarray
    first_windows: np.ndarray
    window_counts: np.ndarray
    pad: int
    pad_type: int
    texts: Texts | None

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(np.maximum.reduceat(self.sizes, self.first_windows)[self.questions])

    @property
    def row_counts(self) -> np.ndarray:
        return np.asarray(self.window_counts[self.questions])

    def subset(self, indices: np.ndarray) -> QuestionRecords:
        return replace(
            self, labels=self.labels[indices], digests=self.digests[indices], questions=self.questions[indices]
        )

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """Which windows the records at `indices` have, one record after another."""
        counts = self.row_counts[indices]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(np.repeat(self.first_windows[self.questions[indices]], counts) + within)

    def batch(self, indices: np.ndarray) -> Batch:
        windows = self.windows(indices)
        mask, places = laid_out(self.starts[windows], self.sizes[windows])
        inputs = {"input_ids": padded(self.tokens, places, mask, self.pad)}
        if self.token_types is not None:
            inputs["token_type_ids"] = padded(self.token_types, places, mask, self.pad_type)
        inputs["attention_mask"] = mask.astype(np.int64)
        return Batch(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            torch.from_numpy(self.positions[windows]),
            torch.from_numpy(np.repeat(np.arange(len(indices)), self.row_counts[indices])),
        )


@dataclass(frozen=True)
class QuestionAnswering:
    """The place of an answer; F1 is the main metric. The arguments are those of `evaluate`."""

    null_threshold: float | None
    max_answer: int
    metric: str = "f1"

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return losses(outputs, batch)

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        assert isinstance(records, QuestionRecords)
        return evaluate(model, records, tokens, device, self.null_threshold, self.max_answer)


def losses(outputs: Any, batch: Batch) -> Tensor:
    """Mean over a question's windows of `(CE(start) + CE(end)) / 2`, in nats and fp32.

    The softmax runs over all tokens of a window, the question's too, as in transformers' question answering models, but
    not over padding, which those leave in: how much padding a window has depends on the questions beside it, and so
    would the gradient that is clipped. On a window without padding this is transformers' own loss.

    Args:
        outputs: `start_logits` and `end_logits`, (windows, longest).

    Returns:
        (questions,) float32.
    """
    padding = batch.inputs["attention_mask"] == 0

    def cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().masked_fill(padding, -math.inf), positions, reduction="none")

    starts, ends = batch.labels.unbind(1)
    return batch.by_example((cross_entropy(outputs.start_logits, starts) + cross_entropy(outputs.end_logits, ends)) / 2)


def evaluate(
    model: Any,
    records: QuestionRecords,
    tokens: int,
    device: torch.device | str,
    null_threshold: float | None,
    max_answer: int = 30,
) -> dict[str, float]:
    """Exact match and F1 (shares) and mean loss (nats) of a model over all records, of which there is at least one.

    The answer is the span of context of greatest `start + end` logit, over all windows and all spans of at most
    `max_answer` tokens. It is the official BERT scripts' answer without their detour over the n best starts and ends,
    which may miss it. With a `null_threshold`, it is "" where [CLS] scores higher than the span by more than that, the
    least score of [CLS] over the windows taken: a window without the answer says nothing about the others. It is also
    "" where the logits are not finite.

    Every module is in evaluation mode meanwhile and gets its previous mode back, also after an error.

    Args:
        model: called as `model(**batch.inputs)`; gives `start_logits` and `end_logits`.
        tokens: padded tokens in one forward pass.
        null_threshold: how much more [CLS] has to score (v2.0; 0 where nothing else is known). None where every
            question has an answer (v1.1).
        max_answer: in tokens.

    Raises:
        ValueError: the records keep no texts.
    """
    if records.texts is None:
        raise ValueError("records made to train on keep no texts to evaluate with")
    total = dict.fromkeys(("exact_match", "f1"), 0.0)
    with evaluating(model):
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for indices in records.micro_batch_indices(np.arange(len(records)), tokens):
            batch = records.batch(indices).to(device)
            outputs = model(**batch.inputs)
            loss += losses(outputs, batch).sum(dtype=torch.float64)
            predictions = _predictions(outputs, records, records.texts, indices, null_threshold, max_answer)
            for index, prediction in zip(indices, predictions, strict=True):
                answers = records.texts.answers[records.questions[index]]
                total["exact_match"] += exact_match(prediction, answers)
                total["f1"] += f1(prediction, answers)
    return {name: value / len(records) for name, value in (total | {"loss": loss.item()}).items()}


def _predictions(
    outputs: Any,
    records: QuestionRecords,
    texts: Texts,
    indices: np.ndarray,
    null_threshold: float | None,
    max_answer: int,
) -> list[str]:
    """The answer to each question of a batch."""
    windows = records.windows(indices)
    starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
    columns = torch.arange(starts.shape[1], device=starts.device)
    place = torch.from_numpy(texts.places[windows]).to(starts.device)[:, None]
    count = torch.from_numpy(texts.counts[windows]).to(starts.device)[:, None]
    outside = (columns < place) | (columns >= place + count)
    in_reach = F.pad(ends.masked_fill(outside, -math.inf), (0, max_answer - 1), value=-math.inf)
    # spans[w, s, l] is the score of the span of l + 1 tokens from s on.
    spans = starts.masked_fill(outside, -math.inf)[:, :, None] + in_reach.unfold(1, max_answer, 1)
    best, where = (value.cpu().numpy() for value in spans.flatten(1).max(1))
    nulls = (starts[:, 0] + ends[:, 0]).cpu().numpy()

    predictions = []
    for index, (start, end) in zip(indices, pairwise(np.cumsum([0, *records.row_counts[indices]])), strict=True):
        row = start + int(np.argmax(best[start:end]))
        null = nulls[start:end].min()
        if not np.isfinite(best[row]) or (null_threshold is not None and not null - best[row] <= null_threshold):
            predictions.append("")
            continue
        question = records.questions[index]
        first, extra = divmod(int(where[row]), max_answer)
        token = texts.context_starts[question] + texts.firsts[windows[row]] + first - texts.places[windows[row]]
        begin, stop = texts.offsets[token, 0], texts.offsets[token + extra, 1]
        predictions.append(texts.contexts[question][begin:stop].strip())
    return predictions


def tokenise_questions(
    source: Source,
    question: str,
    context: str,
    answers: str,
    tokenizer: Any,
    max_length: int,
    stride: int,
    max_question: int,
    keep_texts: bool = False,
) -> QuestionRecords:
    """Tokenise questions with their contexts, in as many overlapping windows as the context needs.

    A window is `[CLS] question [SEP] context [SEP]`, or however the tokenizer frames a pair. Consecutive windows share
    `stride` tokens of context, and the last one ends with it: the same windows as transformers' tokenizers make with
    `truncation="only_second"` and `return_overflowing_tokens`. The first of a question's answers is trained on, all of
    them count in evaluation. Done once for the same data, tokenizer and lengths.

    Args:
        question: the column of questions, text.
        context: the column of contexts, text.
        answers: the column of answers as Hugging Face has them, `{text: [...], answer_start: [...]}` with the first
            character's place in the context; empty lists where there is no answer.
        tokenizer: a fast one of transformers.
        max_length: tokens of a window, special ones included; or what the tokenizer says its model can take, if less.
        stride: tokens of context that consecutive windows share.
        max_question: tokens of a question; what is beyond is cut off.
        keep_texts: keep what `evaluate` needs: contexts, answers, and where tokens are in their context.

    Raises:
        UserError: a column holds something else; an answer does not stand at its place in the context; a question or a
            context gives no tokens; the tokenizer is not a fast one; the lengths leave no room for context.
    """
    if not tokenizer.is_fast:
        problem = "its tokenizer cannot tell which characters a token stands for"
        raise UserError("model.base", tokenizer.name_or_path, problem, "use a model with a tokenizer.json")
    frame = _Frame.of(tokenizer)
    limit = min(max_length, tokenizer.model_max_length) - frame.size
    if limit - max_question <= stride:
        raise UserError(
            "task.max_length",
            max_length,
            f"with {max_question} tokens of question and {frame.size} special ones, {limit - max_question} are left "
            f"for context, which is not more than the {stride} that windows share",
            "raise max_length (the model may take less), or lower stride or max_question",
        )
    _check_answers(source, answers)
    asked, told = _texts(source, "question", question), _texts(source, "context", context)

    def rows(start: int) -> list[Row]:
        questions, contexts = (column.slice(start, SLICE).to_pylist() for column in (asked, told))
        return list(zip(questions, contexts, _answers(source, answers, context, contexts, start), strict=True))

    slices = range(0, source.table.num_rows, SLICE)
    labels, digests, contexts, spoken = [], [], [], []
    for row in chain.from_iterable(map(rows, slices)):
        labels.append(bool(row[2]))
        digests.append(_digest(row))
        if keep_texts:
            contexts.append(row[1])
            spoken.append([text for text, _ in row[2]])

    def make(arrays: Arrays) -> None:
        before = 0
        for start in slices:
            here = rows(start)
            question_tokens = _encode(tokenizer, [row[0] for row in here], truncation=True, max_length=max_question)
            distinct = {text: number for number, text in enumerate(dict.fromkeys(row[1] for row in here))}
            encoded = _encode(tokenizer, list(distinct), return_offsets_mapping=True)
            offsets = [np.array(pairs, dtype=np.int32).reshape(-1, 2) for pairs in encoded["offset_mapping"]]
            context_starts = before + np.cumsum([0, *map(len, offsets)])
            before = int(context_starts[-1])
            arrays.append("offsets", np.concatenate(offsets))
            tokens, token_types, windows, counts, numbers = [], [], [], [], []
            for index, (ids, (_, text, right)) in enumerate(
                zip(question_tokens["input_ids"], here, strict=True), start
            ):
                number = distinct[text]
                context_tokens = encoded["input_ids"][number]
                for column, part in ((question, ids), (context, context_tokens)):
                    if not part:
                        problem = f"record {index} (counted from 0) gives no tokens from column {column!r}"
                        raise source.error(problem, "fill the text in or remove the record")
                span = _span(offsets[number], right)
                place = frame.context_place(len(ids))
                cuts = _cuts(len(context_tokens), limit - len(ids), stride)
                for first, end in cuts:
                    tokens.append(frame.tokens(ids, context_tokens[first:end]))
                    token_types.append(frame.token_types(len(ids), end - first))
                    inside = span is not None and first <= span[0] and span[1] < end
                    position = (place + span[0] - first, place + span[1] - first) if span and inside else (0, 0)
                    windows.append((*position, place, first, end - first))
                counts.append(len(cuts))
                numbers.append(number)
            arrays.append("tokens", np.concatenate(tokens))
            arrays.append("token_types", np.concatenate(token_types))
            arrays.append("sizes", np.fromiter(map(len, tokens), dtype=np.int64))
            arrays.append("windows", np.array(windows, dtype=np.int64))
            arrays.append("window_counts", np.array(counts, dtype=np.int64))
            arrays.append("context_starts", context_starts[numbers])

    content = hashlib.sha256(b"".join(digests)).hexdigest()
    lengths = map(str, (limit, stride, max_question))
    arrays = cached_arrays(["questions", content, tokenizer_identity(tokenizer), *lengths], make)
    sizes, window_counts = np.asarray(arrays["sizes"]), np.asarray(arrays["window_counts"])
    positions, (places, firsts, counts) = arrays["windows"][:, :2], arrays["windows"][:, 2:].T
    texts = None
    if keep_texts:
        texts = Texts(contexts, arrays["offsets"], arrays["context_starts"], spoken, places, firsts, counts)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return QuestionRecords(
        labels=np.array(labels, dtype=np.int64),
        digests=stack_digests(digests),
        questions=np.arange(len(labels)),
        tokens=arrays["tokens"],
        token_types=arrays["token_types"] if "token_type_ids" in tokenizer.model_input_names else None,
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        positions=positions,
        first_windows=np.cumsum(window_counts) - window_counts,
        window_counts=window_counts,
        pad=next(pad for pad in pads if pad is not None),
        pad_type=tokenizer.pad_token_type_id,
        texts=texts,
    )


@dataclass(frozen=True)
class _Frame:
    """The special tokens around and between a pair of texts, with the token types of everything.

    Attributes:
        special: (token ids, token types) before the question, between the two and after the context.
        types: token type of the question and of the context.
    """

    special: tuple[tuple[list[int], list[int]], ...]
    types: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Any) -> _Frame:
        encoded = tokenizer("a", "b", return_token_type_ids=True)
        texts = encoded.sequence_ids(0)
        edges = [0, texts.index(0), _last(texts, 0), texts.index(1), _last(texts, 1), len(texts)]
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        special = tuple((ids[start:end], types[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True))
        return cls(special, (types[edges[1]], types[edges[3]]))

    @property
    def size(self) -> int:
        return sum(len(ids) for ids, _ in self.special)

    def context_place(self, question: int) -> int:
        return len(self.special[0][0]) + question + len(self.special[1][0])

    def tokens(self, question: list[int], context: list[int]) -> np.ndarray:
        before, between, after = (ids for ids, _ in self.special)
        return np.array([*before, *question, *between, *context, *after], dtype=np.int32)

    def token_types(self, question: int, context: int) -> np.ndarray:
        before, between, after = (types for _, types in self.special)
        first, second = self.types
        return np.array([*before, *[first] * question, *between, *[second] * context, *after], dtype=np.int8)


def _last(values: list[int | None], value: int) -> int:
    """One past the last place of a value."""
    return len(values) - values[::-1].index(value)


def _cuts(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First and end of each window over `count` tokens, `room` at a time, that share `stride`."""
    cuts = [(0, min(room, count))]
    while cuts[-1][1] < count:
        first = cuts[-1][1] - stride
        cuts.append((first, min(first + room, count)))
    return cuts


def _span(offsets: np.ndarray, answers: Answers) -> tuple[int, int] | None:
    """First and last token that hold a character of the first answer."""
    if not answers:
        return None
    text, start = answers[0]
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )
    return encoded


def _texts(source: Source, key: str, column: str) -> pa.ChunkedArray:
    import pyarrow as pa

    values = source.table.column(column)
    if not is_text(values.type):
        problem = f"the column of {source.name} holds {values.type}, not text"
        raise UserError(f"task.{key}", column, problem, "name a column of text")
    return values.cast(pa.large_string())


def _check_answers(source: Source, column: str) -> None:
    import pyarrow as pa

    kind = source.table.column(column).type
    if not pa.types.is_struct(kind) or {"text", "answer_start"} - {field.name for field in kind}:
        raise UserError(
            "task.answers",
            column,
            f"the column of {source.name} holds {kind}, not answers",
            "name a column of {text: [...], answer_start: [...]}, as SQuAD has it on the Hugging Face hub",
        )


def _answers(source: Source, column: str, context: str, contexts: list[str], start: int) -> list[Answers]:
    """The answers to each question of the slice from `start` on, with their places, empty ones left out."""
    found = []
    values = source.table.column(column).slice(start, SLICE).to_pylist()
    for index, (value, told) in enumerate(zip(values, contexts, strict=True), start):
        texts, places = value["text"], value["answer_start"]
        if not _aligned(texts, places, told):
            raise source.error(
                f"record {index} (counted from 0) has an answer in column {column!r} that does not stand at its "
                f"answer_start in column {context!r}",
                "count answer_start in characters from 0, or remove the record",
            )
        found.append([(text, place) for text, place in zip(texts, places, strict=True) if text])
    return found


def _aligned(texts: Any, starts: Any, context: str) -> bool:
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return False
    pairs = zip(texts, starts, strict=True)
    return all(
        isinstance(text, str) and isinstance(start, int) and start >= 0 and context.startswith(text, start)
        for text, start in pairs
    )


def _digest(row: Row) -> bytes:
    question, context, answers = row
    fields = (part for text, place in answers for part in (text.encode(), str(place).encode()))
    return digest([question.encode(), context.encode(), *fields])
