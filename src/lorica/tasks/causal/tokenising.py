"""Texts for causal models: prompts with completions, conversations or plain texts; tokenised once, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from typing import Any

import numpy as np

from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.causal.conversations import (
    Encoded,
    chat_template,
    encoded_conversations,
    question_and_answer,
    read_conversations,
    token_ids,
)
from lorica.tasks.causal.records import CausalRecords, Prompts
from lorica.tasks.readers import Source
from lorica.tasks.records import digest, stack_digests
from lorica.tasks.text import SLICE, column_texts, tokenizer_identity

# A record's texts: prompt and completion, a text alone, or roles and contents in turn.
Row = tuple[str, ...]


def tokenise_causal(source: Source, columns: list[str], tokenizer: Any, max_length: int) -> CausalRecords:
    """Tokenise a data set for a causal model. One row is one record, however many turns it has.

    - Two columns of text are a prompt and its completion, taken as they stand: no template, no blank between them. They
      are tokenised apart, as the prompt is when an answer is asked for. The completion is learned.
    - One column of text is learned whole.
    - One column of lists of `{role, content}` holds conversations. The tokenizer's chat template writes them out, and
      the turns of the role `assistant` are learned.

    Texts begin with the beginning-of-text token if the tokenizer puts one there, and end with its end-of-text token, if
    it has one, which is learned too; a conversation has what its template writes. Records lose their end beyond
    `max_length` tokens, or beyond what the tokenizer says its model can take, so that a completion keeps its beginning.

    Done once for the same data, tokenizer, template and length.

    Raises:
        UserError: a column holds neither texts nor conversations; the tokenizer has no chat template, or one that does
            not show where the assistant's turns are; nothing is learned in a record.
    """
    import pyarrow as pa

    limit = min(max_length, tokenizer.model_max_length)
    rows: Callable[[int], list[Row]]
    encoded: Callable[[int], Iterator[Encoded]]
    if len(columns) == 1 and pa.types.is_nested(source.table.column(columns[0]).type):
        template = chat_template(tokenizer)
        # Such a template may write the day's date.
        day = date.today().isoformat() if "strftime_now" in template else ""
        key = ["conversations", template, day]
        rows = partial(read_conversations, source, columns[0])

        def encoded(start: int) -> Iterator[Encoded]:
            return encoded_conversations(source, rows(start), start, tokenizer, template)

    else:
        texts = [column_texts(source, column) for column in columns]
        begin, end = _edges(tokenizer)
        key = ["texts", str(begin), str(end)]

        def rows(start: int) -> list[Row]:
            return list(zip(*(column.slice(start, SLICE).to_pylist() for column in texts), strict=True))

        def encoded(start: int) -> Iterator[Encoded]:
            return _encoded_completions(rows(start), tokenizer, begin, end)

    slices = range(0, source.table.num_rows, SLICE)
    digests = [digest(text.encode() for text in row) for start in slices for row in rows(start)]

    def make(arrays: Arrays) -> None:
        for start in slices:
            tokens, learned = [], []
            for index, (ids, spans) in enumerate(encoded(start), start):
                tokens.append(np.array(ids[:limit], dtype=np.int32))
                learned.append(np.zeros(len(tokens[-1]), dtype=bool))
                for first, last in spans:
                    learned[-1][first:last] = True
                learned[-1][:1] = False
                if not learned[-1].any():
                    raise source.error(
                        f"record {index} (counted from 0) has nothing to learn in its first {limit} tokens (column "
                        f"{' and '.join(map(repr, columns))})",
                        "raise task.max_length, shorten the prompt, or remove the record",
                    )
            arrays.append("sizes", np.fromiter(map(len, tokens), dtype=np.int64))
            arrays.append("tokens", np.concatenate(tokens))
            arrays.append("learned", np.concatenate(learned))

    content = hashlib.sha256(b"".join(digests)).hexdigest()
    arrays = cached_arrays(["causal", content, tokenizer_identity(tokenizer), str(limit), *key], make)
    sizes = np.asarray(arrays["sizes"])
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return CausalRecords(
        labels=np.zeros(len(sizes), dtype=np.int64),
        digests=stack_digests(digests),
        tokens=arrays["tokens"],
        learned=arrays["learned"],
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        pad=next(pad for pad in pads if pad is not None),
    )


def tokenise_prompts(source: Source, column: str, tokenizer: Any) -> Prompts:
    """Tokenise prompts as `tokenise_causal` does: texts with the beginning-of-text token if the tokenizer puts one
    there, or conversations with the words of the chat template that ask for an answer.

    Raises:
        UserError: the column holds neither texts nor conversations, or the tokenizer has no chat template.
    """
    import pyarrow as pa

    answers: list[list[int]] = []
    if pa.types.is_nested(source.table.column(column).type):
        chat_template(tokenizer)
        starts = range(0, source.table.num_rows, SLICE)
        rows = [row for start in starts for row in read_conversations(source, column, start)]
        asked, answered = zip(*(question_and_answer(row, tokenizer) for row in rows), strict=True)
        tokens = token_ids(tokenizer, list(asked), add_special_tokens=False)
        answers = token_ids(tokenizer, list(answered), add_special_tokens=False)
    else:
        begin, _ = _edges(tokenizer)
        texts = column_texts(source, column).to_pylist()
        tokens = [[*begin, *ids] for ids in token_ids(tokenizer, texts, add_special_tokens=False)]
    for index, ids in enumerate(tokens):
        if not ids:
            problem = f"record {index} (counted from 0) has no tokens in column {column!r}"
            raise source.error(problem, "add text or remove the record")
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Prompts(
        [np.array(ids, dtype=np.int32) for ids in tokens],
        [np.array(ids, dtype=np.int32) for ids in answers],
        next(pad for pad in pads if pad is not None),
    )


def _edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that every text begins and ends with."""
    begin = [tokenizer.bos_token_id]
    if token_ids(tokenizer, [""])[0][:1] != begin:
        begin = []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encoded_completions(rows: list[Row], tokenizer: Any, begin: list[int], end: list[int]) -> Iterator[Encoded]:
    """Of each record, its tokens and the places of its completion among them; a text alone has an empty prompt."""
    prompts = [row[0] if len(row) == 2 else "" for row in rows]
    completions = [row[-1] for row in rows]
    encoded = (token_ids(tokenizer, texts, add_special_tokens=False) for texts in (prompts, completions))
    for prompt, completion in zip(*encoded, strict=True):
        # Some data sets write the end-of-text token out.
        closed = bool(end) and completion[-1:] == end
        ids = [*begin, *prompt, *completion, *([] if closed else end)]
        yield ids, [(len(begin) + len(prompt), len(ids))]
