"""Dot products with constant weights, and the accumulators that they run in where a model has narrower ones.

The rules count an accumulating addition at 32 bits, unless narrower accumulation is really executed. It is where a sum
goes through `micronet::accumulator`, which computes what two's-complement integers of few bits come to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from micronet_eval.costs import NoFormula
from micronet_eval.formats import ACCUMULATOR_OP, QUANTIZE
from micronet_eval.grids import (
    Grid,
    constant_grid,
    data_inputs,
    grid_of,
    is_conversion,
    is_reinterpreted,
    values_of,
)
from micronet_eval.trace import Op, Trace, Value

WIDEST = 32
"""The bits of an accumulator, unless a narrower one is really executed."""

FEWEST, MOST = 2, 24
"""The bits that narrower ones have. Of the integers below 2^24 float32 has all, so that sums of them are exact."""

_OFF = 0.01
"""How far from an integer a weight may lie by rounding to float32; codes have at most 16 bits."""

_RESHAPES = frozenset(f"aten.{name}" for name in ("view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze"))

_KEEP_THE_GRID = frozenset(
    f"aten.{name}"
    for name in (
        "_reshape_alias", "_reshape_copy", "_unsafe_view", "alias", "amax", "as_strided", "cat", "clone",
        "constant_pad_nd", "contiguous", "detach", "diagonal", "expand", "flip", "gather", "index", "index_select",
        "lift_fresh", "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "permute",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "relu", "repeat", "replication_pad1d",
        "replication_pad2d", "replication_pad3d", "roll", "select", "slice", "split", "split_with_sizes", "squeeze",
        "stack", "t", "transpose", "unbind", "unfold", "unsqueeze", "upsample_nearest1d", "upsample_nearest2d",
        "upsample_nearest3d", "view",
    )
)  # fmt: skip
"""Operations whose results are some of their inputs, or zero."""


@dataclass(frozen=True)
class DotProduct:
    """What `op` computes: an activation `x` times a constant `weight`, `times` outputs for each of its rows.

    `rows` makes [outputs, terms] of a tensor of the weight's shape; `dim` of the result, from its end, holds them.
    """

    op: Op
    x: Value
    weight: Value
    bias: Value | None
    times: int
    dim: int
    rows: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accumulator:
    """`additions` of a dot product run in integers of `bits` bits; `biases` are added behind, at 32 bits."""

    bits: int
    additions: int
    biases: int

    def split(self, accumulations: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bits and number of those of so many accumulating additions that run in it, and of the others."""
        return (self.bits, self.additions), (WIDEST, accumulations - self.additions)


WIDE = Accumulator(WIDEST, 0, 0)
"""What a dot product runs in unless a model says otherwise."""


def dot_product(op: Op) -> DotProduct | None:
    """A convolution, linear layer or matrix product as one; None where nothing, or all, of it is constant."""
    if op.name == "aten.convolution" and not op.args[6] and op.out.numel:
        x, weight, bias = op.args[:3]
        if x.is_constant or weight.data is None or not (bias is None or bias.is_constant):
            return None
        times = op.out.numel // weight.shape[0]
        return DotProduct(op, x, weight, bias, times, 1 - len(weight.shape), lambda of: of.flatten(1))
    if op.name in ("aten.mm", "aten.bmm"):
        a, b = op.args[:2]
        if not a.is_constant and b.data is not None:
            return DotProduct(op, a, b, None, a.shape[-2], -1, lambda of: of.movedim(-2, -1).flatten(0, -2))
        if a.data is not None and not b.is_constant:
            return DotProduct(op, b, a, None, b.shape[-1], -2, lambda of: of.flatten(0, -2))
    if op.name == "aten.addmm" and op.kwargs.get("alpha", 1) == op.kwargs.get("beta", 1) == 1:
        bias, a, b = op.args[:3]
        if not a.is_constant and b.data is not None and bias.data is not None and bias.numel == b.shape[-1]:
            return DotProduct(op, a, b, bias, a.shape[-2], -1, Tensor.t)
    return None


def steps_of_outputs(product: DotProduct, grid: Grid) -> list[float]:
    """The step of each output's weights; nothing where an output has several."""
    own = grid.steps()
    if grid.indices is None:
        outputs = product.rows(torch.empty(product.weight.shape, device="meta")).shape[0]
        return own * outputs if len(own) == 1 else []
    indices = product.rows(grid.indices)
    if indices.numel() == 0 or not bool((indices == indices[:, :1]).all()):
        return []
    return [own[i] for i in indices[:, 0].tolist()]


