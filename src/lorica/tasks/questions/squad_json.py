"""Files of the official SQuAD format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def read_squad_json(path: Path, key: str = "task.train") -> pa.Table:
    """Read a file of the official SQuAD format, v1.1 or v2.0, into Hugging Face's columns, one question a row.

    `{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
    "is_impossible"}]}]}]}` becomes `id`, `title`, `context`, `question` (text) and `answers` (`{text: [...],
    answer_start: [...]}`). Questions keep the file's order. What is said to be impossible has no answers; its
    `plausible_answers` are left out.

    Args:
        key: the configuration's key that names the file, for errors.

    Raises:
        UserError: the file is no JSON of this format.
    """
    import pyarrow as pa

    rows = []
    try:
        for article in json.loads(path.read_bytes())["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = [] if entry.get("is_impossible") else entry["answers"]
                    rows.append(
                        {
                            "id": entry["id"],
                            "title": article.get("title", ""),
                            "context": paragraph["context"],
                            "question": entry["question"],
                            "answers": {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [answer["answer_start"] for answer in answers],
                            },
                        }
                    )
        answer = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
        texts = ("id", "title", "context", "question")
        schema = pa.schema([*((name, pa.string()) for name in texts), ("answers", answer)])
        return pa.Table.from_pylist(rows, schema=schema)
    # The parsers' own messages quote the file.
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        problem = f"not in SQuAD format{f' from question {len(rows)} (counted from 0) on' if rows else ''}"
        raise UserError(key, str(path), problem, "use the official train-*.json or dev-*.json") from None
