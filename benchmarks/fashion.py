"""What the submissions on Fashion-MNIST come to, as `micronet-eval` measures them on the 10,000 test images.

python -m benchmarks.fashion           evaluates submissions/fashion-*; writes results/fashion.json, then as below
python -m benchmarks.fashion --page    writes docs/results.md and its figure out of the committed results
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FASHION = RESULTS / "fashion.json"
PAGE, FIGURE = ROOT / "docs" / "results.md", ROOT / "docs" / "wavecomp-fashion.svg"
PIPELINE = "fashion-wavecomp"


def measured(folder: Path) -> dict[str, Any]:
    """A submission's report in short, with its recipe's seed and the steps of its provenance."""
    from micronet_eval import evaluate
    from micronet_eval.submission import Manifest, read_toml

    report = evaluate(folder)
    assert report.score is not None and report.quality.measured is not None
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    provenance = read_toml(folder / "submission.toml", Manifest).provenance
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
        "steps": [step.model_dump(mode="json") for step in provenance.steps] if provenance else [],
    }


def environment() -> dict[str, str]:
    """Where and when."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "device": "CPU, 2 cores",
        "date": str(date.today()),
        "commit": commit.stdout.strip(),
    }


def page() -> str:
    """docs/results.md."""
    kept = json.loads(FASHION.read_text(encoding="utf-8"))
    where, found = kept["environment"], kept["submissions"]
    told = (
        f"Measured at {where['commit']} on {where['date']}: Python {where['python']}, torch {where['torch']}, "
        f"{where['device']}; trained on the same machine."
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
    pipeline = next((x for x in found if x["folder"] == PIPELINE), None)
    if pipeline is not None:
        lines += ["", *_pipeline(pipeline)]
    return "\n".join([*lines, ""])


def _pipeline(x: dict[str, Any]) -> list[str]:
    steps = [step for step in x["steps"] if not step["stage"].endswith("(undone)")]
    dense = steps[1]
    lines = [
        "## The WaveComp pipeline, on real images",
        "",
        "`recipes/wavecomp-fashion.toml`: a PyramidNet is trained, EigenDamage with annealing removes its structure in",
        "rounds, then weights become zero, then 9-bit weights and 12-bit activations. Accuracy is that on the 3,000",
        "held-out images; WaveComp's own on CIFAR-100 are those of the authors' report.",
        "",
        "| after | parameters | removed | not zero | operations | score | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [dense, *_milestones(steps)]
    for step in shown:
        removed = 1 - step["parameters"] / dense["parameters"]
        lines.append(
            f"| {step['stage']} | {step['parameters']:,} | {removed:.1%} | {step['nonzeros']:,} | "
            f"{(step['mults'] + step['adds']) / 1e6:.2f} M | {step['score']:.5f} | {step['quality']:.2%} |"
        )
    right = x["correct"] / x["examples"]
    lines += [
        "",
        f"On the test images: {right:.2%}.",
        "",
        "![accuracy against parameters per round](wavecomp-fashion.svg)",
    ]
    return lines


def _milestones(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training behind each round, and all that comes after the rounds but for merging."""
    rounds: dict[str, dict[str, Any]] = {}
    for step in steps[2:]:
        if step["stage"].startswith("round"):
            number = step["stage"].partition(":")[0]
            rounds[number] = {**step, "stage": number}
    behind = [s for s in steps[2:] if not s["stage"].startswith(("round", "merge"))]
    return [*rounds.values(), *behind]


def figure(x: dict[str, Any]) -> str:
    """Held-out accuracy of every step against its parameters, as SVG; rounds to the left."""
    steps = [step for step in x["steps"][1:] if not step["stage"].startswith(("merge", "quantizer", "sparsifier"))]
    most, low = steps[0]["parameters"], min(step["quality"] for step in steps) - 0.01
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="400" fill="white"/>',
    ]

    def at(step: dict[str, Any]) -> tuple[float, float]:
        return 600 - 530 * (1 - step["parameters"] / most), 350 - 310 * (step["quality"] - low) / (0.96 - low)

    for tick in (0, 0.25, 0.5, 0.75, 1):
        x_at = at({"parameters": tick * most, "quality": low})[0]
        lines.append(f'<text x="{x_at:.0f}" y="368" text-anchor="middle">{tick:.0%}</text>')
    for percent in range(round(100 * low) + 1, 97, 2 if low > 0.8 else 5):
        y_at = at({"parameters": 0, "quality": percent / 100})[1]
        lines.append(f'<line x1="70" x2="600" y1="{y_at:.0f}" y2="{y_at:.0f}" stroke="#ddd"/>')
        lines.append(f'<text x="62" y="{y_at + 4:.0f}" text-anchor="end">{percent} %</text>')
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, steps))
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1b6ca8" stroke-width="1.2"/>')
    for step in steps:
        a, b = at(step)
        trained = step["stage"].endswith("train")
        lines.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{"#1b6ca8" if trained else "#c8553d"}"/>')
    lines.append('<text x="335" y="390" text-anchor="middle">parameters left</text>')
    lines.append('<text x="70" y="20">held-out accuracy after each step:</text>')
    lines.append(
        '<text x="265" y="20" fill="#1b6ca8">training</text><text x="325" y="20" fill="#c8553d">pruning</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """See the top of the file."""
    if "--page" not in sys.argv:
        folders = sorted(path.parent for path in (ROOT / "submissions").glob("fashion-*/submission.toml"))
        kept = {"environment": environment(), "submissions": [measured(folder) for folder in folders]}
        FASHION.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    for x in json.loads(FASHION.read_text(encoding="utf-8"))["submissions"]:
        if x["folder"] == PIPELINE:
            FIGURE.write_text(figure(x), encoding="utf-8")


if __name__ == "__main__":
    main()
