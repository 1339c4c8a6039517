"""One round of eigendamage, or a plain forward and backward over the same batches: its time and memory.

python -m benchmarks.eigendamage_round pyramidnet-272 round      4 batches of 64 images of noise, 3x32x32
python -m benchmarks.eigendamage_round resnet-50 plain           the same, 3x224x224

Prints JSON: seconds of the processor and by the clock on the wall, GiB resident at most, parameters before and after.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

from micronet_eval import plugins
from micronet_eval.recipe import Statistics, estimate_statistics
from micronet_eval.strategy import Context
from micronet_eval.submission import Architecture, build
from micronet_eval.training import loader
from micronet_plugins.eigendamage import EigenDamage

BATCHES, BATCH = 4, 64


def network(name: str) -> tuple[nn.Module, int]:
    """A network and the height and width of its images."""
    if name == "pyramidnet-272":
        return build(Architecture(name="pyramidnet"), __file__, weights=True).eval(), 32
    from torchvision.models import resnet50

    return resnet50(num_classes=100).eval(), 224


def main(name: str, what: str) -> None:
    """See the top of the file."""
    torch.manual_seed(0)
    model, size = network(name)
    count = BATCHES * BATCH
    data = TensorDataset(torch.randn(count, 3, size, size), torch.randint(0, 100, (count,)))
    context = Context(torch.zeros(1, 3, size, size), loader(data, BATCH, 0), 0, plugins.formulas())
    estimate_statistics(model, Statistics(batches=1), context)
    processor, wall = time.process_time(), time.perf_counter()
    if what == "round":
        made = EigenDamage(batches=BATCHES).apply(model, context)
    else:
        made = model
        for inputs, labels in context.training_data:
            nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
    found = {
        "seconds": time.process_time() - processor,
        "wall": time.perf_counter() - wall,
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters left": sum(p.numel() for p in made.parameters()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
