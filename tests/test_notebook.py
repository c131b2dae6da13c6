"""The notebook runs from top to bottom."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "lorica.ipynb"


def test_it_holds_no_outputs() -> None:
    """Figures of one machine's run would soon be those of another version."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.integration
def test_it_runs(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "digits-shared-noise.yaml", tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    load = next(cell for cell in notebook.cells if "Experiment.load(" in cell.source)
    assert "federation.rounds=60" in load.source
    load.source = load.source.replace("federation.rounds=60", "federation.rounds=3")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "6 owners, ε = 1.0" in printed
    assert "round  0: accuracy 7" in printed
    assert printed.count("by its own noise") == 6
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in data for data in shown) == 2
    assert any("'accuracy'" in data["text/plain"] for data in shown)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
