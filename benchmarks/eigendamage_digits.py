"""How much accuracy pruners leave a trained network without fine-tuning, at the same number of parameters.

python -m benchmarks.eigendamage_digits                          eigendamage and magnitude; writes results and figure
python -m benchmarks.eigendamage_digits eigendamage --seeds 1    only this, to look at; writes nothing

WideResNet-16-2 is trained on scikit-learn's digits. Each pruner then takes it to a tenth of its parameters in rounds,
each of them to the same share of what was there; a pruner has an option `ratio`, the share of parameters to remove. No
weight is trained between the rounds. Batch norm's statistics stay those of the trained network, unless --statistics
estimates them anew after each round, for every pruner alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from micronet_eval import plugins
from micronet_eval.recipe import Statistics, estimate_statistics
from micronet_eval.strategy import Context
from micronet_eval.submission import Architecture, build
from micronet_eval.training import Training, train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "eigendamage_digits.json"
FIGURE = ROOT / "docs" / "eigendamage_digits.svg"
PRUNERS = ("eigendamage", "magnitude")
LEFT, ROUNDS, SEEDS = 0.1, 10, 5
NETWORK = Architecture(name="wide-resnet", depth=16, width=2, classes=10, channels=1)


def parameters(model: nn.Module) -> int:
    """All of them."""
    return sum(p.numel() for p in model.parameters())


def accuracy(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """The share of test images whose largest logit is the label's."""
    with torch.no_grad():
        return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def context(seed: int) -> Context:
    """The digits' training data in an order of its own."""
    task = plugins.lookup("task", "digits")
    data = task.dataset(None, "train")
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Context(torch.zeros(1, *task.input_shape), loader, seed, plugins.formulas())


def trained(seed: int) -> nn.Module:
    """The network after 8 epochs."""
    torch.manual_seed(seed)
    model = build(NETWORK, __file__, weights=True)
    training = Training(epochs=8, learning_rate=0.003, weight_decay=0.05)
    return train(model, training, context(seed), lambda line: None)


def curve(pruner: str, model: nn.Module, seed: int, renewed: bool) -> list[tuple[float, float]]:
    """The share of parameters that is left and the accuracy, before and after each round."""
    test = plugins.lookup("task", "digits").dataset(None, "test").tensors
    full, points = parameters(model), [(1.0, accuracy(model, test))]
    for number in range(1, ROUNDS + 1):
        target = full * LEFT ** (number / ROUNDS)
        strategy = plugins.lookup("pruner", pruner)(ratio=1 - target / parameters(model))
        model = strategy.apply(model, context(seed + number))
        if renewed:
            model = estimate_statistics(model, Statistics(batches=8), context(seed + number))
        points.append((parameters(model) / full, accuracy(model, test)))
    return points


def table(curves: dict[str, list[list[tuple[float, float]]]]) -> str:
    """Mean and standard deviation over seeds, a row a round."""
    lines = ["| left |" + "".join(f" {name} |" for name in curves), "|---:|" + "---:|" * len(curves)]
    for at in range(ROUNDS + 1):
        row = f"| {LEFT ** (at / ROUNDS):.3f} |"
        for of_seeds in curves.values():
            shares, right = zip(*(points[at] for points in of_seeds), strict=True)
            row += f" {statistics.mean(right):.3f} ± {statistics.pstdev(right):.3f} at {statistics.mean(shares):.3f} |"
        lines.append(row)
    return "\n".join(lines)


def figure(curves: dict[str, list[list[tuple[float, float]]]]) -> str:
    """Accuracy over the share of parameters left: a thick line for the mean, a thin one for each seed."""
    colours = ("#1b6ca8", "#c8553d", "#3d8c5c", "#7a5aa6", "#8a7a2f")
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="400" fill="white"/>',
    ]

    def x(share: float) -> float:
        return 60 + 480 * (1 - share) / (1 - LEFT)

    def y(right: float) -> float:
        return 350 - 320 * right

    for tick in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
        lines.append(f'<text x="{x(tick):.0f}" y="368" text-anchor="middle">{tick:.0%}</text>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        lines.append(f'<text x="52" y="{y(tick) + 4:.0f}" text-anchor="end">{tick:.0%}</text>')
        lines.append(f'<line x1="60" x2="540" y1="{y(tick):.0f}" y2="{y(tick):.0f}" stroke="#ddd"/>')
    for (name, of_seeds), colour in zip(curves.items(), colours, strict=False):
        mean = [
            tuple(statistics.mean(part) for part in zip(*points, strict=True)) for points in zip(*of_seeds, strict=True)
        ]
        for points, width in [*((points, 0.6) for points in of_seeds), (mean, 2.5)]:
            path = " ".join(f"{x(share):.1f},{y(right):.1f}" for share, right in points)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        lines.append(f'<text x="548" y="{y(mean[-1][1]) + 4:.0f}" fill="{colour}">{name}</text>')
    lines.append('<text x="300" y="390" text-anchor="middle">parameters left, no fine-tuning</text>')
    lines.append('<text x="60" y="20">test accuracy</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruners", nargs="*", default=PRUNERS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--statistics", action="store_true")
    arguments = parser.parse_args()
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in arguments.pruners}
    for seed in range(arguments.seeds):
        model = trained(seed)
        for name in arguments.pruners:
            curves[name].append(curve(name, model, seed, arguments.statistics))
            print(f"seed {seed}, {name}: {curves[name][-1][-1]}", flush=True)
    print(table(curves))
    if tuple(arguments.pruners) == PRUNERS and arguments.seeds == SEEDS and not arguments.statistics:
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "curves": curves}, indent=1) + "\n")
        FIGURE.write_text(figure(curves))


if __name__ == "__main__":
    main()
