"""A worker process at the node that keeps the base model and the data in memory between messages.

Flower starts a process for every message. Importing PyTorch and loading the model there takes longer than a small
round, so the message is passed on to a worker, through a Unix socket in a folder that only the owner's account can
access. The worker exits after `worker_idle` seconds without a message, or when the SuperNode is stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from lorica.errors import UserError
from lorica.files import create_private, private_folder
from lorica.owner.refusals import ERROR, because_of
from lorica.owner.settings import NodeSettings

START_SECONDS = 120.0
LARGEST_LOG = 10 * 2**20
"""Bytes of worker.log beyond which the next worker starts a new one, and keeps this one as worker.log.1."""
logger = logging.getLogger(__name__)


def ask(
    node_config: Mapping[str, Any], invitation: str, request: bytes | None, question: str | None = None
) -> dict[str, str | bytes]:
    """Get the node's answer (`lorica.owner.node.respond`) from the worker, or in this process if `worker` is false."""
    try:
        settings = NodeSettings.of(node_config)
        if settings.worker:
            try:
                return _ask_worker(settings, invitation, request, question)
            except (ConnectionError, EOFError):
                # Killed, or just timed out. The ledger has recorded anything that it released.
                logger.warning("the worker exited before it answered; asking another one")
                return _ask_worker(settings, invitation, request, question)
    except UserError as error:
        logger.error("%s", error)
        return {"refused": because_of(error)}
    except (OSError, EOFError):
        logger.exception("two workers exited before they answered")
        return {"refused": ERROR}
    from lorica.owner.node import respond

    return respond(settings, invitation, request, question)


def serve(settings: NodeSettings, address: Path) -> None:
    """Answer messages one after another, until none has arrived for `worker_idle` seconds."""
    from lorica.owner.node import respond

    listener = socket.socket(socket.AF_UNIX)
    # Bound under a temporary name first, so that a client never finds a socket that does not listen yet.
    temporary = address.with_suffix(f".{os.getpid()}")
    listener.bind(str(temporary))
    listener.listen()
    os.replace(temporary, address)
    listener.settimeout(settings.worker_idle)
    inode = address.stat().st_ino
    while True:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            break
        accepted.settimeout(None)
        with Connection(accepted.detach()) as connection:
            try:
                connection.send_bytes(b"ready")
                invitation, question = json.loads(connection.recv_bytes())
                answer = respond(settings, invitation, connection.recv_bytes() or None, question)
                reply = answer.pop("reply", b"")
                connection.send_bytes(json.dumps(answer).encode())
                connection.send_bytes(bytes(reply) if isinstance(reply, bytes) else b"")
            except (OSError, EOFError):
                logger.warning("the process that sent a message is gone; the ledger keeps the released reply")
    if address.exists() and address.stat().st_ino == inode:
        address.unlink()


def runtime_folder() -> Path:
    """Folder of the sockets, accessible to this account only.

    Raises:
        UserError: the folder exists and other accounts can access it.
    """
    folder = Path(tempfile.gettempdir()) / f"lorica-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        problem = "other accounts can access this folder"
        raise UserError("worker", str(folder), problem, f"delete {folder}, set TMPDIR, or set worker=false")
    return folder


def log_file(place: Path) -> Path:
    """The worker's log in the node's folder, which only the owner's account can read. A large one is put aside."""
    path = private_folder(place) / "worker.log"
    create_private(path)
    if path.stat().st_size > LARGEST_LOG:
        os.replace(path, path.with_name("worker.log.1"))
        create_private(path)
    return path


def _ask_worker(
    settings: NodeSettings, invitation: str, request: bytes | None, question: str | None
) -> dict[str, str | bytes]:
    with _connect(settings) as connection:
        connection.send_bytes(json.dumps([invitation, question]).encode())
        connection.send_bytes(request or b"")
        answer: dict[str, str | bytes] = json.loads(connection.recv_bytes())
        reply = connection.recv_bytes()
        return answer | ({"reply": reply} if "account" in answer else {})


def _connect(settings: NodeSettings) -> Connection:
    # The process of the SuperNode, which started this one for a single message.
    node = os.getppid()
    home = os.environ.get("LORICA_HOME", "")
    identity = [settings.model_dump_json(), version("lorica"), sys.executable, home, node]
    address = runtime_folder() / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.sock"
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connected = _try(address)
        if connected is not None:
            return connected
        process = _start(settings, address, node)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            connected = _try(address)
            if connected is not None:
                return connected
            time.sleep(0.05)
    log = settings.place / "worker.log"
    raise UserError("worker", str(address), "the worker did not start", f"see {log}, or set worker=false")


def _try(address: Path) -> Connection | None:
    connecting = socket.socket(socket.AF_UNIX)
    try:
        connecting.connect(str(address))
    except (FileNotFoundError, ConnectionRefusedError):
        connecting.close()
        return None
    connection = Connection(connecting.detach())
    try:
        # A worker that is about to exit still accepts connections; only one that is ready sends a message.
        connection.recv_bytes()
    except (ConnectionError, EOFError):
        connection.close()
        return None
    return connection


def _start(settings: NodeSettings, address: Path, node: int) -> subprocess.Popen[bytes]:
    log_path = log_file(settings.place)
    # The socket of an earlier worker, where nobody listens any more.
    address.unlink(missing_ok=True)
    arguments = [settings.model_dump_json(), str(address), str(node)]
    command = [sys.executable, "-m", "lorica.engines.flower.warm", *arguments]
    with log_path.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _end_with(node: int) -> None:
    """Exit when the process `node` exits, even during a message: the ledger has recorded any release."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(node)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.Thread(target=_end_with, args=[int(sys.argv[3])], daemon=True).start()
    serve(NodeSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