def keeps_the_grid(op: Op) -> bool:
    """Whether the results of `op` are some of its inputs, or zero."""
    padded = op.name == "aten.constant_pad_nd" and op.arg(2, "value", 0) != 0
    return op.name in _KEEP_THE_GRID and not padded and not is_reinterpreted(op)


def summed(op: Op) -> DotProduct | None:
    """The dot product that an operation `micronet::accumulator` sums in integers of few bits.

    None for any other operation, and where weights have no values to look at. Raises NoFormula where the operation sums
    no integers: weights or inputs are none, its steps or its bias are not theirs, or the wide sum is not exact.
    """
    if op.name != ACCUMULATOR_OP:
        return None
    named, value = op.named, op.inputs[0]
    while value.producer is not None and value.producer.name in _RESHAPES:
        value = value.producer.inputs[0]
    dim = named["dim"] - len(op.out.shape) * (named["dim"] >= 0)
    product = None if value.producer is None else dot_product(value.producer)
    if product is None or product.dim != dim or value.shape[dim:] != op.out.shape[dim:]:
        raise NoFormula(op, "what it is given is no dot product with its outputs in that dimension")
    if not FEWEST <= named["bits"] <= MOST:
        raise NoFormula(op, f"an accumulator has {FEWEST} to {MOST} bits, not {named['bits']}")
    if product.weight.known is None:
        return None
    if (named["bias"] is None) != (product.bias is None) or not _alike(named["bias"], product.bias):
        raise NoFormula(op, "its bias is not that of the dot product")
    inputs, weights = _grid_of_activation(product.x), constant_grid(product.weight)
    if inputs is None or weights is None or not inputs.scales or not weights.scales:
        raise NoFormula(op, "the input, or the weight, is no integer with a step")
    step, steps = inputs.steps(), steps_of_outputs(product, weights)
    if len(step) != 1 or step != _steps(named["input_step"]):
        raise NoFormula(op, "its step of the input is not that of the input's quantizer")
    if not steps or steps not in (own := _steps(named["weight_step"]), own * len(steps)):
        raise NoFormula(op, "its steps of the weight are not those of the weight, one for each output")
    codes = product.rows(product.weight.known).double() / torch.tensor(steps, dtype=torch.float64)[:, None]
    if bool(((codes - codes.round()).abs() > _OFF).any()):
        raise NoFormula(op, "the weight is no integer times its step")
    zeros = [*inputs.zeros(), 0.0]
    largest = max(inputs.high - min(zeros), max(zeros) - inputs.low)
    if codes.numel() and float(codes.abs().sum(1).max()) * largest >= 2**MOST:
        raise NoFormula(op, f"sums may reach 2^{MOST} steps, which float32 does not tell apart")
    return product


def accumulators(trace: Trace) -> dict[Op, Accumulator]:
    """The dot products of a trace that run in narrower accumulators: those whose sums nothing else reads.

    Raises NoFormula where an accumulator does not sum integers.
    """
    users, found = trace.users, dict[Op, Accumulator]()
    for op in trace.ops:
        product = summed(op)
        if product is None or product.weight.known is None or not _leads_only_to(product.op.out, op, trace, users):
            continue
        terms = (product.rows(product.weight.known) != 0).sum(1)
        additions = int((terms - 1).clamp(min=0).sum()) * product.times
        biases = 0 if product.bias is None else int((terms > 0).sum()) * product.times
        found[product.op] = Accumulator(op.named["bits"], additions, biases)
    return found


def _leads_only_to(value: Value, op: Op, trace: Trace, users: Mapping[Value, list[Op]]) -> bool:
    """Whether nothing reads a value but, through views, one operation."""
    while value not in trace.outputs and len(readers := users[value]) == 1:
        if readers[0] is op:
            return True
        value = readers[0].out
    return False


def _grid_of_activation(value: Value) -> Grid | None:
    """The grid of the one quantizer that an activation comes from, through moves, ReLU and max pooling."""
    while (op := value.producer) is not None and value is op.out:
        if is_conversion(op):
            return None if op.name in QUANTIZE else grid_of(op)  # codes are one step apart, whatever the scale
        inputs = data_inputs(op)
        if len(inputs) != 1 or not keeps_the_grid(op):
            return None
        value = inputs[0]
    return None


def _alike(a: Value | None, b: Value | None) -> bool:
    """Whether two constants, or none, are the same numbers, in whatever shape."""
    known = [value.known for value in (a, b) if value is not None and value.known is not None]
    return a is b or (len(known) == 2 and torch.equal(known[0].flatten(), known[1].flatten()))


def _steps(value: Value) -> list[float]:
    """Scales, or the powers of two of exponents."""
    found = values_of(value)
    return found if value.dtype.is_floating_point else [2.0**e for e in found]
