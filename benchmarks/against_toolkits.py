"""What a user would pick, at our fine-tuning budget: torch-pruning's magnitude pruner, then torchao's int8.

python -m benchmarks.against_toolkits FOLDER          writes results/against_toolkits.json, and submissions into FOLDER
python -m benchmarks.against_toolkits FOLDER 0.2 0.25 with these shares of channels in the place of those below

Both start from the trained network that the recipe of submissions/fashion-best names, and learn from the same teachers,
in the folders that it names, for as many epochs as that submission does: a few of them follow torchao, which loses
little, all others the pruner. The rest is torch-pruning's and torchao's own default way: the same share of the channels
of each layer, by the norm of groups; linear layers int8 by torchao, convolutions int8 per channel, 8-bit activations.
Several shares of channels are tried. Every result is that of `micronet-eval` on the 10,000 test images; what is there
in FOLDER is not run again, what is there in part goes on.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import tomllib

from benchmarks.__main__ import ROOT, environment
from benchmarks.fashion import measured
from micronet_eval.kept import KEPT
from micronet_eval.recipe import compress

OURS = ROOT / "submissions" / "fashion-best"
RESULTS = ROOT / "benchmarks" / "results" / "against_toolkits.json"
RATIOS = (0.45, 0.6, 0.65)
TORCHAO: dict[str, Any] = {"epochs": 5, "learning_rate": 0.0005, "weight_decay": 1e-4}
"""What follows torchao: batch norm is merged by then, and the rate of the training before would undo the network."""
TOLD = ("date", "commit", "processor", "python", "torch", "torchao", "torch-pruning")


def recipe(ratio: float) -> str:
    """Our recipe with one pruner in the place of its sparsifiers, and torchao in that of its quantizer."""
    ours: dict[str, Any] = tomllib.loads((OURS / "recipe.toml").read_text(encoding="utf-8"))
    stages: list[dict[str, Any]] = ours["stages"]
    trainings = [stage["train"] for stage in stages if "train" in stage]
    longest = max(trainings[:-1], key=lambda training: training["epochs"])
    epochs = sum(training["epochs"] for training in trainings) - TORCHAO["epochs"]
    many_views = {**longest["distill"], "views": 16}  # ours has 8 for 60 epochs
    return tomli_w.dumps(
        {
            **ours,
            "submission": {"name": f"torch-pruning {ratio:.0%}, torchao int8", "authors": ["micronet-eval"]},
            "stages": [
                {"pruner": "torch-pruning", "ratio": ratio},
                {"train": {**longest, "epochs": epochs, "distill": many_views}},
                {"merge": "batch-norm"},
                {"quantizer": "torchao", "config": "int8", "activation_bits": 8},
                {"train": {**longest, **TORCHAO}},
            ],
        }
    )


def told(folder: Path) -> dict[str, Any]:
    """What a submission comes to, and for how many epochs its recipe trains."""
    stages = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))["stages"]
    return {**measured(folder), "epochs": sum(stage["train"]["epochs"] for stage in stages if "train" in stage)}


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ratios", type=float, nargs="*", default=RATIOS)
    arguments = parser.parse_args()
    folder, theirs = arguments.folder, []
    for ratio in arguments.ratios:
        made = folder / f"torch-pruning-{ratio}"
        if not (made / "submission.toml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"torch-pruning-{ratio}.toml"
            path.write_text(recipe(ratio), encoding="utf-8")
            compress(path, made, log=lambda line: print(line, flush=True), resume=(made / KEPT).exists())
        theirs.append(told(made))
        print(theirs[-1], flush=True)
    where = {**environment(), "torchao": version("torchao"), "torch-pruning": version("torch-pruning")}
    kept = {"environment": {name: where[name] for name in TOLD}, "ours": told(OURS), "theirs": theirs}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
