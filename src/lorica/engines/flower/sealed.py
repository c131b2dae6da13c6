"""A SuperNode that runs Lorica and nothing else.

Flower sends an app's code with its messages, and a SuperNode installs and imports it, with the rights of its account:
whoever can start a run on the SuperLink could read the owner's data past any policy. Here the `ClientApp` is the one of
the Lorica that the owner has installed; what the server sends is not even unpacked.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from lorica.engines.flower.processes import environment
from lorica.errors import UserError
from lorica.files import home_folder, write_atomically

ANSWER = "from lorica.engines.flower.sealed import answer\n\nanswer()\n"
REFUSE = 'raise SystemExit("this node runs Lorica and nothing else")\n'


def become_node(arguments: Sequence[str]) -> NoReturn:
    """Turn this process into `flower-supernode`, which finds Lorica's commands in place of Flower's for its tasks.

    Args:
        arguments: of `flower-supernode`.

    Raises:
        UserError: Flower is not installed, or it shall install what an app asks for.
    """
    around = environment()
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    if any("--allow-runtime-dependency-installation".startswith(option) for option in arguments if option[:3] == "--a"):
        raise UserError("node", "--allow-…", "packages that an app names would be installed", "leave it out")
    commands = home_folder().absolute() / "flower-commands"
    for task, name in TASK_TYPE_TO_COMMAND.items():
        script = f"#!{sys.executable}\n{ANSWER if task == TaskType.CLIENT_APP else REFUSE}"
        write_atomically(commands / name, script.encode())
        (commands / name).chmod(0o755)
    around["PATH"] = os.pathsep.join([str(commands), around["PATH"]])
    program = shutil.which("flower-supernode", path=around["PATH"])
    assert program is not None
    os.execve(program, ["flower-supernode", *arguments], around)


def answer() -> None:
    """Flower's `flwr-clientapp`, for one message, with Lorica's `ClientApp` in place of the one that was sent."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from lorica.engines.flower.client import app

    replaced = {"install_from_fab": lambda *_, **__: None, "get_load_client_app_fn": lambda **_: lambda *_: app}
    for name, function in replaced.items():
        # A Flower that has moved them would run what was sent.
        if not hasattr(run_clientapp, name):
            raise SystemExit(f"this version of Flower has no {name}")
        setattr(run_clientapp, name, function)
    flwr_clientapp()
