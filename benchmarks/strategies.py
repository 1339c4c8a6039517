"""Every bundled strategy on the same trained network, at 2, 4, 8 and 16 times fewer parameters, weights or bits.

python -m benchmarks.strategies              all; writes results/strategies.json and docs/strategies-compared.md
python -m benchmarks.strategies brevitas     only strategies whose name has this in it; the others stay as they are

The network is trained on scikit-learn's digits, once for each seed; every strategy is applied once, with its default
options, and followed by the same fine-tuning. All is counted and tested by `micronet_eval.comparing`.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from micronet_eval.comparing import Cell, Result, jobs_of, results_of, rows, title

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "strategies.json"
PAGE = ROOT / "docs" / "strategies-compared.md"
KEPT = ROOT / "compare.sqlite"
FACTORS, SEEDS = (2, 4, 8, 16), 3
FINE_TUNE = {"epochs": 3, "learning_rate": 0.002}
BASE = """
task = "digits"
seed = 11
[submission]
name = "base"
authors = ["micronet-eval"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
train = { epochs = 12, learning_rate = 0.005, weight_decay = 0.02 }
"""
PARAMETERS = 77_562  # of that network


def cells() -> dict[tuple[str, str, int], Cell]:
    """Kind, name and factor of a strategy -> the strategy with its options. Bits are those of 32-bit weights."""
    found: dict[tuple[str, str, int], Cell] = {}

    def add(kind: Any, name: str, factor: int, **options: Any) -> None:
        found[kind, name, factor] = ((kind, name, options),)

    for x in FACTORS:
        share, bits = 1 - 1 / x, 32 // x
        add("pruner", "low-rank", x, parameters=PARAMETERS // x)
        add("pruner", "eigendamage", x, ratio=share, limit=0.99)
        for name in ("magnitude", "taylor", "bn-scale", "fpgm", "hrank", "random"):
            add("pruner", name, x, ratio=share, limit=0.99)
        for name in ("magnitude", "block", "gradual", "movement", "random"):
            add("sparsifier", name, x, sparsity=share, limit=0.99)
        for name in ("wanda", "obs"):
            add("sparsifier", name, x, sparsity=share)
        add("sparsifier", "n-m", x, n=1, m=x)
        for name in ("fixed-point", "affine", "lsq", "gptq"):
            if bits <= 16:
                add("quantizer", name, x, weight_bits=bits, activation_bits=max(bits, 4))
        if bits <= 8:
            add("quantizer", "mixed", x, bits=max(bits, 2.5), activation_bits=8)
            add("quantizer", "codebook", x, values=2**bits)
        add("pruner", "torch-pruning", x, ratio=1 - x**-0.5, limit=0.99)  # its ratio is one of channels
    add("quantizer", "torchao", 4, config="int8", activation_bits=8)
    add("quantizer", "torchao", 8, config="int4", activation_bits=4)
    for bits in (8, 4, 2):
        add("quantizer", "brevitas", 32 // bits, weight_bits=bits, activation_bits=max(bits, 4))
    add("quantizer", "ternary", 16)
    add("quantizer", "binary", 16)
    return found


def page(results: list[Result]) -> str:
    """The table as a page."""
    table = {row.name: row for row in rows(results)}
    lines = [
        "# Every strategy on the same network",
        "",
        "Written by `python -m benchmarks.strategies`. WideResNet-10-1 is trained on scikit-learn's digits; each",
        "strategy is applied once, with default options otherwise, and fine-tuned for 3 epochs behind it. The columns",
        "are 2, 4, 8 and 16 times fewer parameters (pruners), weights that are not zero (sparsifiers) or bits a weight",
        "(quantizers, from 32). A cell is the score relative to the task's baseline, lower is better, and the accuracy",
        f"on the 449 test images; both the mean of {SEEDS} trained networks, the accuracy with its standard deviation.",
        "`torch-pruning`, `torchao` and `brevitas` are those toolkits' own choices ([compare.md](compare.md)).",
        "Recipes with rounds, and strategies combined, do better than any of these alone: this compares single steps.",
        "",
        "| kind | strategy | 2x | 4x | 8x | 16x |",
        "|---|---|---|---|---|---|",
    ]
    names: dict[tuple[str, str], dict[int, str]] = {}
    for (kind, name, factor), cell in cells().items():
        row = table.get(title(cell))
        names.setdefault((kind, name), {})[factor] = "" if row is None else _cell(row)
    for (kind, name), by_factor in names.items():
        lines.append(f"| {kind} | `{name}` | " + " | ".join(by_factor.get(x, "") for x in FACTORS) + " |")
    environment = ", ".join(f"{package} {version(package)}" for package in ("torch", "micronet-eval"))
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {environment}, CPU.", ""])


def _cell(row: Any) -> str:
    if row.score is None:
        return "fails: " + row.errors[0].split(": ")[-1][:80].replace("|", "/")
    spread = row.spread.get("quality", 0.0)
    return f"{row.score:.4f}, {row.quality:.1%} ± {spread:.1%}"


def main() -> None:
    """Runs what is missing and writes the page."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [cell for (_, name, _), cell in cells().items() if only in name]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.toml"
        base.write_text(BASE, encoding="utf-8")
        jobs = jobs_of(chosen, base, SEEDS, FINE_TUNE, None, KEPT.with_suffix(".kept"))
        results = results_of(jobs, KEPT, workers=2, watch=lambda found, running: print(found[-1:], flush=True))
    if only:
        new = {result.name for result in results}
        before = [Result(**result) for result in json.loads(RESULTS.read_text(encoding="utf-8"))]
        results = [result for result in before if result.name not in new] + results
    RESULTS.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
