"""Dot products with constant weights, and the accumulators that they run in where a model has narrower ones.

The rules count an accumulating addition at 32 bits, unless narrower accumulation is really executed. It is where a sum
goes through `micronet::accumulator`, which computes what two's-complement integers of few bits come to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from micronet_eval.formats import ACCUMULATOR_OP
from micronet_eval.grids import (
    Grid,
    Scale,
    constant_grid,
    data_inputs,
    grid_of,
    is_conversion,
    through_views,
    values_of,
)
from micronet_eval.trace import Op, Trace, Value

WIDEST = 32
"""The bits of an accumulator, unless a narrower one is really executed."""


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
class DotProduct:
    """An activation `x` times a constant `weight`, `times` outputs for each of its rows.

    `rows` makes [outputs, terms] of a tensor of the weight's shape; `dim` of the result, from its end, holds them.
    """

    x: Value
    weight: Value
    bias: Value | None
    times: int
    dim: int
    rows: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accumulator:
    """`additions` of a dot product run in integers of `bits` bits; those of its bias come behind."""

    bits: int
    additions: int


WIDE = Accumulator(WIDEST, 0)
"""What a dot product runs in unless a model says otherwise."""


def dot_product(op: Op) -> DotProduct | None:
    """A convolution, linear layer or matrix product as one; None where nothing, or all, of it is constant."""
    if op.name == "aten.convolution" and not op.args[6]:
        x, weight, bias = op.args[:3]
        if x.is_constant or weight.data is None or not (bias is None or bias.is_constant):
            return None
        times = op.out.numel // weight.shape[0]
        return DotProduct(x, weight, bias, times, 1 - len(weight.shape), lambda of: of.flatten(1))
    if op.name in ("aten.mm", "aten.bmm"):
        a, b = op.args[:2]
        if not a.is_constant and b.data is not None:
            return DotProduct(a, b, None, a.shape[-2], -1, lambda of: of.movedim(-2, -1).flatten(0, -2))
        if a.data is not None and not b.is_constant:
            return DotProduct(b, a, None, b.shape[-1], -2, lambda of: of.flatten(0, -2))
    if op.name == "aten.addmm" and op.kwargs.get("alpha", 1) == op.kwargs.get("beta", 1) == 1:
        bias, a, b = op.args[:3]
        if not a.is_constant and b.data is not None and bias.data is not None and bias.numel == b.shape[-1]:
            return DotProduct(a, b, bias, a.shape[-2], -1, Tensor.t)
    return None


def keeps_the_grid(op: Op) -> bool:
    """Whether the results of `op` are some of its inputs, or zero."""
    return op.name in KEEP_THE_GRID and not (op.name == "aten.constant_pad_nd" and op.arg(2, "value", 0) != 0)


def narrowed(op: Op) -> Op | None:
    """The dot product that an operation `micronet::accumulator` sums in integers; None where it does something else.

    Input and weight have to be integers times those steps, and the bias that bias, with which it is called.
    """
    if op.name != ACCUMULATOR_OP or (source := through_views(op.inputs[0]).producer) is None:
        return None
    product, named = dot_product(source), op.named
    if product is None or product.dim != named["dim"] - len(op.out.shape) * (named["dim"] >= 0):
        return None
    x, weight, bias = _grid_of_activation(product.x), constant_grid(product.weight), named["bias"]
    if x is None or weight is None or product.weight.known is None:
        return None
    if (bias is None) != (product.bias is None) or (bias is not None and not _alike(bias, product.bias)):
        return None
    own = _numbers(weight.scales)
    rows = torch.zeros(1, 1, dtype=torch.int64) if weight.indices is None else product.rows(weight.indices)
    one_an_output = bool((rows == rows[:, :1]).all())
    common = _numbers(x.scales)
    if not own or not one_an_output or len(common) != 1 or common != _steps(named["input_step"]):
        return None
    steps = _steps(named["weight_step"])
    expected = [own[i] for i in rows[:, 0].tolist()]
    return source if expected == (steps * len(expected) if len(steps) == 1 else steps) else None


def accumulators(trace: Trace) -> dict[Op, Accumulator]:
    """The dot products of a trace that run in narrower accumulators: those whose sums nothing else reads."""
    users, found = trace.users, dict[Op, Accumulator]()
    for op in trace.ops:
        if (source := narrowed(op)) is None or not _leads_only_to(source.out, op, trace, users):
            continue
        product = dot_product(source)
        assert product is not None and product.weight.known is not None
        terms = (product.rows(product.weight.known) != 0).sum(1)
        additions = int((terms - 1).clamp(min=0).sum()) * product.times
        found[source] = Accumulator(min(op.named["bits"], WIDEST), additions)
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
            return grid_of(op)
        inputs = [v for v in data_inputs(op) if not v.is_constant]
        if len(inputs) != 1 or not keeps_the_grid(op):
            return None
        value = inputs[0]
    return None


def _alike(a: Value, b: Value | None) -> bool:
    """Whether two constants are the same numbers, in whatever shape."""
    known = [value.known for value in (a, b) if value is not None and value.known is not None]
    return len(known) == 2 and torch.equal(known[0].flatten(), known[1].flatten())


def _numbers(scales: Sequence[Scale]) -> list[float]:
    """The numbers in scales that are tensors or numbers; 1 where there are none."""
    return [number for scale in scales for number in values_of(scale)] if scales else [1.0]


def _steps(value: Value) -> list[float]:
    """Scales, or the powers of two of exponents."""
    found = values_of(value)
    return found if value.dtype.is_floating_point else [2.0**e for e in found]
