"""Conversations: written out by a chat template, and where the assistant's turns are in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jinja2

from lorica.errors import UserError
from lorica.tasks.readers import Source
from lorica.tasks.text import SLICE

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Message = dict[str, str]
# Roles and contents in turn.
Conversation = tuple[str, ...]
# A record's tokens, and the places of those that are learned.
Encoded = tuple[list[int], list[Span]]


def read_conversations(source: Source, column: str, start: int) -> list[Conversation]:
    """Of each record of the slice from `start` on: role, content, role, content, …"""
    rows: list[Conversation] = []
    for index, messages in enumerate(source.table.column(column).slice(start, SLICE).to_pylist(), start):
        try:
            row = tuple(message[key] for message in messages for key in ("role", "content"))
        except (TypeError, KeyError):
            raise _no_conversation(source, column, index) from None
        if not row or not all(isinstance(text, str) for text in row):
            raise _no_conversation(source, column, index)
        rows.append(row)
    return rows


def _no_conversation(source: Source, column: str, index: int) -> UserError:
    problem = f"record {index} (counted from 0) of {source.name} is not a list of messages with a role and a content"
    return UserError("task.text", column, problem, 'write conversations as [{"role": "user", "content": "…"}, …]')


def chat_template(tokenizer: Any) -> str:
    """The template that a tokenizer writes conversations out with.

    Raises:
        UserError: it has none.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "model.base",
            tokenizer.name_or_path,
            "its tokenizer has no (default) chat template",
            "use a chat model, or give a prompt and a completion column",
        ) from None
    return template


def encoded_conversations(
    source: Source, conversations: list[Conversation], start: int, tokenizer: Any, template: str
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
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise source.error(
                f"the chat template failed on record {index} (counted from 0; {type(error).__name__})",
                "check the order and the roles of its messages, or remove the record",
            ) from None
        if turns is None:
            raise source.error(
                f"the chat template changes the beginning of record {index} (counted from 0) when more messages "
                "follow, so the assistant's turns cannot be located",
                "put {% generation %} and {% endgeneration %} around the assistant's turns in the tokenizer's chat "
                "template",
            )
        cuts = [cut for turn in turns for cut in turn]
        whole, *before = token_ids(tokenizer, [text, *(text[:cut] for cut in cuts)], add_special_tokens=False)
        places = [_shared(whole, tokens) for tokens in before]
        yield whole, list(zip(places[::2], places[1::2], strict=True))


def question_and_answer(row: Conversation, tokenizer: Any) -> tuple[str, str]:
    """A conversation up to where the assistant answers next or, if it ends with an answer, up to that; and how the
    template writes an answer.
    """
    messages = [{"role": role, "content": text} for role, text in zip(row[::2], row[1::2], strict=True)]
    if messages[-1]["role"] == "assistant":
        messages.pop()
    asked: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answered: str = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "."}], tokenize=False)
    return asked, answered.removeprefix(asked)


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


def token_ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    """The tokens of each text; the tokenizer's special ones too, unless told otherwise."""
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return found


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
