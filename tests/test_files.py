"""Files are old or new, never half, and a full disk is one clear error."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorica.cli import app
from lorica.errors import UserError
from lorica.files import append_line, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_appending_to_a_full_disk_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="No space left"):
        append_line(Path("/dev/full"), "line")


@pytest.mark.integration
@pytest.mark.usefixtures("checked_once")
def test_a_run_out_of_disk_ends_with_one_line_and_resumes(tmp_path: Path, some_digits: list[str]) -> None:
    """A limit on file size stands in for the disk: the ledger reaches it first."""
    command = ["run", f"output={tmp_path}", f"privacy.ledger={tmp_path}/ledger", *some_digits, "federation.rounds=3"]
    command += ["federation.clients=2", "federation.partition=iid", "federation.local_steps=1", "name=full"]
    command += ["federation.batch_size=16", "privacy.epsilon=null", "privacy.noise_multiplier=1.0"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        first = CliRunner().invoke(app, command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert first.exit_code == 2, first.output
    assert isinstance(first.exception, SystemExit)
    assert "error" in first.stdout
    assert "Traceback" not in first.output
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert (tmp_path / "full" / "report.html").is_file()
