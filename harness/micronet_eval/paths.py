"""What a conditional model costs: storage once for all paths, math as the mean over the examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from fractions import Fraction

from micronet_eval.costs import Formula
from micronet_eval.scoring import Account, Layer, Math, account, math_of, number
from micronet_eval.trace import Trace


def mean_account(
    trace: Trace, formulas: Mapping[str, Formula], shares: Mapping[str, Fraction] | None = None, freebie: bool = True
) -> Account:
    """As `account`; of a conditional model the mean over its paths, of which `shares` of the examples take each.

    Without `shares` all examples take the costliest path. Raises NoFormula where an operation has no price.
    """
    whole = account(trace, formulas, freebie)
    names = trace.by_path()
    if list(names) == [""]:
        return whole
    paths = {path: math_of(p for p in whole.operations if p.op.path == path) for path in names}
    if not shares:
        costliest = max(paths, key=lambda path: paths[path].ops32)
        shares = {path: Fraction(path == costliest) for path in paths}
    operations = tuple(replace(p, share=shares[p.op.path]) for p in whole.operations)
    layers = mean_layers(zip((p.op.path for p in operations), whole.layers, strict=True), shares)
    return replace(
        whole, math=mean_math(paths, shares), layers=layers, operations=operations, paths=paths, shares=shares
    )


def mean_math(paths: Mapping[str, Math], shares: Mapping[str, Fraction]) -> Math:
    """Each path's cost weighted by the share of the examples that took it (the rules' mean over the test set)."""
    exact = {
        each.name: sum((Fraction(getattr(math, each.name)) * shares[path] for path, math in paths.items()), Fraction(0))
        for each in fields(Math)
    }
    return Math(**{name: number(value) for name, value in exact.items()})


def mean_layers(layers: Iterable[tuple[str, Layer]], shares: Mapping[str, Fraction]) -> tuple[Layer, ...]:
    """Operations with their paths -> the mean of each; the n-th of a kind in a module is the same on all paths."""
    nth: Counter[tuple[str, str, str]] = Counter()
    means: dict[tuple[str, str, int, int, int, int], list[Fraction]] = {}
    for path, layer in layers:
        nth[path, layer.module, layer.op] += 1
        bits = layer.input_bits, layer.weight_bits, layer.accumulator_bits
        key = layer.module, layer.op, *bits, nth[path, layer.module, layer.op]
        costs = [Fraction(cost) * shares[path] for cost in (layer.mults, layer.adds, layer.ops32, layer.macs)]
        added = [*costs, Fraction(layer.storage_bits)]
        means[key] = [a + b for a, b in zip(means.get(key, [Fraction(0)] * 5), added, strict=True)]
    return tuple(
        Layer(module, op, number(mults), number(adds), inputs, weights, float(ops32), int(stored), number(macs), own)
        for (module, op, inputs, weights, own, _), (mults, adds, ops32, macs, stored) in means.items()
    )
