"""Files of the official SQuAD format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import UserError
from lorica.tasks.formats.columns import check_size
from lorica.tasks.formats.json_lines import loads
from lorica.tasks.formats.text_files import check_text

if TYPE_CHECKING:
    import pyarrow as pa

# Of a context; offsets are kept in 32 bits.
MOST_CHARACTERS = 2**31


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

    check_text(path, key)
    rows: list[dict[str, Any]] = []
    size = 0
    remedy = "use the official train-*.json or dev-*.json"
    try:
        content = loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(key, str(path), f"not in SQuAD format: it {error}", remedy) from None
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    rows.append(_question(article, paragraph, entry))
                    # All questions on a paragraph get its context.
                    size += len(rows[-1]["context"]) + len(rows[-1]["question"])
                    check_size(path, key, len(rows), size)
        answer = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
        texts = ("id", "title", "context", "question")
        schema = pa.schema([*((name, pa.string()) for name in texts), ("answers", answer)])
        return pa.Table.from_pylist(rows, schema=schema)
    # The parsers' own messages quote the file.
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        problem = f"not in SQuAD format{f' from question {len(rows)} (counted from 0) on' if rows else ''}"
        raise UserError(key, str(path), problem, remedy) from None


def _question(article: dict[str, Any], paragraph: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    answers = [] if entry.get("is_impossible") else entry["answers"]
    places = [answer["answer_start"] for answer in answers]
    row = {
        "id": entry["id"],
        "title": article.get("title", ""),
        "context": paragraph["context"],
        "question": entry["question"],
        "answers": {"text": [answer["text"] for answer in answers], "answer_start": places},
    }
    texts = [row["id"], row["title"], row["context"], row["question"], *row["answers"]["text"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    if not all(type(place) is int and 0 <= place < MOST_CHARACTERS for place in places):
        raise ValueError
    return row
