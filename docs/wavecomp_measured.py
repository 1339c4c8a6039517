"""Fills the part of docs/wavecomp.md between its two `measured` comments: python docs/wavecomp_measured.py."""

import re
from collections import Counter
from pathlib import Path

import torch

from micronet_eval import evaluate, packing
from micronet_eval.costs import FREE
from micronet_eval.evaluation import Report
from micronet_eval.plugins import lookup
from micronet_eval.submission import Step, build, read_manifest
from micronet_eval.trace import trace

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "wavecomp.md"
PAD = "aten.constant_pad_nd"

# Published, rounded as published: parameters, non-zeros and operations before quantization; storage, math and score.
WAVECOMP = {
    "1": (1_890_000, 1_011_000, 580_000_000, 344_500, 391_200_000, 0.0467),
    "2": (1_826_000, 951_000, 560_000_000, 355_800, 384_800_000, 0.0464),
    "3": (1_826_000, 951_000, 560_000_000, 324_670, 384_800_000, 0.04558),
}
FIGURES = (
    "parameters before quantization",
    "non-zeros before quantization",
    "operations before quantization",
    "storage",
    "math",
    "score",
)


def figures(report: Report, before: Step) -> tuple[float, ...]:
    """Our figures in the order of FIGURES; `before` is the model before quantization."""
    assert report.score is not None
    costs = (report.storage.params32, report.math.ops32, report.score.total)
    return before.parameters, before.nonzeros, before.mults + before.adds, *costs


def sizes(report: Report, folder: Path, before: Step) -> dict[str, float]:
    """How much each difference makes, in 32-bit parameters or operations; ours minus the authors' arithmetic."""
    storage, math = report.storage, report.math
    bits = max(layer.weight_bits for layer in report.layers)
    stored, computed = (storage.nonzeros * bits + storage.parameters) / 32, 12 / 32 * math.mults + math.adds
    tensors = packing.read(folder / "weights.safetensors").structure.tensors
    exponents = Counter(layout == "overhead" for _, _, layout in tensors)
    dots = [layer for layer in report.layers if layer.op in ("aten.convolution", "aten.mm", "aten.addmm")]
    return {
        "storage by the authors' arithmetic, from our non-zeros and parameters": stored,
        "(a) masks": (storage.mask_bits - storage.parameters) / 32,
        "(a) zeros written as values in dense tensors": storage.value_bits / 32 - storage.nonzeros * bits / 32,
        "(b) exponents of weight tensors": exponents[False] * 8 / 32,
        "(b) exponents of activations": exponents[True] * 8 / 32,
        "storage, ours": storage.params32,
        "math by the authors' arithmetic, from our multiplications and additions": computed,
        "(c) multiplications that do not count 12/32": math.mult_ops32 - 12 / 32 * math.mults,
        "(d) additions that do not count 32/32": math.add_ops32 - math.adds,
        "math, ours": math.ops32,
        "(b) the authors' exponent operations, 8/32 a layer, in no figure of ours": len(dots) * 8 / 32,
        "additions in dot products, biases among them": sum(layer.adds for layer in dots),
        "additions of shifts that are not merged, and of residuals": sum(
            layer.adds for layer in report.layers if layer.op == "aten.add"
        ),
        "of these, residual additions of padded zero channels": padded_additions(folder),
        "(e) weights that rounding made zero": before.nonzeros - storage.nonzeros,
    }


def padded_additions(folder: Path) -> int:
    """Additions whose second operand is a zero that padding put there."""
    manifest = read_manifest(folder)
    model = packing.unpack(packing.read(folder / "weights.safetensors"), build(manifest.architecture, folder))
    count = 0
    for op in trace(model, torch.zeros(1, *lookup("task", manifest.task).input_shape)).ops:
        for value in op.inputs if op.name == "aten.add" else ():
            producer = value.producer
            while producer is not None and producer.name in FREE and producer.name != PAD:
                producer = producer.inputs[0].producer
            if producer is not None and producer.name == PAD:
                count += op.out.numel - producer.inputs[0].numel
    return count


def number(value: float) -> str:
    """Whole where it is large, as a score is printed where it is small."""
    return f"{value:.5f}" if 0 < abs(value) < 1 else f"{value:,.0f}"


def main() -> None:
    """Evaluates the three submissions and rewrites the page."""
    rows = ["| submission | figure | WaveComp | ours | difference |", "|---|---|---:|---:|---:|"]
    columns = []
    for name, published in WAVECOMP.items():
        folder = ROOT / "submissions" / name
        report, before = evaluate(folder), read_manifest(folder).provenance.steps[-2]
        for figure, theirs, ours in zip(FIGURES, published, figures(report, before), strict=True):
            rows.append(f"| {name} | {figure} | {number(theirs)} | {number(ours)} | {ours / theirs - 1:+.2%} |")
        columns.append(sizes(report, folder, before))
    rows += ["", f"| what | {' | '.join(WAVECOMP)} |", "|---|---:|---:|---:|"]
    rows += [f"| {what} | {' | '.join(number(column[what]) for column in columns)} |" for what in columns[0]]
    block = "\n".join(["<!-- measured -->", *rows, "<!-- /measured -->"])
    PAGE.write_text(re.sub(r"<!-- measured -->.*<!-- /measured -->", lambda _: block, PAGE.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
