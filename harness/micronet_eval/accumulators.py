"""What other accumulators would score. *(ours)* Shown beside the official figures, and never used for them.

Exact accumulators: where weights and inputs are integers whose steps are powers of two (one for the input, one for each
output channel of the weight), a dot product is a sum of integers, and its result is the same bit for bit in any
two's-complement integer that cannot overflow. How wide that has to be is proved for each output channel from its own
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from micronet_eval.dotted import WIDEST, dot_product, keeps_the_grid, steps_of_outputs
from micronet_eval.formats import QUANTIZE
from micronet_eval.grids import Grid, constant_grid, data_inputs, exponent_of_shift, followed, grid_of, is_conversion
from micronet_eval.scoring import Account, Count, Priced, number
from micronet_eval.trace import Value

HALF = 16
"""The bits of a half-precision float."""

_EXACT = 53
"""Bits of the integers that float64 holds."""


@dataclass(frozen=True)
class Figure:
    """Math and score as they would be. `additions` of all `accumulations` would count other bits than they do."""

    ops32: float
    math: float | None
    score: float | None
    additions: Count
    accumulations: Count


@dataclass(frozen=True)
class WhatIf:
    """Kinds of accumulators that the official figure does not assume; `wide` are 32 bits where narrower ones run."""

    exact_accumulators: Figure
    fp16_accumulators: Figure
    wide_accumulators: Figure


@dataclass(frozen=True)
class Steps:
    """Integers times 2**exponent, from `low` (at most 0) to `high` (at least 0)."""

    exponent: int
    low: int
    high: int


def what_if(account: Account, baseline_math: float | None = None, storage_share: float | None = None) -> WhatIf:
    """All figures; their math and score are None without the baseline's math and the score's share of storage."""
    official = sum(p.bits * p.share for p in account.operations)
    accumulations = number(sum(p.cost.accumulations * p.share for p in account.operations))

    def figure(changed: list[tuple[int, Fraction | int]]) -> Figure:
        """`changed` are additions that would count so many bits more."""
        ops32 = float((official + sum(more * n for more, n in changed)) / WIDEST)
        share = ops32 / baseline_math if baseline_math else None
        total = share + storage_share if share is not None and storage_share is not None else None
        return Figure(ops32, share, total, number(sum(n for _, n in changed)), accumulations)

    exact = [
        (bits - WIDEST, n * p.share)
        for p in account.operations
        if not p.accumulator.additions
        for bits, n in exact_widths(p)
        if bits < WIDEST
    ]
    now = [(bits, n * p.share) for p in account.operations for bits, n in p.accumulating]
    half = [(HALF - bits, n) for bits, n in now if bits > HALF]
    return WhatIf(figure(exact), figure(half), figure([(WIDEST - bits, n) for bits, n in now if bits < WIDEST]))


def exact_widths(priced: Priced) -> list[tuple[int, int]]:
    """For every output channel of a dot product: the bits of the narrowest exact accumulator, and its additions.

    Empty where that cannot be said: weights or inputs are no such integers, or have no known values.
    """
    if (product := dot_product(priced.op)) is None:
        return []
    weight, bias = product.weight.known, product.bias
    steps, grid = range_of(product.x), constant_grid(product.weight)
    if steps is None or grid is None or weight is None or (bias is not None and bias.known is None):
        return []
    own = np.array(steps_of_outputs(product, grid))
    fractions, exponents = np.frexp(own)
    if not own.size or (fractions != 0.5).any() or any(grid.zeros()):  # of a power of two it is one half
        return []
    codes = product.rows(weight).double().cpu().numpy() / own[:, None]
    if (codes != np.rint(codes)).any():
        return []
    counts = np.count_nonzero(codes, axis=1)
    positive, negative = codes.clip(min=0).sum(1), -codes.clip(max=0).sum(1)
    low, high = positive * steps.low - negative * steps.high, positive * steps.high - negative * steps.low
    added = 0.0 if bias is None else bias.data.double().flatten().cpu().numpy()  # type: ignore[union-attr]
    bits = accumulator_bits(low, high, added, steps.exponent + exponents - 1)
    additions = np.maximum(counts - (bias is None), 0) * product.times
    # A formula that another ruleset or a plugin put in the place of ours counts something else.
    if additions.sum() != priced.cost.accumulations:
        return []
    return [(b, n) for b, n in zip(bits.tolist(), additions.tolist(), strict=True) if n]


def accumulator_bits(
    low: ArrayLike, high: ArrayLike, bias: ArrayLike = 0.0, exponent: ArrayLike = 0
) -> NDArray[np.int64]:
    """The fewest two's-complement bits for all partial sums, in any order, of terms and a bias.

    The terms are multiples of 2**exponent. All of them together come to no less than `low` (at most 0) and no more
    than `high` (at least 0) of those steps; a term that could only raise the sum has a least value of 0, so that no
    partial sum leaves this range. A bias between two steps needs more bits behind the point.

    Of arrays, one sum for each element. What takes 53 bits or more is told as 53: float64 holds no wider integers.
    """
    in_steps = np.ldexp(np.asarray(bias, np.float64), -np.asarray(exponent))
    behind = _bits_behind_the_point(in_steps)
    top = np.ldexp(high + np.maximum(in_steps, 0), behind)
    bottom = np.ldexp(low + np.minimum(in_steps, 0), behind)
    most = 2.0**_EXACT
    bits = 1 + np.maximum(np.frexp(top.clip(max=most))[1], np.frexp((-bottom - 1).clip(0, most))[1])
    return np.where(behind < _EXACT, bits, _EXACT).clip(max=_EXACT).astype(np.int64)


def _bits_behind_the_point(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """By what power of two a float has to be multiplied to be an integer; 0 for an integer."""
    fraction, exponent = np.frexp(numbers)
    whole = np.ldexp(fraction, _EXACT).astype(np.int64)
    lowest = np.frexp((whole & -whole).astype(np.float64))[1] - 1  # the place of the lowest bit that is set
    return np.where(whole == 0, 0, _EXACT - exponent - lowest).clip(min=0)


def range_of(value: Value) -> Steps | None:
    """Between what an activation lies, by the quantizers that it comes from; None without steps of powers of two."""
    return followed(value, _moved_from, _range)


def _moved_from(value: Value) -> tuple[Value, ...]:
    op = value.producer
    moved = op is not None and value in op.outputs and not is_conversion(op) and keeps_the_grid(op)
    return data_inputs(op) if moved else ()  # type: ignore[arg-type]


def _range(value: Value, sources: list[Steps | None]) -> Steps | None:
    op = value.producer
    if op is None or value not in op.outputs:  # a part was overwritten
        return None
    if is_conversion(op):
        return None if op.name in QUANTIZE else _steps(grid_of(op))
    known = [source for source in sources if source is not None]
    if not known or len(known) < len(sources):
        return None
    exponent = min(s.exponent for s in known)
    low = min(s.low << (s.exponent - exponent) for s in known)
    high = max(s.high << (s.exponent - exponent) for s in known)
    return Steps(exponent, 0 if op.name == "aten.relu" else low, high)


def _steps(grid: Grid) -> Steps | None:
    """Of a grid with one step for the whole tensor, a power of two, and no zero point."""
    exponents = [exponent_of_shift(scale) for scale in grid.steps()]
    if len(exponents) != 1 or exponents[0] is None or any(grid.zeros()):
        return None
    return Steps(exponents[0], min(grid.low, 0), max(grid.high, 0))
