"""Where the cost of a model lies: its modules to a given depth, each with all that runs inside of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from micronet_eval.scoring import Count, Layer

WHOLE = "total"


@dataclass
class ModuleCost:
    """All operations of a module and of the modules in it. The shares are those of the whole model, 0 to 1.

    `depth` is 0 for the whole model; `storage_bits` is what is used here first, so that nothing counts twice.
    """

    module: str
    depth: int
    mults: Count = 0
    adds: Count = 0
    macs: Count = 0
    ops32: float = 0.0
    storage_bits: int = 0
    math_share: float = 0.0
    storage_share: float = 0.0

    def as_row(self) -> dict[str, object]:
        """The figures as a flat row."""
        return asdict(self)


def by_module(layers: Iterable[Layer], depth: int) -> list[ModuleCost]:
    """A row for every module path of up to `depth` parts, parents before children, in order of execution.

    The first row is the whole model. A parent's figures are those of its children and of its own operations.
    """
    found: dict[tuple[str, ...], ModuleCost] = {(): ModuleCost(WHOLE, 0)}
    for layer in layers:
        path = tuple(layer.module.split(".")) if layer.module else ()
        for length in range(min(depth, len(path)) + 1):
            row = found.setdefault(path[:length], ModuleCost(".".join(path[:length]), length))
            row.mults += layer.mults
            row.adds += layer.adds
            row.macs += layer.macs
            row.ops32 += layer.ops32
            row.storage_bits += layer.storage_bits
    whole = found[()]
    for row in found.values():
        row.math_share = row.ops32 / whole.ops32 if whole.ops32 else 0.0
        row.storage_share = row.storage_bits / whole.storage_bits if whole.storage_bits else 0.0
    seen = {path: place for place, path in enumerate(found)}
    in_order = sorted(found, key=lambda path: [seen[path[:length]] for length in range(len(path) + 1)])
    return [found[path] for path in in_order]
