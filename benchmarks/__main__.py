"""How fast counting, packing and measuring are, against the targets of the project.

python -m benchmarks             all rows; writes benchmarks/results/speed.json and docs/speed.md
python -m benchmarks ROW...      these rows; what the file has of the others stays
python -m benchmarks --page      only the page, from the results

Counters that are raced are optional: pip install micronet-eval[bench]. Run with OMP_NUM_THREADS=1, as the page shows.
"""

from __future__ import annotations

import compileall
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.rows import ROOT, ROWS

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "speed.md"


def environment() -> dict[str, str]:
    """Where a row was measured, with what."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "processor": processor or platform.processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "fvcore", "ptflops", "ultralytics-thop",
                                             "thop", "calflops", "torchinfo", "torchprofile")},
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def main(asked: list[str]) -> None:
    """Measures rows, one after the other, and keeps each at once; all is compiled before, as pip does it."""
    for folder in ("harness", "plugins"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    for name in [] if asked == ["--page"] else asked or list(ROWS):
        found = ROWS[name]()
        for what, measured, target, bound in found["targets"]:
            print(f"{name}: {what}: {measured:.3g}, {bound} {target}", flush=True)
        found["targets"] = [(what, float(f"{x:.3g}"), target, bound) for what, x, target, bound in found["targets"]]
        results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {"environment": environment(), **found}
        RESULTS.write_text(json.dumps({row: results[row] for row in ROWS if row in results}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
