"""A SuperNode that runs only Lorica.

Flower sends the code of an app with its messages, and a SuperNode installs and imports it with the rights of its
account. Anyone who can start a run on the SuperLink could therefore bypass the policy and read the owner's data. This
node runs the `ClientApp` of the owner's own Lorica installation instead, and never unpacks the code that it receives.
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

RUN_CLIENT_APP = "from lorica.engines.flower.sealed import answer\n\nanswer()\n"
REFUSE = 'raise SystemExit("this node runs only Lorica")\n'


def become_node(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `flower-supernode`, set up to run Lorica's commands instead of Flower's.

    Args:
        arguments: command-line arguments of `flower-supernode`.

    Raises:
        UserError: Flower is not installed, or an argument allows apps to install packages.
    """
    around = environment()
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    if any("--allow-runtime-dependency-installation".startswith(option) for option in arguments if option[:3] == "--a"):
        option = "--allow-runtime-dependency-installation"
        raise UserError("node", option, "apps could install packages on this machine", "remove this option")
    commands = home_folder().absolute() / "flower-commands"
    for task, name in TASK_TYPE_TO_COMMAND.items():
        script = f"#!{sys.executable}\n{RUN_CLIENT_APP if task == TaskType.CLIENT_APP else REFUSE}"
        write_atomically(commands / name, script.encode())
        (commands / name).chmod(0o755)
    around["PATH"] = os.pathsep.join([str(commands), around["PATH"]])
    program = shutil.which("flower-supernode", path=around["PATH"])
    assert program is not None
    os.execve(program, ["flower-supernode", *arguments], around)


def answer() -> None:
    """Run Flower's `flwr-clientapp` for one message, with Lorica's `ClientApp` instead of the one received."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from lorica.engines.flower.client import app

    replaced = {"install_from_fab": lambda *_, **__: None, "get_load_client_app_fn": lambda **_: lambda *_: app}
    for name, function in replaced.items():
        # If a version of Flower moved one of these, it would run the code it received.
        if not hasattr(run_clientapp, name):
            raise SystemExit(f"unsupported version of Flower: run_clientapp has no {name}")
        setattr(run_clientapp, name, function)
    flwr_clientapp()
