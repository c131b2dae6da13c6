from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lorica.errors import UserError
from lorica.run.workers import worker_processes


@pytest.mark.integration
def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="with fewer --jobs"), worker_processes(1) as executor:
        executor.submit(signal.raise_signal, signal.SIGKILL).result()


@pytest.mark.integration
def test_pieces_are_computed_in_other_processes() -> None:
    with worker_processes(1) as executor:
        assert executor.submit(os.getpid).result() != os.getpid()


def leave(path: Path) -> None:
    path.touch()
    try:
        time.sleep(60)
    finally:
        path.unlink()
        path.with_suffix(".left").touch()


def stop_in_the_first_piece(folder: Path) -> None:
    with worker_processes(1) as executor:
        for number in range(4):
            executor.submit(leave, folder / str(number))
        while not (folder / "0").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt


@pytest.mark.integration
def test_an_error_ends_the_pieces_that_run_and_starts_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "pieces"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        stop_in_the_first_piece(folder)
    assert [path.name for path in folder.iterdir()] == ["0.left"]
