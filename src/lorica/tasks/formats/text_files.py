"""What all text formats share: UTF-8, and nothing else."""

from __future__ import annotations

import codecs
from pathlib import Path

from lorica.errors import UserError

CHUNK = 2**20
UTF8 = (
    "save it as text in UTF-8 (a spreadsheet offers this as 'CSV UTF-8'; otherwise use iconv -f ENCODING -t UTF-8 "
    "FILE > NEW)"
)
# First bytes -> what the file is, and what to do.
SIGNATURES = {
    b"\x1f\x8b": ("compressed with gzip", "decompress it (gunzip)"),
    b"BZh": ("compressed with bzip2", "decompress it (bunzip2)"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it (unxz)"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "decompress it (unzstd)"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet", "extract it, or save the spreadsheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old spreadsheet", "save it as CSV in UTF-8"),
    b"PAR1": ("a Parquet file", "rename it to end in .parquet"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"%PDF": ("a PDF document", "give a file of records"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "download the data (git lfs pull)"),
    b"\xff\xfe\x00\x00": ("encoded in UTF-32", UTF8),
    b"\x00\x00\xfe\xff": ("encoded in UTF-32", UTF8),
    b"\xff\xfe": ("encoded in UTF-16", UTF8),
    b"\xfe\xff": ("encoded in UTF-16", UTF8),
}


def check_text(path: Path, key: str) -> None:
    """Refuse what is not UTF-8 text, and say what it is instead; a byte order mark is fine.

    Raises:
        UserError: the file is compressed, of another format or in another encoding, or has NUL bytes; names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    line = 1
    with path.open("rb") as file:
        _check_signature(path, key, file.read(32))
        file.seek(0)
        while content := file.read(CHUNK):
            nul = content.find(0)
            if nul >= 0:
                problem = f"line {line + content.count(10, 0, nul)} has NUL bytes: it is in UTF-16, or damaged"
                raise UserError(key, str(path), problem, UTF8)
            try:
                text = decoder.decode(content)
            # The error's own message shows bytes of the record.
            except UnicodeDecodeError as error:
                bad = line + error.object.count(10, 0, error.start)
                raise _not_utf8(path, key, bad) from None
            line += text.count("\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(path, key, line) from None


def _check_signature(path: Path, key: str, content: bytes) -> None:
    for signature, (problem, remedy) in SIGNATURES.items():
        if content.startswith(signature):
            raise UserError(key, str(path), f"it is {problem}", remedy)


def _not_utf8(path: Path, key: str, line: int) -> UserError:
    return UserError(key, str(path), f"line {line} is not encoded in UTF-8 (Latin-1 or Windows-1252?)", UTF8)
