"""Text classification records: tokenised once, stored without padding."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from lorica.errors import UserError
from lorica.pretrained import from_pretrained
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.labels import is_text
from lorica.tasks.limits import fit_tokenizer
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Records, digest, stack_digests

if TYPE_CHECKING:
    import pyarrow as pa

# Larger slices gain nothing, and hold more Python objects at a time.
SLICE = 1024


@dataclass(frozen=True, eq=False)
class TokenRecords(Records):
    """Tokenised texts without padding; record i is `tokens[starts[i] : starts[i] + sizes[i]]`.

    Attributes:
        tokens: int32, the tokens of all records one after another.
        starts: (n,) int64 offsets into `tokens`.
        sizes: (n,) int64 tokens of each record.
        pad: the token id that stands in padded, masked places.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    pad: int

    @property
    def lengths(self) -> np.ndarray:
        return self.sizes

    def subset(self, indices: np.ndarray) -> Self:
        return replace(
            self,
            labels=self.labels[indices],
            digests=self.digests[indices],
            starts=self.starts[indices],
            sizes=self.sizes[indices],
        )


@dataclass(frozen=True, eq=False)
class TextRecords(TokenRecords):
    """Texts to classify, or to predict a number of.

    Attributes:
        token_types: int8, parallel to `tokens`; None where the tokenizer makes none.
        pad_type: the token type that stands in padded, masked places.
    """

    token_types: np.ndarray | None
    pad_type: int

    def batch(self, indices: np.ndarray) -> Batch:
        mask, places = laid_out(self.starts[indices], self.sizes[indices])
        inputs = {"input_ids": padded(self.tokens, places, mask, self.pad)}
        if self.token_types is not None:
            inputs["token_type_ids"] = padded(self.token_types, places, mask, self.pad_type)
        inputs["attention_mask"] = mask.astype(np.int64)
        return Batch(
            {name: torch.from_numpy(array) for name, array in inputs.items()}, torch.from_numpy(self.labels[indices])
        )


