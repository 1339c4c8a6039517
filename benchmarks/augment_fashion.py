"""Fast AutoAugment on few images: a small network on 2,000 of Fashion-MNIST's, with the policy and without, 3 seeds.

python -m benchmarks.augment_fashion    searches the policy, trains nine times; writes results/augment_fashion.json, the
                                        policy beside it, and docs/augmentation.md; six minutes on one core with AMX

The policy is searched on those 2,000 alone. The 10,000 test images are looked at when each training has ended.
"""

from __future__ import annotations

import json
import platform
import random
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch.utils.data import Dataset, Subset

from micronet_eval import evaluate, plugins
from micronet_eval.augmentation import OPERATIONS, Operation, Policy
from micronet_eval.hookspecs import hookimpl
from micronet_eval.policy_search import Search, search
from micronet_eval.recipe import train_only
from micronet_eval.task import Split
from micronet_plugins.tasks import TASKS, fashion_mnist

RESULTS = Path(__file__).parent / "results" / "augment_fashion.json"
POLICY = RESULTS.with_name("augment_fashion_policy.toml")
DOCS = Path(__file__).parent.parent / "docs" / "augmentation.md"
POLICIES = ("none", "drawn", "searched")
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


PAGE = """# Augmentation

Training images are changed at random, a whole batch at a time, so that it costs little beside the training. In a
[recipe](recipes.md):

```toml
[stages.train]
crop = 4                  # zeros that are padded on each side before a part of the old size is cut out
flip = true               # half of the images mirrored
erase = 0.25              # in a quarter of them a rectangle becomes noise
augment = "policy.toml"   # operations of torchvision, by a policy
```

Everything is drawn by the recipe's seed. What is erased becomes normal noise with the mean and the deviation of the
batch.

## Policies

A policy has sub-policies: operations that follow each other, each with a probability and a magnitude from 0 to 1. A
batch draws up to 8 of them and is split among them, so that each operation is called once for all of its images.
`low` and `high` are the least and the largest value of each channel in the training data, which operations take for
black and white.

`micronet-eval augment recipe.toml -o policy.toml` searches one by Fast AutoAugment (Lim et al. 2019, arXiv
1905.00397). It is a command of its own because it makes a file that many recipes can share, and takes longer than one
training. It reads from the recipe the task, the architecture, the seed, what is held out, and the first training. The
training data, without what is held out, is split into folds. For each a network is trained on the other folds,
without augmentation; then TPE (optuna, `pip install 'micronet-eval[train]'`) tries policies of five sub-policies of
two operations, and takes those under which the network's loss on the fold is least: no network is trained for a
policy. The best of all folds make the file. Test data is never read.

| option | default | |
|---|---|---|
| `--folds` | 5 | networks to train |
| `--trials` | 100 | policies to try a fold |
| `--top` | 5 | how many of them are taken |
| `--examples` | 2000 | examples of the fold to try them on |

*(ours)*: the loss is that of one augmented copy of the fold, drawn alike for every policy, and whether an image is
turned or moved one way or the other is drawn, not searched.

## What it brings

WideResNet-10-1 on the first {images:,} training images of Fashion-MNIST, 30 epochs, the same training but for the
policy; the error on all 10,000 test images, looked at once when each training had ended. {folds} folds, {trials}
policies each, {top} taken, {examples} examples, on those {images:,} images alone. "drawn" is a
control: a policy of as many operations, of which nothing was searched.

| policy | error, mean | seeds 0, 1, 2 |
|---|---:|---|
{table}

The loss on held-out images, by fold:

```
{losses}
```

Augmentation lowers the error of every seed. The search does not show here: the control, which changes images more, does
as well or better. A policy that keeps a network's loss low is one that the network can stand, which on so few images is
less than what would help it most. The runs were made in several goes on a busy machine, so their times say little.

`python -m benchmarks.augment_fashion` measures this again ({date}; results in
benchmarks/results/augment_fashion.json).
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


def drawn(like: Policy) -> Policy:
    """A policy of as many operations, none of them searched for: a control."""
    numbers = random.Random(0)
    subs = [
        [
            Operation(name=numbers.choice(OPERATIONS), probability=numbers.random(), magnitude=numbers.random())
            for _ in sub
        ]
        for sub in like.sub_policies
    ]
    return Policy(low=like.low, high=like.high, sub_policies=subs)


def trained(seed: int, policy: str, path: str, folder: Path) -> dict[str, Any]:
    """Trains once and measures once."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(seed=seed, policy=path))
    lines: list[str] = []
    start = time.perf_counter()
    train_only(recipe, folder / "made", log=lines.append)
    seconds = time.perf_counter() - start
    measured = evaluate(folder / "made").quality.measured
    assert measured is not None
    (last,) = (line for line in lines if "epoch 30 of 30" in line)
    return {
        "policy": policy,
        "seed": seed,
        "accuracy": measured,
        "training": last.strip(),
        "seconds": round(seconds, 1),
    }


def page(result: dict[str, Any]) -> str:
    """The documentation of augmentation, with what was measured."""
    rows = []
    for policy in dict.fromkeys(run["policy"] for run in result["runs"]):
        each = [100 * (1 - run["accuracy"]) for run in result["runs"] if run["policy"] == policy]
        rows.append(f"| {policy} | {sum(each) / len(each):.2f} % | {', '.join(f'{error:.2f}' for error in each)} |")
    how, losses = result["search"], result["losses"]
    return PAGE.format(
        table="\n".join(rows), losses="\n".join(losses), **how, **{k: result[k] for k in ("images", "date")}
    )


def main() -> None:
    """Measure it."""
    plugins.manager().register(FewImages())
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line.strip())
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(seed=100, policy=""))
        start = time.perf_counter()
        policy = search(recipe, SEARCH, log=log)
        seconds = time.perf_counter() - start
        POLICY.write_bytes(tomli_w.dumps(policy.model_dump()).encode())
        control = folder / "drawn.toml"
        control.write_bytes(tomli_w.dumps(drawn(policy).model_dump()).encode())
        runs = []
        for seed in SEEDS:
            for kind, path in zip(POLICIES, ("", str(control), str(POLICY)), strict=True):
                runs.append(trained(seed, kind, path, folder))
                print(runs[-1], flush=True)
    result = {
        "date": date.today().isoformat(),
        "images": EXAMPLES,
        "search": SEARCH.model_dump(),
        "search_seconds": round(seconds, 1),
        "losses": [line for line in lines if line.startswith("loss")],
        "runs": runs,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "optuna")},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    DOCS.write_text(page(result))


if __name__ == "__main__":
    main()
