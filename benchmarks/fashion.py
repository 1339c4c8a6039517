"""What the submissions on Fashion-MNIST come to, as `micronet-eval` measures them on the 10,000 test images.

python -m benchmarks.fashion                      evaluates submissions/fashion-*; writes results/fashion.json
python -m benchmarks.fashion --pipeline FOLDER    evaluates what recipes/wavecomp-fashion.toml made in FOLDER; writes
                                                  results/wavecomp_fashion.json
python -m benchmarks.fashion --page               as both do at their end: docs/results.md and its figure, out of the
                                                  committed results
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib

from benchmarks.__main__ import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
FASHION, PIPELINE = RESULTS / "fashion.json", RESULTS / "wavecomp_fashion.json"
AGAINST, CANDIDATES = RESULTS / "against_toolkits.json", RESULTS / "fashion_candidates.json"
"""The second, by hand: every network before today's fashion-best that was measured on the test images, in order."""

PAGE, FIGURE = ROOT / "docs" / "results.md", ROOT / "docs" / "wavecomp_fashion.svg"
Step = dict[str, Any]


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
        "score_wide": report.what_if.wide_accumulators.score,
        "correct": round(report.quality.measured * report.quality.examples),
        "examples": report.quality.examples,
        "passed": report.quality.passed,
    }


def steps_of(folder: Path) -> list[Step]:
    """What each stage of the recipe came to, on held-out images."""
    from micronet_eval.submission import read_manifest

    provenance = read_manifest(folder).provenance
    return [step.model_dump(mode="json") for step in provenance.steps] if provenance else []