def laid_out(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens that are stored without padding go in a padded batch, and where they come from.

    Returns:
        mask (n, longest) bool, and the offsets of the tokens that fill it, row after row.
    """
    columns = np.arange(sizes.max())
    mask = columns < sizes[:, None]
    return mask, (starts[:, None] + columns)[mask]


def padded(flat: np.ndarray, places: np.ndarray, mask: np.ndarray, pad: int) -> np.ndarray:
    """`flat[places]` where `mask (n, t)` is true, in its order, and `pad` elsewhere; int64."""
    rows = np.full(mask.shape, pad, dtype=np.int64)
    rows[mask] = flat[places]
    return rows


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a model folder or hub id, within the model's limits (`lorica.tasks.limits`).

    A folder is read without the network.

    Raises:
        UserError: there is none, it cannot be loaded, has no vocabulary, or has tokens that the model lacks.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = from_pretrained(
        AutoTokenizer.from_pretrained,
        base,
        "its tokenizer",
        "give the id of a model on the hub, or a folder with config.json and the tokenizer's files (tokenizer.json, "
        "tokenizer_config.json)",
    )
    # transformers makes a tokenizer that knows its special tokens only where the vocabulary's file is missing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError("model.base", base, "its tokenizer has no vocabulary", "add tokenizer.json to the folder")
    if tokenizer.pad_token_id is None:
        # Masked in any case; without one, transformers pads nothing.
        tokenizer.pad_token = tokenizer.eos_token
    if not Path(base).is_dir() or (Path(base) / "config.json").is_file():
        remedy = "give the id of a model on the hub, or a folder with config.json"
        config = from_pretrained(AutoConfig.from_pretrained, base, "its configuration", remedy)
        fit_tokenizer(tokenizer, config, base)
    return tokenizer


def most_text(tokenizer: Any, max_length: int, pair: bool) -> int:
    """Tokens of a record, special ones included: `task.max_length`, or what the model can take if that is less.

    Raises:
        UserError: the special tokens leave no room for text.
    """
    limit = int(min(max_length, tokenizer.model_max_length))
    special = tokenizer.num_special_tokens_to_add(pair)
    if limit <= special:
        problem = f"a record has {limit} tokens at most, {special} of which are special ones"
        raise UserError("task.max_length", max_length, problem, f"use a model that takes more than {special} tokens")
    return limit


def tokenise(
    source: Source, columns: list[str], labels: np.ndarray, label_texts: list[str], tokenizer: Any, max_length: int
) -> TextRecords:
    """Tokenise one text column, or two as sentence pairs, once for the same data, tokenizer and length.

    Records are cut at `max_length` tokens, special ones included, or at what the model can take, whichever is less;
    pairs lose tokens from the longer of the two. Where the tokenizer has no padding token, its end-of-text token pads,
    and 0 if it has neither; `attention_mask` hides padding in any case.

    Args:
        labels: (n,) what is predicted: int64 positions, or float32 numbers.
        label_texts: each record's label as text, which its digest is made of.

    Raises:
        UserError: a column holds no text, or a record has no tokens.
    """
    texts = [column_texts(source, column) for column in columns]
    digests = np.concatenate(
        [_digests(texts, label_texts, start) for start in range(0, len(labels), SLICE)], dtype=np.uint8
    )
    limit = most_text(tokenizer, max_length, len(columns) == 2)

    def make(arrays: Arrays) -> None:
        for start in range(0, len(labels), SLICE):
            encoded = tokenizer(
                *(column.slice(start, SLICE).to_pylist() for column in texts),
                truncation=True,
                max_length=limit,
                return_attention_mask=False,
                verbose=False,
            )
            sizes = np.fromiter(map(len, encoded["input_ids"]), dtype=np.int64)
            if not sizes.all():
                index = start + int(np.flatnonzero(sizes == 0)[0])
                named = " and ".join(map(repr, columns))
                problem = f"record {index} (counted from 0) has no tokens in column {named}"
                raise source.error(problem, "add text or remove the record")
            arrays.append("sizes", sizes)
            arrays.append("tokens", _flat(encoded["input_ids"], np.int32, int(sizes.sum())))
            if "token_type_ids" in encoded:
                arrays.append("token_types", _flat(encoded["token_type_ids"], np.int8, int(sizes.sum())))

    content = hashlib.sha256(digests.tobytes()).hexdigest()
    arrays = cached_arrays(["text", content, tokenizer_identity(tokenizer), str(limit), *columns], make)
    sizes = arrays["sizes"]
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return TextRecords(
        labels=labels,
        digests=digests,
        tokens=arrays["tokens"],
        token_types=arrays.get("token_types"),
        starts=np.cumsum(sizes) - sizes,
        sizes=np.asarray(sizes),
        pad=next(pad for pad in pads if pad is not None),
        pad_type=tokenizer.pad_token_type_id,
    )


def tokenise_unlabelled(source: Source, columns: list[str], tokenizer: Any, max_length: int) -> TextRecords:
    """Tokenise texts to predict from, as `tokenise` does with those to learn from; their labels are zero.

    Raises:
        UserError: as `tokenise`.
    """
    count = source.table.num_rows
    return tokenise(source, columns, np.zeros(count, dtype=np.int64), [""] * count, tokenizer, max_length)


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 (hexadecimal) of all that decides what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Set anew in every call, and left behind by the last one.
    kept = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    inner = json.dumps(kept, sort_keys=True)
    outer = [type(tokenizer).__name__, repr(sorted(tokenizer.special_tokens_map.items())), tokenizer.truncation_side]
    return hashlib.sha256("\0".join([inner, *outer, *tokenizer.model_input_names]).encode()).hexdigest()


def column_texts(source: Source, column: str, key: str = "task.text") -> pa.ChunkedArray:
    """The texts of a column (large_string).

    Args:
        key: the configuration's key that names the column.

    Raises:
        UserError: it holds something else.
    """
    import pyarrow as pa

    values = source.table.column(column)
    if not is_text(values.type):
        problem = f"the column of {source.name} holds {values.type}, not text"
        raise UserError(key, column, problem, "choose a column of text")
    return values.cast(pa.large_string())


def _flat(lists: list[list[int]], kind: type[np.integer], total: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype=kind, count=total)


def _digests(texts: list[pa.ChunkedArray], label_texts: list[str], start: int) -> np.ndarray:
    """(SLICE or fewer, 32): those of the records from `start` on."""
    columns = [column.slice(start, SLICE).to_pylist() for column in texts]
    records = zip(*columns, label_texts[start : start + SLICE], strict=True)
    return stack_digests([digest(text.encode() for text in record) for record in records])
