"""Counts every registered model of torchvision and timm, and writes down which of them cannot be counted, and why.

python -m benchmarks.coverage            all; writes benchmarks/results/coverage.json and docs/coverage.md
python -m benchmarks.coverage 'vit_*'    only these, to look at; writes nothing
"""

from __future__ import annotations

import fnmatch
import json
import logging
import multiprocessing
import platform
import signal
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

SECONDS = 60
"""A model that takes more processor time counts as failed."""

MODELS_A_PROCESS = 200
"""A worker starts anew after so many models, so that memory stays small."""

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"

INPUTS = {
    "detection": ["1x3x320x320"],
    "optical_flow": ["1x3x128x128", "1x3x128x128"],
    "quantization": ["1x3x224x224"],
    "segmentation": ["1x3x224x224"],
    "video": ["1x3x16x224x224"],
    "torchvision": ["1x3x224x224"],
}
"""The input for each kind of torchvision's models."""


def names(library: str) -> list[str]:
    """All registered models of a library."""
    if library == "torchvision":
        from torchvision import models

        return sorted(models.list_models())
    import timm

    return sorted(timm.list_models())


def kind(library: str, name: str) -> str:
    """The kind of a model: that of torchvision's folders; all of timm's are for classification."""
    if library == "timm":
        return "classification"
    from torchvision import models

    parts = models.get_model_builder(name).__module__.split(".")
    return parts[2] if parts[2] in INPUTS else "classification"


def count(library: str, name: str) -> int:
    """The MACs of a model. Raises whatever goes wrong on the way, an operation without formula first of all."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    from micronet_eval.plugins import formulas
    from micronet_eval.scoring import account
    from micronet_eval.targets import build, example
    from micronet_eval.trace import trace

    torch.manual_seed(0)  # some models draw weights on the CPU, zeros among them
    model = build(f"{library}:{name}")
    if library == "timm":
        shape = "x".join(map(str, (1, *model.pretrained_cfg["input_size"])))
        return account(trace(model, example([shape])), formulas()).math.macs
    which = kind(library, name)
    shapes = INPUTS["torchvision" if which == "classification" else which]
    if "inception_v3" in name:
        shapes = ["1x3x299x299"]
    if which == "detection":
        model = _up_to_the_heads(model)
    return account(trace(model, example(shapes)), formulas()).math.macs


def _up_to_the_heads(detector):
    """Backbone and convolutional heads of a detector. What follows depends on the image: boxes, their suppression."""
    from torch import nn

    class UpToTheHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = detector.backbone
            self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

        def forward(self, image):
            features = self.backbone(image)
            return self.head([features] if hasattr(features, "shape") else list(features.values()))

    return UpToTheHeads()


def _try(library: str, name: str) -> dict[str, int | str]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {SECONDS} seconds")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return {"macs": count(library, name)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def outcomes(library: str, pattern: str = "*") -> Iterator[tuple[str, dict[str, int | str]]]:
    """Model -> its MACs or why it has none, one after the other in a process of their own, each within SECONDS."""
    matching = fnmatch.filter(names(library), pattern)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=MODELS_A_PROCESS) as pool:
        for name, outcome in zip(matching, pool.imap(partial(_try, library), matching), strict=True):
            print(library, name, outcome, flush=True)
            yield name, outcome


def environment() -> dict[str, str]:
    """Versions of what counted and of what was counted."""
    packages = ("micronet-eval", "torch", "torchvision", "timm")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": "meta"}


def page(results: dict) -> str:
    """The page of the documentation, from the results."""
    lines = [
        "# Which models can be counted",
        "",
        "Every registered model of torchvision and timm, built on the meta device, traced, and priced: an operation",
        "without a formula fails the model. `python -m benchmarks.coverage` writes this page, and the MACs of every",
        "model to [coverage.json](../benchmarks/results/coverage.json).",
        "",
        "| library | kind | models | counted | share |",
        "|---|---|---:|---:|---:|",
    ]
    failures = []
    for library in ("torchvision", "timm"):
        models = results[library]
        kinds = sorted({model["kind"] for model in models.values()})
        for which in kinds:
            of_kind = {name: model for name, model in models.items() if model["kind"] == which}
            lines.append(_row(library, which.replace("_", " "), of_kind))
        if len(kinds) > 1:
            lines.append(_row(library, "all", models))
        failures += [f"- {library} `{name}`: {m['error']}" for name, m in models.items() if "error" in m]
    versions = results["environment"]
    lines += [
        "",
        "Of a detector the backbone and the convolutional heads are counted. What follows, the choice of boxes and",
        "what runs once for each of them, depends on the image: to count the whole detector is an error that says so.",
        "Quantizable models are counted in floating point.",
        "",
        f"torch {versions['torch']}, torchvision {versions['torchvision']}, timm {versions['timm']}.",
        "",
        "## What cannot be counted",
        "",
        *(failures or ["Nothing: all of them count."]),
    ]
    return "\n".join(lines) + "\n"


def _row(library: str, which: str, models: dict) -> str:
    counted = sum("macs" in model for model in models.values())
    return f"| {library} | {which} | {len(models):,} | {counted:,} | {counted / len(models):.1%} |"


def main() -> None:
    """Counts all, or those that match the pattern on the command line."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else None
    results: dict = {"environment": environment()}
    for library in ("torchvision", "timm"):
        found = outcomes(library, pattern or "*")
        results[library] = {name: {"kind": kind(library, name), **outcome} for name, outcome in found}
    if pattern is None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