def page() -> str:
    """docs/results.md."""
    kept = json.loads(FASHION.read_text(encoding="utf-8"))
    found = kept["submissions"]
    lines = [
        "# Results on Fashion-MNIST",
        "",
        "Written by `python -m benchmarks.fashion`. The submissions lie in `submissions/`, each with the recipe that",
        "made it. Accuracy is that of `micronet-eval` on the 10,000 test images, which nothing was trained or",
        "calibrated on: choices were made on 3,000 training images that were held out. The task asks for 9,400 right.",
        "",
        *_candidates(json.loads(CANDIDATES.read_text(encoding="utf-8")), found),
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
    lines += ["", f"{_measured(kept['environment'])}.", ""]
    for x in found:
        lines.append(f"- `{x['folder']}`: {x['note']}.{_wide(x)}")
    if PIPELINE.exists():
        lines += ["", *_pipeline(json.loads(PIPELINE.read_text(encoding="utf-8")))]
    if AGAINST.exists():
        lines += ["", *_against(json.loads(AGAINST.read_text(encoding="utf-8")))]
    return "\n".join([*lines, ""])


def _candidates(before: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """How often the test images were looked at for fashion-best, and what was seen."""
    told = [f"{x['correct']:,} at {x['score']:.5f} ({x['commit'] or 'not committed'})" for x in before]
    best = next(x for x in found if x["folder"] == "fashion-best")
    text = (
        f"Held-out images spoke for each candidate for `fashion-best` that was measured on the test images. There were "
        f"{len(told)} before this one; right were {', '.join(told)}. Only what passes is committed, which is a choice "
        f"on the test images after all, and this one has {best['correct'] - 9400} images to spare. Kernels for other "
        "processors (SSE4.1, AVX2, AVX-512) have as many right."
    )
    return textwrap.wrap(text, 110)


def _wide(x: dict[str, Any]) -> str:
    """What a submission with accumulators of its own would score without."""
    return f" With 32-bit accumulators it would score {x['score_wide']:.5f}." if x["score_wide"] != x["score"] else ""


def _measured(environment: dict[str, str]) -> str:
    return (
        f"Measured at {environment['commit']} on {environment['date']}: Python {environment['python']}, torch "
        f"{environment['torch']}, {environment['processor']}"
    )


def _where(environment: dict[str, str]) -> str:
    return f"{_measured(environment)}; trained on the same machine."


def _pipeline(kept: dict[str, Any]) -> list[str]:
    """What each part of the pipeline leaves, beside what the entry's report says of its own."""
    x = kept["result"]
    dense, *rest = kept["steps"][1:]
    last_round = [step for step in rest if step["stage"].startswith("round")][-1]
    sparse = next(i for i, step in enumerate(rest) if step["stage"].startswith("sparsifier"))
    merge = next(i for i, step in enumerate(rest) if step["stage"].startswith("merge"))
    parts = [
        ("training", dense, "88 %"),
        ("the rounds of EigenDamage with annealing", last_round, ""),
        ("more training", rest[sparse - 1], "92.81 % removed, 81.30 %"),
        ("sparsity, and training", rest[merge - 1], "45.31 % zero, 80.75 %"),
        ("9-bit weights, 12-bit activations, and training", rest[-1], "score 0.0456"),
    ]
    lines = [
        "## The WaveComp pipeline, on real images",
        "",
        "`recipes/wavecomp-fashion.toml`: a PyramidNet is trained; EigenDamage with annealing removes its structure in",
        "rounds; weights become zero; 9-bit weights and 12-bit activations. Accuracy is that on the held-out images.",
        "Zero are 45 % of the weights of convolutions and linear layers, and no value of a batch norm. The last column",
        "is the entry's own report, PyramidNet-272 on CIFAR-100.",
        "",
        "| after | parameters | removed | zero | operations | score | accuracy | WaveComp, CIFAR-100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, step, theirs in parts:
        removed, zero = 1 - step["parameters"] / dense["parameters"], 1 - step["nonzeros"] / step["parameters"]
        lines.append(
            f"| {name} | {step['parameters']:,} | {removed:.1%} | {zero:.1%} | "
            f"{(step['mults'] + step['adds']) / 1e6:.2f} M | {step['score']:.5f} | {step['quality']:.2%} | {theirs} |"
        )
    return [
        *lines,
        "",
        f"Seed {x['seed']}; of the test images {x['correct']:,} of {x['examples']:,} are right. "
        + _where(kept["environment"]),
        "",
        "![accuracy on held-out images against parameters, step by step](wavecomp_fashion.svg)",
    ]


def figure(steps: Sequence[Step]) -> str:
    """Held-out accuracy of each step until the sparsifier against its parameters, as SVG; the dense one on the left."""
    steps = steps[1 : next(i for i, step in enumerate(steps) if step["stage"].startswith("sparsifier"))]
    most = steps[0]["parameters"]
    low = 0.05 * int(min(step["quality"] for step in steps) / 0.05)

    def at(step: Step) -> tuple[float, float]:
        return 600 - 530 * step["parameters"] / most, 350 - 300 * (step["quality"] - low) / (0.96 - low)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="400" fill="white"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at({"parameters": tick * most, "quality": low})
        lines.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{tick:.0%}</text>')
    for percent in range(round(100 * low), 96, 5):
        y = at({"parameters": 0, "quality": percent / 100})[1]
        lines.append(f'<line x1="70" x2="600" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        lines.append(f'<text x="62" y="{y + 4:.0f}" text-anchor="end">{percent}%</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, steps))
    lines.append(f'<polyline points="{path}" fill="none" stroke="#999" stroke-width="1"/>')
    for step in steps:
        x, y = at(step)
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_COLOURS[step["stage"].endswith("train")]}"/>')
    return "\n".join(
        [
            *lines,
            '<text x="335" y="390" text-anchor="middle">parameters left</text>',
            '<text x="70" y="22">accuracy on held-out images after'
            f' <tspan fill="{_COLOURS[True]}">training</tspan>,'
            f' <tspan fill="{_COLOURS[False]}">pruning or giving back</tspan></text>',
            "</svg>",
            "",
        ]
    )


_COLOURS = {True: "#1b6ca8", False: "#c8553d"}
"""Of a step that trains, and of one that prunes or gives directions back."""


def _against(kept: dict[str, Any]) -> list[str]:
    ours, theirs = kept["ours"], kept["theirs"]
    lines = [
        "## Against what a user would pick",
        "",
        "`python -m benchmarks.against_toolkits`: the same network and the same teachers, but torch-pruning's",
        "magnitude pruner, which takes so much of the channels, and torchao's int8 in the place of our sparsifier and",
        "quantizer. Epochs are those of all training behind the pruner or sparsifier. The share of the channels",
        "settles what theirs costs; the epochs only how much of it is right. Ours is the committed submission.",
        "",
        "| | epochs | storage | math | score | ours by theirs | right of 10,000 | threshold |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in (ours, *theirs):
        verdict = "reached" if x["passed"] else "missed"
        lines.append(
            f"| {x['folder']} | {x['epochs']} | {x['storage']:.5f} | {x['math']:.5f} | {x['score']:.5f} | "
            f"{ours['score'] / x['score']:.2f} | {x['correct']:,} | {verdict} |"
        )
    lines += ["", *(f"- {x['folder']}: {x['note']}." for x in theirs if x["note"])]
    best = min((x for x in theirs if x["passed"]), key=lambda x: x["score"])
    lines.append(
        f"- The cheapest of theirs that passes is {best['folder']}; ours is {ours['score'] / best['score']:.3f} of it."
    )
    if ours["score_wide"] != ours["score"]:
        lines.append(
            "- Accumulators of few bits are part of our recipe, and of no toolkit's."
            f"{_wide(ours)[:-1]}, {ours['score_wide'] / best['score']:.2f} of theirs."
        )
    if best is min(theirs, key=lambda x: x["score"]):
        lines.append("- A larger share of the channels than those that were tried may pass, too, and cost less.")
    if fewer := [x["folder"] for x in theirs if x["epochs"] < ours["epochs"]]:
        lines.append(f"- {', '.join(fewer)}: fewer epochs than ours; with as many, more of it may be right.")
    told = ", ".join(f"{name} {kept['environment'][name]}" for name in ("torch-pruning", "torchao"))
    return [*lines, "", f"{told}. Theirs: {_where(kept['environment'])}"]


def main() -> None:
    """See the top of the file."""
    if sys.argv[1:2] == ["--pipeline"]:
        folder = Path(sys.argv[2])
        _keep(PIPELINE, {"environment": environment(), "result": measured(folder), "steps": steps_of(folder)})
    elif sys.argv[1:] != ["--page"]:
        folders = sorted(path.parent for path in (ROOT / "submissions").glob("fashion-*/submission.toml"))
        _keep(FASHION, {"environment": environment(), "submissions": [measured(folder) for folder in folders]})
    PAGE.write_text(page(), encoding="utf-8")
    if PIPELINE.exists():
        FIGURE.write_text(figure(json.loads(PIPELINE.read_text(encoding="utf-8"))["steps"]), encoding="utf-8")


def _keep(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
