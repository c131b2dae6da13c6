"""An owner's worker loads what it needs to train, and nothing that draws."""

from __future__ import annotations

import subprocess
import sys


def test_a_node_loads_no_plots_and_no_server() -> None:
    found = "import sys, lorica.owner.node; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.split()
    assert "lorica.owner.client" in modules
    assert not {"matplotlib", "lorica.reporting", "lorica.server", "lorica.methods", "lorica.run"} & set(modules)
