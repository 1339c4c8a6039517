"""What narrower accumulators would save. *(ours)* Shown beside the official figures, and never used for them.

Exact accumulators: where weights and inputs are fixed point, a dot product is a sum of integers, and its result is the
same bit for bit in any two's-complement integer that cannot overflow. How wide that has to be is proved for each output
channel from its own weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from micronet_eval.grids import Grid, constant_grid, data_inputs, grid_of, is_conversion, values_of
from micronet_eval.scoring import Account, Count, Priced, number
from micronet_eval.trace import Op, Value

WIDEST = 32

KEEP_THE_GRID = frozenset(
    f"aten.{name}"
    for name in (
        "_reshape_alias", "_reshape_copy", "_unsafe_view", "alias", "amax", "as_strided", "cat", "clone",
        "constant_pad_nd", "contiguous", "detach", "diagonal", "expand", "flip", "gather", "index", "index_select",
        "lift_fresh", "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "permute",
        "reflection_pad1d", "reflection_pad2d", "relu", "repeat", "replication_pad1d", "replication_pad2d", "roll",
        "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unfold",
        "unsqueeze", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "view",
    )
)  # fmt: skip
"""Operations whose results are some of their inputs, or zero."""


@dataclass(frozen=True)
class Figure:
    """Math and score as they would be. `additions` of all `accumulations` are narrower than the 32 bits they count."""

    ops32: float
    math: float | None
    score: float | None
    additions: Count
    accumulations: Count


@dataclass(frozen=True)
class WhatIf:
    """Two kinds of accumulators that the official figure does not assume."""

    exact_accumulators: Figure
    fp16_accumulators: Figure


@dataclass(frozen=True)
class Steps:
    """Integers times 2**exponent, from `low` (at most 0) to `high` (at least 0)."""

    exponent: int
    low: int
    high: int


def what_if(account: Account, baseline_math: float | None = None, storage_share: float | None = None) -> WhatIf:
    """Both figures; their math and score are None without the baseline's math and the score's share of storage."""
    official = sum(_shared(p.bits, p) for p in account.operations)
    all_of_them = [(16, _shared(p.cost.accumulations, p)) for p in account.operations]
    accumulations = number(sum(n for _, n in all_of_them))

    def figure(narrower: list[tuple[int, Fraction | int]]) -> Figure:
        ops32 = float((official - sum(n * (WIDEST - bits) for bits, n in narrower)) / WIDEST)
        share = ops32 / baseline_math if baseline_math else None
        total = share + storage_share if share is not None and storage_share is not None else None
        return Figure(ops32, share, total, number(sum(n for _, n in narrower)), accumulations)

    exact = [(bits, _shared(n, p)) for p in account.operations for bits, n in exact_widths(p) if bits < WIDEST]
    return WhatIf(figure(exact), figure(all_of_them))


def _shared(count: int, priced: Priced) -> Fraction | int:
    """The mean over the examples: whole numbers stay such."""
    return count if priced.share == 1 else count * priced.share


def exact_widths(priced: Priced) -> list[tuple[int, int]]:
    """For every output channel of a dot product: the bits of the narrowest exact accumulator, and its additions.

    Empty where that cannot be said: the weights or the inputs are not fixed point, or have no known values.
    """
    op = priced.op
    if (parts := _dot_product(op)) is None:
        return []
    x, weight, rows, bias, times = parts
    steps, grid = range_of(x), constant_grid(weight)
    own = None if grid is None else _steps(grid)
    if steps is None or own is None or rows.is_meta or (bias is not None and bias.is_meta):
        return []
    exponent = own.exponent
    codes = (rows.double() * 2.0**-exponent).to(torch.int64)
    counts = (codes != 0).sum(1).tolist()
    positive, negative = codes.clamp(min=0).sum(1).tolist(), (-codes).clamp(min=0).sum(1).tolist()
    biases = [0.0] * len(counts) if bias is None else bias.flatten().tolist()
    found = []
    for n, p, m, b in zip(counts, positive, negative, biases, strict=True):
        low, high = p * steps.low - m * steps.high, p * steps.high - m * steps.low
        if n and (additions := (n - (bias is None)) * times):
            found.append((accumulator_bits(low, high, b, steps.exponent + exponent), additions))
    # A formula that another ruleset or a plugin put in the place of ours counts something else.
    return found if sum(n for _, n in found) == priced.cost.accumulations else []


def accumulator_bits(low: int, high: int, bias: float = 0.0, exponent: int = 0) -> int:
    """The fewest two's-complement bits for all partial sums, in any order, of terms and a bias.

    The terms are multiples of 2**exponent. All of them together come to no less than `low` (at most 0) and no more
    than `high` (at least 0) of those steps; a term that could only raise the sum has a least value of 0, so that no
    partial sum leaves this range. A bias between two steps needs more bits behind the point.
    """
    numerator, denominator = bias.as_integer_ratio()
    numerator, denominator = numerator << max(-exponent, 0), denominator << max(exponent, 0)
    common = math.gcd(numerator, denominator)
    numerator, denominator = numerator // common, denominator // common
    low, high = low * denominator + min(numerator, 0), high * denominator + max(numerator, 0)
    return 1 + max(high.bit_length(), (-low - 1).bit_length() if low else 0)


def range_of(value: Value) -> Steps | None:
    """Between what an activation lies, by the quantizers that it comes from; None where it is not fixed point."""
    op = value.producer
    if op is None or value not in op.outputs:  # a part was overwritten
        return None
    if is_conversion(op):
        return _steps(grid_of(op))
    if op.name not in KEEP_THE_GRID or (op.name == "aten.constant_pad_nd" and op.arg(2, "value", 0) != 0):
        return None
    sources = [range_of(source) for source in data_inputs(op)]
    known = [source for source in sources if source is not None]
    if not known or len(known) < len(sources):
        return None
    exponent = min(s.exponent for s in known)
    low = min(s.low << (s.exponent - exponent) for s in known)
    high = max(s.high << (s.exponent - exponent) for s in known)
    return Steps(exponent, 0 if op.name == "aten.relu" else low, high)


def _steps(grid: Grid) -> Steps | None:
    """Of a grid with one step for the whole tensor, a power of two, and no zero point: of fixed point."""
    scales = [scale for s in grid.scales for scale in values_of(s)]
    if len(scales) != 1 or math.frexp(scales[0])[0] != 0.5 or any(grid.zeros()):
        return None
    return Steps(math.frexp(scales[0])[1] - 1, min(grid.low, 0), max(grid.high, 0))


def _dot_product(op: Op) -> tuple[Value, Value, Tensor, Tensor | None, int] | None:
    """Input, weight, its values as (outputs, terms), bias, repetitions of a dot product with a constant weight."""
    if op.name == "aten.convolution" and not op.args[6]:
        x, weight, bias = op.args[:3]
        if x.is_constant or weight.data is None or not (bias is None or bias.is_constant):
            return None
        rows = weight.data.flatten(1)
        return x, weight, rows, None if bias is None else bias.data, op.out.numel // weight.shape[0]
    if op.name in ("aten.mm", "aten.bmm"):
        a, b = op.args[:2]
        if not a.is_constant and b.data is not None:
            return a, b, b.data.movedim(-2, -1).flatten(0, -2), None, a.shape[-2]
        if a.data is not None and not b.is_constant:
            return b, a, a.data.flatten(0, -2), None, b.shape[-1]
    if op.name == "aten.addmm" and op.kwargs.get("alpha", 1) == op.kwargs.get("beta", 1) == 1:
        bias, a, b = op.args[:3]
        if not a.is_constant and b.data is not None and bias.data is not None and bias.numel == b.shape[-1]:
            return a, b, b.data.t(), bias.data, a.shape[-2]
    return None
