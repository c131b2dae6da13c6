from __future__ import annotations

import os
import signal

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
