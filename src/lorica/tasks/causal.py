"""Texts for causal models: prompts with completions, conversations or plain texts; tokenised once, without padding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import jinja2
import numpy as np
import torch

from lorica.errors import UserError
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, digest, stack_digests
from lorica.tasks.text import SLICE, TokenRecords, column_texts, laid_out, padded, tokenizer_identity

# The value that transformers leaves out of a loss.
IGNORED = -100
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Message = dict[str, str]
# A record's texts: prompt and completion, a text alone, or roles and contents in turn.
Row = tuple[str, ...]
# A record's tokens, and the places of those that are learned.
Encoded = tuple[list[int], list[Span]]


@dataclass(frozen=True, eq=False)
class CausalRecords(TokenRecords):
    """Tokenised texts and which of their tokens are learned.

    `labels` is zero everywhere: there are no classes.

    Attributes:
        learned: bool, parallel to `tokens`: the tokens that the loss counts. Never a record's first, which nothing
            predicts, and at least one of each record.
    """

    learned: np.ndarray

    def batch(self, indices: np.ndarray) -> Batch:
        """Padded on the right; the labels are the tokens themselves where they are learned, and `IGNORED` elsewhere."""
        mask, places = laid_out(self.starts[indices], self.sizes[indices])
        ids = padded(self.tokens, places, mask, self.pad)
        learned = padded(self.learned, places, mask, 0).astype(bool)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return Batch(inputs, torch.from_numpy(np.where(learned, ids, IGNORED)))

    def question(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before the last run of learned tokens, and that run: a prompt, and the answer to it."""
        here = slice(self.starts[index], self.starts[index] + self.sizes[index])
        tokens, places = self.tokens[here], np.flatnonzero(self.learned[here])
        breaks = np.flatnonzero(np.diff(places) > 1)
        start = places[breaks[-1] + 1] if len(breaks) else places[0]
        return tokens[:start], tokens[start : places[-1] + 1]


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
        template = _chat_template(tokenizer)
        # Such a template may write the day's date.
        day = date.today().isoformat() if "strftime_now" in template else ""
        key = ["conversations", template, day]
        rows = partial(_conversations, source, columns[0])

        def encoded(start: int) -> Iterator[Encoded]:
            return _encoded_conversations(source, rows(start), start, tokenizer, template)

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
                        "raise task.max_length, shorten the prompt or remove the record",
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


def _edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that every text begins and ends with."""
    begin = [tokenizer.bos_token_id]
    if _ids(tokenizer, [""])[0][:1] != begin:
        begin = []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encoded_completions(rows: list[Row], tokenizer: Any, begin: list[int], end: list[int]) -> Iterator[Encoded]:
    """Of each record, its tokens and the places of its completion among them; a text alone has an empty prompt."""
    prompts = [row[0] if len(row) == 2 else "" for row in rows]
    completions = [row[-1] for row in rows]
    encoded = (_ids(tokenizer, texts, add_special_tokens=False) for texts in (prompts, completions))
    for prompt, completion in zip(*encoded, strict=True):
        # Some data sets write the end-of-text token out.
        closed = bool(end) and completion[-1:] == end
        ids = [*begin, *prompt, *completion, *([] if closed else end)]
        yield ids, [(len(begin) + len(prompt), len(ids))]


def _chat_template(tokenizer: Any) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "model.base",
            tokenizer.name_or_path,
            "its tokenizer has no (default) chat template to write conversations out",
            "use a chat model, or give a prompt and a completion column",
        ) from None
    return template


def _encoded_conversations(
    source: Source, conversations: list[Row], start: int, tokenizer: Any, template: str
) -> Iterator[Encoded]:
    """Of each conversation, its tokens and the places of the assistant's turns among them.

    A turn's places come from the tokens of the text before its beginning and before its end. (Offsets of characters
    would not do: tokenizers give blanks none, so that transformers' `return_assistant_tokens_mask` leaves out turns
    that begin with a blank, and takes turns that end with one to go on to the end of the conversation.) A token across
    a turn's beginning counts, one across its end does not.

    Args:
        start: the first one's index among all records, for errors.
    """
    find = _marked_turns if GENERATION_MARKER.search(template) else _turns_by_prefix
    for index, row in enumerate(conversations, start):
        messages = [{"role": role, "content": text} for role, text in zip(row[::2], row[1::2], strict=True)]
        try:
            text, turns = find(messages, tokenizer, template)
        # The template's own message may quote the conversation.
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise source.error(
                f"the chat template cannot write out record {index} (counted from 0; {type(error).__name__})",
                "check the order and the roles of its messages, or remove the record",
            ) from None
        if turns is None:
            raise source.error(
                f"the chat template writes the beginning of record {index} (counted from 0) otherwise when more "
                "messages follow, so the assistant's turns cannot be found",
                "put {% generation %} and {% endgeneration %} around the assistant's turns in the tokenizer's chat "
                "template",
            )
        cuts = [cut for turn in turns for cut in turn]
        whole, *before = _ids(tokenizer, [text, *(text[:cut] for cut in cuts)], add_special_tokens=False)
        places = [_shared(whole, tokens) for tokens in before]
        yield whole, list(zip(places[::2], places[1::2], strict=True))


def _marked_turns(messages: list[Message], tokenizer: Any, template: str) -> tuple[str, list[Span] | None]:
    """The conversation written out, and the characters between the template's generation markers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, turns = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], turns[0]


def _turns_by_prefix(messages: list[Message], tokenizer: Any, template: str) -> tuple[str, list[Span] | None]:
    """The conversation written out, and the characters of the assistant's turns.

    A turn goes from the end of the messages before it, written out with the words that ask for an answer, to the end of
    the messages up to it. None if one of those texts is not how the whole begins.
    """

    def written(count: int, ask: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        return text

    whole, turns = written(len(messages)), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(index, ask=True), written(index + 1)
            if not (whole.startswith(before) and whole.startswith(after)):
                return whole, None
            turns.append((len(before), len(after)))
    return whole, turns


def _conversations(source: Source, column: str, start: int) -> list[Row]:
    """Of each record of the slice from `start` on: role, content, role, content, …"""
    rows: list[Row] = []
    for index, messages in enumerate(source.table.column(column).slice(start, SLICE).to_pylist(), start):
        try:
            row = tuple(message[key] for message in messages for key in ("role", "content"))
        except (TypeError, KeyError):
            raise _no_conversation(source, column, index) from None
        if not all(isinstance(text, str) for text in row):
            raise _no_conversation(source, column, index)
        rows.append(row)
    return rows


def _no_conversation(source: Source, column: str, index: int) -> UserError:
    problem = f"record {index} (counted from 0) of {source.name} is no list of messages with a role and a content"
    return UserError("task.text", column, problem, 'write [{"role": "user", "content": "…"}, …]')


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return found


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
