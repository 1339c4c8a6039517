"""What one executed operation costs, and the error where nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from micronet_eval.errors import InputError
from micronet_eval.trace import Op


@dataclass(frozen=True)
class Cost:
    """Operations of one executed operation: multiplications, element-wise additions, and additions that accumulate.

    Accumulating additions (of a dot product, a mean, a sum) count at 32 bit whatever goes in. `macs` says how many of
    the multiplications belong to dot products. None is below zero: over no elements k - 1 additions are none.
    """

    mults: int = 0
    adds: int = 0
    accumulations: int = 0
    macs: int = 0

    def __post_init__(self) -> None:
        if min(self.mults, self.adds, self.accumulations, self.macs) < 0:
            for name, count in vars(self).items():
                object.__setattr__(self, name, max(count, 0))

    @property
    def all_adds(self) -> int:
        return self.adds + self.accumulations

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.mults + other.mults,
            self.adds + other.adds,
            self.accumulations + other.accumulations,
            self.macs + other.macs,
        )


Formula = Callable[[Op], Cost]


class NoFormula(InputError):
    """An operation was executed for which nothing says what it costs."""

    def __init__(self, op: Op, why: str = "") -> None:
        where = f"in module {op.module!r}" if op.module else "in the model's own forward"
        mend = f": {why}" if why else "; a plugin can add one with the hook micronet_register_costs"
        super().__init__(f"no cost formula for operation {op.name} {where}{mend}")
