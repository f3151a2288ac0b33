"""The notebooks run from top to bottom and reproduce their stored outputs.

This command runs them and stores their outputs:

    PYTHONPATH=. python tests/test_notebooks.py

They read only data that come with installed packages.
"""

import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest
import quick

if TYPE_CHECKING:
    import nbformat

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_MOST_BYTES = 300_000


def execute(path: pathlib.Path, inherited: Mapping[str, str]) -> "nbformat.NotebookNode":
    """Runs a notebook with this Python interpreter, whatever kernels are installed.

    Returns the notebook with its outputs.
    """
    # Imported here, since every worker of the tests collects this module.
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": ROOT}},
    )
    environment = {key: value for key, value in inherited.items() if key != "CNNJAX_DATA"}
    return client.execute(env=environment | {"JAX_PLATFORMS": "cpu"}, cleanup_kc=True)


# Errors and scores, which have two decimals in the notebooks' tables.
_SCORE = re.compile(r"-?\d+\.\d\d\b")


def shown(notebook: "nbformat.NotebookNode") -> list[list[str]]:
    """Returns each cell's outputs, with "image/png" for pictures.

    Scores of what was trained or fitted are #, since they differ between processors.
    """

    def said(output):
        if "text" in output:
            return output.text
        if "image/png" in output.data:
            return "image/png"
        if "text/markdown" in output.data:
            return _SCORE.sub("#", output.data["text/markdown"])
        return output.data["text/plain"]

    return [
        [said(output) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def table(notebook: "nbformat.NotebookNode", heading: str) -> dict[str, list[list[float]]]:
    """Returns the numbers in each cell of the table with this heading, by row name."""
    text = next(
        output.data["text/markdown"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if f"| {heading} |" in output.get("data", {}).get("text/markdown", "")
    )
    rows = [line.strip("| ").split(" | ") for line in text[text.index("| ---") :].splitlines()[1:]]
    numbers = lambda cell: [
        float(number.replace(",", "")) for number in re.findall(r"-?[\d.,]+", cell)
    ]
    return {name: [numbers(cell) for cell in cells] for name, *cells in rows}


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def both(request):
    """Returns (name, notebook as stored, notebook as run now)."""
    import nbformat

    stored = nbformat.read(request.param, as_version=4)
    environment = quick.environment()
    # This notebook trains for longer than LLVM's optimization of its programs takes.
    if request.param.stem == "lectures":
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
    return request.param.stem, stored, execute(request.param, environment)


def test_what_is_stored_is_what_it_shows(both):
    name, stored, run = both
    assert shown(stored) == shown(run)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < _MOST_BYTES


def test_what_the_text_says_holds(both):
    name, _, run = both
    if name == "position":
        # The columns are SPC (R2) for natural, black, and white images.
        rows = table(run, "padding")
        assert list(rows) == ["zeros", "none", "reflect"]
        assert all(r2 > 0.3 for _, r2 in rows["zeros"]) and all(
            abs(r2) < 0.05 for fill in ("none", "reflect") for _, r2 in rows[fill]
        )
        assert all(spc == 0 for fill in ("none", "reflect") for spc, _ in rows[fill][1:])
    else:
        # The columns are parameters, training error, and test error.
        rows = table(run, "network | parameters | training error")
        assert {name: cells[0] for name, cells in rows.items()} == {
            "mlp1": [650],
            "mlp3": [301_066],
            "lenet": [86_710],
        }
        # A cell has a mean and a standard deviation.
        (one, _), (three, _), (convolutional, _) = (cells[2] for cells in rows.values())
        assert abs(three - convolutional) < 3 and max(three, convolutional) < one < 15


if __name__ == "__main__":
    import nbformat

    for path in [pathlib.Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(execute(path, os.environ), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
