"""A real federation on one machine: a SuperLink, three owners' SuperNodes, TLS, node keys, and a policy each.

    python examples/federation/loopback.py [FOLDER] [section.key=value ...]

Everything that would be on machines of their own is in folders of their own: `FOLDER/server` has the certificates and
Flower's state, `FOLDER/owner-0` and so on each owner's data, policy, key, ledger and log, and `FOLDER/runs` the result.
The same command resumes a run that was stopped. docs/federation.md has the same steps by hand, across machines.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import trustme
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pyarrow import parquet

from lorica.adapters.base_files import hash_of_base
from lorica.config import DEFAULT_CONFIG, load
from lorica.engines.flower.launch import launch, with_absolute_paths
from lorica.engines.flower.processes import ask_flwr, connect, environment, free_port, start, stop
from lorica.messages import OWNER
from lorica.tasks import digits

OWNERS = 3
EXPERIMENT = [
    "name=loopback",
    "engine=flower",
    "flower.superlink=loopback",
    f"task.train={OWNER}",  # each node names its own
    f"federation.clients={OWNERS}",
    "federation.rounds=6",
    "federation.local_steps=8",  # a message takes seconds, so do more between two
    "federation.weights=uniform",
]
POLICY: dict[str, Any] = {
    "max_epsilon": 8.0,
    "delta": 1e-4,
    "base_models": [hash_of_base("lorica:glyph-vit")],
    "tasks": [{"type": "image-classification"}],
    "max_sampling_rate": 0.2,
}


def main() -> None:
    arguments = sys.argv[1:]
    folder = Path("runs/federation" if not arguments or "=" in arguments[0] else arguments.pop(0)).absolute()
    config = load(DEFAULT_CONFIG, [*EXPERIMENT, f"output={folder / 'runs'}", *arguments])
    # What `kill` sends unwinds like Ctrl-C, so that nothing is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    divide_digits(folder, config.federation.clients)
    with Loopback(folder) as loopback:
        for owner in range(config.federation.clients):
            loopback.register(owner, POLICY)
            loopback.start_node(owner)
            print(f"owner {owner}: registered, its node runs")
        launch(with_absolute_paths(config), loopback.home)
    print(f"\nThe server has the adapter in {config.folder / 'adapter'}.")
    for adapter in sorted(folder.glob("owner-*/digits.parquet.lorica/run-*/adapter")):
        print(f"An owner has it in {adapter}.")
    print("\nWhat owner 0 has spent, by its ledger:", flush=True)
    owner = folder / "owner-0"
    budget = ["lorica", "budget", owner / "digits.parquet", "--policy", owner / "policy.yaml"]
    subprocess.run(budget, env=environment(), check=True)


def divide_digits(folder: Path, owners: int) -> list[Path]:
    """The embedded digits as one Parquet file for each owner, in its folder."""
    table = digits.table("train", "image", "label")
    files = [folder / f"owner-{owner}" / "digits.parquet" for owner in range(owners)]
    for owner, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A new file would be new data, with a ledger that does not know it.
        if not file.exists():
            parquet.write_table(table.take(np.arange(owner, len(table), owners)), file)
    return files


class Loopback:
    """A SuperLink with TLS that lets in registered nodes only, and nodes; all are stopped at the end of the context.

    Attributes:
        home: the server's `FLWR_HOME`, which knows the SuperLink as `loopback`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "server" / "flwr"
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Loopback:
        server = self.folder / "server"
        self.authority = server / "ca.crt"
        write_certificates(server)
        self.port = free_port()
        connect(self.home, "loopback", self.port, self.authority)
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"]
        command += ["--ssl-certfile", str(server / "server.crt"), "--ssl-keyfile", str(server / "server.key")]
        command += ["--ssl-ca-certfile", str(self.authority)]
        own = environment(self.home) | {"LORICA_HOME": str(server / "lorica")}
        self.processes.append(start(command, own, server / "superlink.log", self.port))
        return self

    def register(self, owner: int, policy: dict[str, Any]) -> None:
        """Make an owner's key and policy, and have the SuperLink let in the node that has this key."""
        place = self.folder / f"owner-{owner}"
        public = write_node_key(place / "node.key")
        (place / "policy.yaml").write_text(yaml.safe_dump(policy))
        ask_flwr(environment(self.home), "supernode", "register", str(public), "loopback")

    def start_node(self, owner: int, **settings: str | int) -> subprocess.Popen[bytes]:
        """Start a registered owner's SuperNode.

        Args:
            settings: more of the node configuration, such as `worker=False`.
        """
        place = self.folder / f"owner-{owner}"
        given = {"client": owner, "data": str(place / "digits.parquet"), "policy": str(place / "policy.yaml")}
        port = free_port()
        command = ["lorica", "flower", "node", "--superlink", f"127.0.0.1:{self.port}", "--port", str(port)]
        command += ["--root-certificates", str(self.authority), "--auth-supernode-private-key", str(place / "node.key")]
        command += ["--node-config", " ".join(f"{key}={toml(value)}" for key, value in {**given, **settings}.items())]
        own = environment(place / "flwr") | {"LORICA_HOME": str(place / "lorica")}
        node = start(command, own, place / "node.log", port)
        self.processes.append(node)
        return node

    def __exit__(self, *_: object) -> None:
        stop(*reversed(self.processes))


def write_certificates(folder: Path) -> None:
    """An authority, and the SuperLink's certificate by it, for this machine alone."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(organization_name="loopback authority")
    server = authority.issue_cert("127.0.0.1", "localhost")
    (folder / "server.key").touch(mode=0o600)
    server.private_key_pem.write_to_path(folder / "server.key")
    server.cert_chain_pems[0].write_to_path(folder / "server.crt")
    authority.cert_pem.write_to_path(folder / "ca.crt")


def write_node_key(path: Path) -> Path:
    """A key to know a node by, as `ssh-keygen -t ecdsa -b 384` makes it; returns the path of its public half."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.touch(mode=0o600)
    private = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    public = path.with_suffix(".key.pub")
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return public


def toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. Finished rounds are kept: the same command resumes.")
