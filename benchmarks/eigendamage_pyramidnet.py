"""One round of eigendamage on PyramidNet-272 with noise for data, 4 batches of 64: its time and memory.

python -m benchmarks.eigendamage_pyramidnet [BATCHES]
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch.utils.data import TensorDataset

from micronet_eval import plugins
from micronet_eval.recipe import Statistics, estimate_statistics
from micronet_eval.strategy import Context
from micronet_eval.submission import Architecture, build
from micronet_eval.training import loader
from micronet_plugins.eigendamage import EigenDamage


def main(batches: int = 4) -> None:
    """Prints parameters before and after, seconds, and the most memory that was resident."""
    torch.manual_seed(0)
    model = build(Architecture(name="pyramidnet"), __file__, weights=True).eval()
    data = TensorDataset(torch.randn(256, 3, 32, 32), torch.randint(0, 100, (256,)))
    context = Context(torch.zeros(1, 3, 32, 32), loader(data, 64, 0), 0, plugins.formulas())
    estimate_statistics(model, Statistics(batches=1), context)
    start = time.perf_counter()
    pruned = EigenDamage(batches=batches).apply(model, context)
    seconds = time.perf_counter() - start
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{before:,} -> {after:,} parameters, {seconds:.0f} s, {memory:.1f} GiB, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
