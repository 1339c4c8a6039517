"""What the submissions on Fashion-MNIST come to, as `micronet-eval` measures them on the 10,000 test images.

python -m benchmarks.fashion           evaluates submissions/fashion-*; writes results/fashion.json, then as below
python -m benchmarks.fashion --page    writes docs/results.md out of the committed results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tomllib

from benchmarks.__main__ import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
FASHION = RESULTS / "fashion.json"
PAGE = ROOT / "docs" / "results.md"


def measured(folder: Path) -> dict[str, Any]:
    """A submission's report in short, with its recipe's seed."""
    from micronet_eval import evaluate

    report = evaluate(folder)
    assert report.score is not None and report.quality.measured is not None
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    return {
        "folder": folder.name,
        "note": recipe["submission"].get("note", ""),
        "seed": recipe["seed"],
        "file_bytes": (folder / "weights.safetensors").stat().st_size,
        "params32": float(report.storage.params32),
        "ops32": float(report.math.ops32),
        "storage": report.score.storage,
        "math": report.score.math,
        "score": report.score.total,
        "correct": round(report.quality.measured * report.quality.examples),
        "examples": report.quality.examples,
        "passed": report.quality.passed,
    }


def page() -> str:
    """docs/results.md."""
    kept = json.loads(FASHION.read_text(encoding="utf-8"))
    where, found = kept["environment"], kept["submissions"]
    told = (
        f"Measured at {where['commit']} on {where['date']}: Python {where['python']}, torch {where['torch']}, "
        f"{where['processor']}; trained on the same machine."
    )
    lines = [
        "# Results on Fashion-MNIST",
        "",
        "Written by `python -m benchmarks.fashion`. The submissions lie in `submissions/`, each with the recipe that",
        "made it. Accuracy is that of `micronet-eval` on the 10,000 test images, which nothing was trained, calibrated",
        "or chosen on: choices were made on 3,000 training images that were held out. The task asks for 9,400 right.",
        "",
        "| submission | recipe's seed | storage | math | score | right of 10,000 | threshold | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in found:
        verdict = "reached" if x["passed"] else "missed"
        lines.append(
            f"| `{x['folder']}` | {x['seed']} | {x['params32']:,.0f} ({x['storage']:.5f}) | {x['ops32'] / 1e6:.3f} M "
            f"({x['math']:.5f}) | {x['score']:.5f} | {x['correct']:,} | {verdict} | {x['file_bytes'] / 1e3:.0f} KB |"
        )
    lines += ["", told, ""]
    for x in found:
        lines.append(f"- `{x['folder']}`: {x['note']}.")
    return "\n".join([*lines, ""])


def main() -> None:
    """See the top of the file."""
    if "--page" not in sys.argv:
        folders = sorted(path.parent for path in (ROOT / "submissions").glob("fashion-*/submission.toml"))
        kept = {"environment": environment(), "submissions": [measured(folder) for folder in folders]}
        FASHION.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
