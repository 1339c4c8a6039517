"""Every bundled strategy on the same trained network, at 2, 4, 8 and 16 times fewer parameters, weights or bits.

python -m benchmarks.strategies                          on digits and on Fashion-MNIST; writes results and the page
python -m benchmarks.strategies fashion-mnist            on one of them; the page shows what is there for the other
python -m benchmarks.strategies fashion-mnist brevitas   only strategies whose name has this in it; others stay

The network is trained on the task's data, once for each seed; every strategy is applied once, with its default
options, and followed by the same fine-tuning. All is counted and tested by `micronet_eval.comparing`.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from micronet_eval.comparing import Cell, Result, jobs_of, results_of, rows, title

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "strategies-compared.md"
FACTORS, SEEDS = (2, 4, 8, 16), 3
SHARED = """
[submission]
name = "base"
authors = ["micronet-eval"]
"""


@dataclass(frozen=True)
class Setting:
    """A network trained on a task, its parameters, the fine-tuning behind a strategy, and that in words."""

    task: str
    recipe: str
    parameters: int
    fine_tune: dict[str, Any]
    told: str
    scheduled: dict[str, Any] = field(default_factory=dict)
    """Options of the sparsifiers that train by themselves."""

    @property
    def results(self) -> Path:
        return ROOT / "benchmarks" / "results" / f"strategies-{self.task}.json"

    @property
    def kept(self) -> Path:
        return ROOT / f"compare-{self.task}.sqlite"


DIGITS = Setting(
    "digits",
    """
task = "digits"
seed = 11
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
train = { epochs = 12, learning_rate = 0.005, weight_decay = 0.02 }
""",
    77_562,
    {"epochs": 3, "learning_rate": 0.002},
    "WideResNet-10-1 on scikit-learn's digits; 3 epochs of fine-tuning, accuracy on the 449 test images.",
)
FASHION = Setting(
    "fashion-mnist",
    """
