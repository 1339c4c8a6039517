"""Fast AutoAugment on few images: a small network on 2,000 of Fashion-MNIST's, with the policy and without, 3 seeds.

python -m benchmarks.augment_fashion    searches the policy, trains six times, writes results/augment_fashion.json and
                                        the policy beside it; five minutes on one core with AMX

The policy is searched on those 2,000 alone. The 10,000 test images are looked at when each training has ended.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch.utils.data import Dataset, Subset

from micronet_eval import evaluate, plugins
from micronet_eval.hookspecs import hookimpl
from micronet_eval.policy_search import Search, search
from micronet_eval.recipe import train_only
from micronet_eval.task import Split
from micronet_plugins.tasks import TASKS, fashion_mnist

RESULTS = Path(__file__).parent / "results" / "augment_fashion.json"
POLICY = RESULTS.with_name("augment_fashion_policy.toml")
EXAMPLES, SEEDS = 2_000, (0, 1, 2)
SEARCH = Search(folds=3, trials=60, top=5, examples=500)
RECIPE = """
task = "fashion-mnist-2000"
seed = {seed}
[submission]
name = "few"
authors = ["micronet-eval"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
[stages.train]
epochs = 30
learning_rate = 0.05
optimizer = "sgd"
weight_decay = 5e-4
warmup = 1
precision = "bf16"
augment = "{policy}"
"""


class FewImages:
    """Registers the task: the first 2,000 training images, all test images."""

    @hookimpl
    def micronet_register_tasks(self, register: Any) -> None:
        """Register it."""

        def few(root: Path | None, split: Split) -> Dataset[Any]:
            dataset = fashion_mnist(root, split)
            return Subset(dataset, range(EXAMPLES)) if split == "train" else dataset

        (whole,) = (task for task in TASKS if task.name == "fashion-mnist")
        register("fashion-mnist-2000", replace(whole, name="fashion-mnist-2000", dataset=few))


def trained(seed: int, policy: str, folder: Path) -> dict[str, Any]:
    """Trains once and measures once."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(seed=seed, policy=policy))
    lines: list[str] = []
    start = time.perf_counter()
    train_only(recipe, folder / "made", log=lines.append)
    seconds = time.perf_counter() - start
    measured = evaluate(folder / "made").quality.measured
    assert measured is not None
    (last,) = (line for line in lines if "epoch 30 of 30" in line)
    return {"seed": seed, "policy": bool(policy), "accuracy": measured, "training": last.strip(), "seconds": seconds}


def main() -> None:
    """Measure it."""
    plugins.manager().register(FewImages())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(seed=100, policy=""))
        start = time.perf_counter()
        policy = search(recipe, SEARCH, log=lambda line: print(line, flush=True))
        seconds = time.perf_counter() - start
        POLICY.write_bytes(tomli_w.dumps(policy.model_dump()).encode())
        runs = []
        for seed in SEEDS:
            for chosen in ("", str(POLICY)):
                runs.append(trained(seed, chosen, folder))
                print(runs[-1], flush=True)
    means = {which: sum(r["accuracy"] for r in runs if r["policy"] == which) / len(SEEDS) for which in (False, True)}
    result = {
        "examples": EXAMPLES,
        "search": SEARCH.model_dump(),
        "search_seconds": round(seconds, 1),
        "error_without": round(1 - means[False], 5),
        "error_with": round(1 - means[True], 5),
        "runs": runs,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "optuna")},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(means))


if __name__ == "__main__":
    main()
