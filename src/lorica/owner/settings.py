"""The settings of an owner's node. Only the owner can change them; the server cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from lorica.config import Strict, check_paths, validate
from lorica.errors import UserError
from lorica.files import home_folder
from lorica.privacy.ledger_file import ledger_beside


class NodeSettings(Strict):
    """The configuration of a SuperNode (`--node-config`)."""

    client: int
    """Number of this client, counted from 0, as agreed between the organisations."""
    data: str | None = None
    """The training data: a file, an image folder, or a folder of files. Required except in a simulation, whose clients
    divide the server's `task.train`."""
    base: str | None = None
    """Folder of the base model; by default `model.base` of the experiment, if that is embedded or a hub id."""
    policy: str | None = None
    """The owner's policy file; required with `data`."""
    identity: str | None = None
    """Path of the private key that `lorica flower keys` created; required if the policy lists `members`."""
    ledger: str | None = None
    """SQLite file that records every release; by default beside the data."""
    folder: str | None = None
    """Where the node keeps the adapter between messages, its log and the final adapter; by default `DATA.lorica`."""
    device: str | None = None
    """Device to use instead of the experiment's `model.device`."""
    worker: bool = True
    """Keep a process with the base model and the data alive between messages."""
    worker_idle: float = 900.0
    """How many seconds without a message until that process ends."""

    _paths = field_validator("data", "base", "policy", "identity", "ledger", "folder")(check_paths)

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> NodeSettings:
        """Read Flower's node configuration. In a simulation, `partition-id` is the client's number.

        Raises:
            UserError: an unknown key, an invalid value, or `data` is missing.
        """
        given = {key: value for key, value in node_config.items() if key not in ("partition-id", "num-partitions")}
        if "partition-id" in node_config:
            # The processes of simulated clients keep running anyway.
            given = {"client": node_config["partition-id"], "worker": "data" in given} | given
        settings = validate(cls, given, prefix="node-config")
        if settings.data is None and not {"partition-id", "num-partitions"} <= node_config.keys():
            # Otherwise the server could name any file on this machine.
            raise UserError("node-config.data", None, "required except in a simulation", "add data=PATH")
        return settings

    @property
    def place(self) -> Path:
        """The node's folder."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if self.data is not None:
            return folder_beside(Path(self.data).expanduser())
        return home_folder() / "nodes" / str(self.client)

    @property
    def ledger_path(self) -> Path:
        """The node's ledger; only for a node with data of its own."""
        if self.ledger is not None:
            return Path(self.ledger).expanduser()
        assert self.data is not None
        return ledger_beside(Path(self.data).expanduser())


def folder_beside(data: Path) -> Path:
    """The folder of the node that was started with these data, if it names no other."""
    return data.with_name(f"{data.name}.lorica")
