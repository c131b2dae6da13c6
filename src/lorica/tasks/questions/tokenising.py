"""Tokenised questions: with their contexts, in as many windows as those need; tokenised once, without padding."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import numpy as np

from lorica.errors import UserError
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.questions.records import QuestionRecords, Texts
from lorica.tasks.questions.windows import Answers, Frame, answer_span, window_cuts
from lorica.tasks.readers import Source
from lorica.tasks.records import digest, stack_digests
from lorica.tasks.text import SLICE, column_texts, tokenizer_identity

# A question, its context and the answers to it.
Row = tuple[str, str, Answers]


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
        problem = "its tokenizer does not report the character positions of tokens"
        raise UserError("model.base", tokenizer.name_or_path, problem, "use a model with a tokenizer.json")
    frame = Frame.of(tokenizer)
    limit = min(max_length, tokenizer.model_max_length) - frame.size
    if limit - max_question <= stride:
        raise UserError(
            "task.max_length",
            max_length,
            f"after {max_question} question tokens and {frame.size} special tokens, {limit - max_question} tokens are "
            f"left for context, which must be more than the stride of {stride}",
            "raise task.max_length (up to the model's limit), or lower task.stride or task.max_question",
        )
    _check_answers(source, answers)
    asked, told = column_texts(source, question, "task.question"), column_texts(source, context, "task.context")

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
                        problem = f"record {index} (counted from 0) has no tokens in column {column!r}"
                        raise source.error(problem, "add text or remove the record")
                span = answer_span(offsets[number], right)
                place = frame.context_place(len(ids))
                cuts = window_cuts(len(context_tokens), limit - len(ids), stride)
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


def _check_answers(source: Source, column: str) -> None:
    import pyarrow as pa

    kind = source.table.column(column).type
    if not pa.types.is_struct(kind) or {"text", "answer_start"} - {field.name for field in kind}:
        raise UserError(
            "task.answers",
            column,
            f"the column of {source.name} holds {kind}, not answers",
            "choose a column of {text: [...], answer_start: [...]}, as in SQuAD on the Hugging Face hub",
        )


def _answers(source: Source, column: str, context: str, contexts: list[str], start: int) -> list[Answers]:
    """The answers to each question of the slice from `start` on, with their places, empty ones left out."""
    found = []
    values = source.table.column(column).slice(start, SLICE).to_pylist()
    for index, (value, told) in enumerate(zip(values, contexts, strict=True), start):
        texts, places = value["text"], value["answer_start"]
        if not _aligned(texts, places, told):
            raise source.error(
                f"record {index} (counted from 0) has an answer in column {column!r} that does not match column "
                f"{context!r} at its answer_start",
                "correct answer_start (in characters, counted from 0), or remove the record",
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
