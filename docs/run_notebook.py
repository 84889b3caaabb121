"""Runs the notebook for teachers and writes what its cells print and draw into it.

`python docs/run_notebook.py` needs no Jupyter. A test runs it too and compares what is printed.
"""

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).parent / "notebooks" / "tour.ipynb"
Output = dict[str, Any]


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run from the top."""
    plt.switch_backend("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = _run("".join(cell["source"]), names)
            cells.append(cell | {"execution_count": count, "outputs": outputs})
        else:
            cells.append(cell)
    return notebook | {"cells": cells}


def printed(notebook: dict[str, Any]) -> list[str]:
    """What each code cell prints."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(t for o in cell["outputs"] for t in o.get("text", ())) for cell in code]


def _run(source: str, names: dict[str, Any]) -> list[Output]:
    """One cell: what it prints, then what it draws."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(compile(ast.parse(source), "cell", "exec"), names)  # noqa: S102 - our own cells
    lines = stream.getvalue().splitlines(keepends=True)
    outputs: list[Output] = []
    if lines:
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    outputs.extend(_picture(number) for number in plt.get_fignums())
    plt.close("all")
    return outputs


def _picture(number: int) -> Output:
    """A figure, as Jupyter stores it."""
    stream = io.BytesIO()
    plt.figure(number).savefig(stream, dpi=60, bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(stream.getvalue()).decode()}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


if __name__ == "__main__":
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    text = json.dumps(executed(content), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