task = "fashion-mnist"
seed = 11
batch_size = 128
[architecture]
name = "resnet"
widths = [8, 16, 32]
blocks = [1, 1, 1]
stem = 8
[[stages]]
[stages.train]
epochs = 6
batch_size = 256
learning_rate = 0.01
weight_decay = 0.02
precision = "bf16"
""",
    19_938,
    {"epochs": 1, "batch_size": 256, "learning_rate": 0.003, "precision": "bf16"},
    "A residual network of 19,938 parameters on Fashion-MNIST; 1 epoch of fine-tuning, accuracy on the 10,000 test "
    "images. `gradual` and `movement` train for 1 epoch themselves.",
    {"epochs": 1, "batch_size": 256, "learning_rate": 0.003},
)
SETTINGS = (DIGITS, FASHION)


def cells(setting: Setting) -> dict[tuple[str, str, int], Cell]:
    """Kind, row and factor of a strategy -> the strategy with its options. Bits are those of 32-bit weights."""
    found: dict[tuple[str, str, int], Cell] = {}

    def add(kind: Any, name: str, factor: int, row: str = "", **options: Any) -> None:
        found[kind, row or name, factor] = ((kind, name, options),)

    for x in FACTORS:
        share, bits = 1 - 1 / x, 32 // x
        add("pruner", "low-rank", x, parameters=setting.parameters // x)
        add("pruner", "eigendamage", x, ratio=share, limit=0.99)
        for name in ("magnitude", "taylor", "bn-scale", "fpgm", "hrank", "random"):
            add("pruner", name, x, ratio=share, limit=0.99)
        for name in ("magnitude", "block", "random"):
            add("sparsifier", name, x, sparsity=share, limit=0.99)
        for name in ("gradual", "movement"):
            add("sparsifier", name, x, sparsity=share, limit=0.99, **setting.scheduled)
        for name in ("wanda", "obs"):
            add("sparsifier", name, x, sparsity=share)
        add("sparsifier", "n-m", x, n=1, m=x)
        for name in ("fixed-point", "affine", "lsq", "gptq"):
            if bits <= (8 if name == "lsq" else 16):
                add("quantizer", name, x, weight_bits=bits, activation_bits=max(bits, 4))
        if bits <= 8:
            kept = {"granularity": "channel", "keep_batch_norm": True}
            add("quantizer", "lsq", x, "lsq, batch norm kept", weight_bits=bits, activation_bits=max(bits, 4), **kept)
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


def page() -> str:
    """The tables as a page, out of the results that are there."""
    lines = [
        "# Every strategy on the same network",
        "",
        "Written by `python -m benchmarks.strategies`. Each strategy is applied once to a trained network, with",
        "default options otherwise, and fine-tuned. The columns are 2, 4, 8 and 16 times fewer parameters (pruners),",
        "weights that are not zero (sparsifiers) or bits a weight (quantizers, from 32). A cell is the score relative",
        "to the task's baseline, lower is better, and the accuracy; both the mean of",
        f"{SEEDS} trained networks, the accuracy with its standard deviation. Recipes with rounds, and strategies",
        "combined, do better than any of these alone: this compares single steps.",
        "`torch-pruning`, `torchao` and `brevitas` are those toolkits' own choices ([compare.md](compare.md)).",
    ]
    for setting in SETTINGS:
        if setting.results.exists():
            kept = json.loads(setting.results.read_text(encoding="utf-8"))
            lines += ["", f"## {setting.task}", "", setting.told, "", *_table(setting, kept["results"])]
            lines += ["", f"{kept['environment']}."]
    return "\n".join([*lines, ""])


def _table(setting: Setting, results: list[dict[str, Any]]) -> list[str]:
    table = {row.name: row for row in rows(Result(**result) for result in results)}
    names: dict[tuple[str, str], dict[int, str]] = {}
    for (kind, name, factor), cell in cells(setting).items():
        row = table.get(title(cell))
        names.setdefault((kind, name), {})[factor] = "" if row is None else _cell(row)
    lines = ["| kind | strategy | 2x | 4x | 8x | 16x |", "|---|---|---|---|---|---|"]
    for (kind, name), by_factor in names.items():
        lines.append(f"| {kind} | `{name}` | " + " | ".join(by_factor.get(x, "") for x in FACTORS) + " |")
    return lines


def _cell(row: Any) -> str:
    if row.score is None:
        return "fails: " + row.errors[0].split(": ")[-1][:80].replace("|", "/")
    spread = row.spread.get("quality", 0.0)
    return f"{row.score:#.3g}, {row.quality:.1%} ± {spread:.1%}"


def run(setting: Setting, only: str) -> None:
    """Runs what is missing in a setting; strategies whose name does not have `only` in it stay as they are."""
    chosen = [cell for (_, name, _), cell in cells(setting).items() if only in name]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.toml"
        base.write_text(setting.recipe + SHARED, encoding="utf-8")
        jobs = jobs_of(chosen, base, SEEDS, setting.fine_tune, None, setting.kept.with_suffix(".kept"))
        results = results_of(jobs, setting.kept, workers=2, watch=lambda found, running: print(found[-1:], flush=True))
    told = ", ".join(f"{package} {version(package)}" for package in ("torch", "micronet-eval"))
    environment = f"Python {platform.python_version()}, {told}, {date.today()}, CPU"
    if only:
        new = {result.name for result in results}
        before = json.loads(setting.results.read_text(encoding="utf-8"))
        results = [result for result in (Result(**r) for r in before["results"]) if result.name not in new] + results
        environment = f"{before['environment']}; {only}: {environment}"
    kept = {"environment": environment, "results": [asdict(result) for result in results]}
    setting.results.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Runs what is missing and writes the page."""
    words = sys.argv[1:]
    chosen = [setting for setting in SETTINGS if not words or setting.task == words[0]]
    for setting in chosen:
        run(setting, words[1] if len(words) > 1 else "")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
