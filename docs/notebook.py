"""Writes and executes docs/notebook.ipynb: python -m docs.notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PAGE = Path(__file__).parent / "notebook.ipynb"
CELLS = """
# micronet-eval in a notebook

Everything that the command line does is one function of `micronet_eval`. This notebook is written and executed by
`docs/notebook.py`.

## What does a model cost?

`score` takes any module and the input of one example. Batch norm is merged, the module itself is left alone.
---
import torch
from torchvision import models

import micronet_eval as mn

report = mn.score(models.mobilenet_v2(), torch.zeros(1, 3, 224, 224), task="imagenet")
report
---
The operations are a table, too.
---
frame = report.to_frame()
frame.nlargest(5, "ops32")[["module", "op", "mults", "adds", "ops32", "storage_bits"]]
---
Where does a figure come from? Ask for it.
---
for explanation in report.explain("classifier"):
    print(explanation.module, explanation.op)
    for name, text in explanation.lines:
        print(f"  {name:7}{text}")
---
## A submission

`evaluate` unpacks a submission, counts what it stores and computes, measures it on the test data, and lays its claims
beside that.
---
digits = mn.evaluate("../submissions/digits")
digits
---
for claim in digits.claims:
    print(f"{claim.name:8} claimed {claim.claimed:<10.6g} measured {claim.measured:<10.6g} holds: {claim.holds}")
---
What would it take to pass in continuous integration?
---
for check in mn.check("../submissions/digits", max_score=0.04, min_quality=0.99):
    print(f"{check.name:20} {'holds' if check.holds else 'fails':6} {check.figures}")
---
What did compression gain over the same network, dense? `diff` splits the change of the score into its causes.
---
dense = mn.registered("architecture")["wide-resnet"].thing(depth=16, width=2, classes=10, channels=1)
change = mn.diff(mn.score(dense, torch.zeros(1, 1, 8, 8), task="digits"), digits).score
for part in ("architecture", "sparsity", "bits", "total"):
    print(f"{part:13} {float(getattr(change, part)):+.5f}")
---
## Strategies side by side

A recipe trains the network; `compare` tries every combination of strategies on it. Each is packed, read
back, counted and tested.
---
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
(folder / "base.toml").write_text(\"\"\"
task = "digits"
seed = 1
submission = { name = "base", authors = ["notebook"] }
architecture = { name = "wide-resnet", depth = 10, width = 1, classes = 10, channels = 1 }
stages = [{ train = { epochs = 3, learning_rate = 0.01 } }]
\"\"\")
table = mn.compare(
    on=folder / "base.toml",
    sparsifiers="magnitude:sparsity=0.6",
    quantizers="fixed-point:weight_bits=4,6,8",
    results=folder / "results.sqlite",
    executor="here",
    sort="score",
    columns="params32,ops32,score,quality",
)
table
---
For a paper:
---
print(table.to_latex())
---
As web pages, with parallel coordinates, that need neither a server nor the network:
---
mn.write_comparison(table, folder / "site")
sorted(path.name for path in (folder / "site").iterdir())
"""


def notebook() -> Any:
    """The notebook, not yet executed: every other cell is code."""
    found = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for number, text in enumerate(CELLS.strip().split("\n---\n")):
        code = not re.match(r"(#+ |[A-Z])", text)
        cell = new_code_cell(text) if code else new_markdown_cell(text)
        cell["id"] = f"cell-{number}"
        found.cells.append(cell)
    return found


def executed() -> Any:
    """The notebook with what each cell shows. Raises CellExecutionError where one fails."""
    found = notebook()
    NotebookClient(
        found, timeout=1800, startup_timeout=600, resources={"metadata": {"path": str(PAGE.parent)}}
    ).execute()
    for cell in found.cells:
        cell.metadata.clear()  # when it was executed
    found.metadata.pop("language_info", None)
    return found


if __name__ == "__main__":
    nbformat.write(executed(), PAGE)
