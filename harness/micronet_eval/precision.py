"""The bit-width of every value in a trace, from quantizers and dtypes: moves keep it, arithmetic widens it again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from micronet_eval.costs import ADDENDS, FREE, SELECTS
from micronet_eval.formats import FIXED_POINT_OP, FixedPoint
from micronet_eval.trace import Op, Trace, Value


def keeps_width(op: Op) -> bool:
    """Whether the results of `op` are some of its inputs or zero, so that they need no more bits."""
    return op.name in FREE or op.name in SELECTS


def data_inputs(op: Op) -> tuple[Value, ...]:
    """The inputs whose values flow into the output: no indices, no masks; of a copy only the source."""
    if op.name == "aten._to_copy":
        return op.inputs
    if op.name == "aten.copy":
        return op.inputs[1:]
    return tuple(v for v in op.inputs if v.dtype.is_floating_point)


def through_views(value: Value) -> Value:
    """The tensor that `value` is a view, a copy, or an exact conversion of."""
    while (op := value.producer) is not None and op.name in FREE and op.name != FIXED_POINT_OP:
        inputs = data_inputs(op)
        if len(inputs) != 1 or inputs[0].numel != value.numel or _dtype_width(inputs[0]) > _dtype_width(value):
            break
        value = inputs[0]
    return value


def bit_widths(trace: Trace) -> Mapping[Value, int]:
    """The bits of every value that the operations of `trace` read or write."""
    widths: dict[Value, int] = {}
    for op in trace.ops:
        for value in op.inputs:
            if value not in widths:
                widths[value] = _constant_width(value) if value.is_constant else _dtype_width(value)
        for out in op.outputs:
            if op.name == FIXED_POINT_OP:
                widths[out] = op.args[2]
            elif keeps_width(op) and (inputs := data_inputs(op)):
                widths[out] = min(max(widths[v] for v in inputs), _dtype_width(out))
            else:
                widths[out] = _dtype_width(out)
    return widths


def quantizing_op(value: Value) -> Op | None:
    """The quantizer that made the constant `value`, seen through views."""
    while (op := value.producer) is not None:
        if op.name == FIXED_POINT_OP:
            return op
        if op.name not in FREE or not (inputs := data_inputs(op)):
            return None
        value = inputs[0]
    return None


def fixed_point_format(op: Op) -> FixedPoint:
    """The format that a quantizing operation gives. An exponent without value (on the meta device) reads as 0."""
    exponent = op.args[1].data
    known = exponent is not None and exponent.device.type != "meta"
    return FixedPoint(op.args[2], int(exponent) if known else 0)


def factor_widths(op: Op, widths: Mapping[Value, int]) -> tuple[int, int]:
    """The widest activation and the widest constant that `op` computes with, in bits; 0 where there is none.

    What is only added to a dot product does not count. A Python number counts 32 bits, unless it is a power of two.
    """
    added = op.args[ADDENDS[op.name]] if op.name in ADDENDS else None
    factors = [v for v in op.inputs if v is not added]
    return (
        max((widths[v] for v in factors if not v.is_constant), default=0),
        max([widths[v] for v in factors if v.is_constant] + [number_width(n) for n in numbers(op)], default=0),
    )


def numbers(op: Op) -> tuple[float, ...]:
    """The Python numbers that the elements of a tensor are multiplied by, divided by, or added to."""
    return tuple(n for n in op.args[1:2] if op.name in _WITH_NUMBERS and isinstance(n, float | int))


def number_width(number: float) -> int:
    """A power of two, or zero, counts 1 bit, any other number 32."""
    return 1 if math.frexp(number)[0] in (0, 0.5, -0.5) else 32


_WITH_NUMBERS = ("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub")


def _constant_width(value: Value) -> int:
    quantizer = quantizing_op(value)
    return quantizer.args[2] if quantizer else _dtype_width(through_views(value))


def _dtype_width(value: Value) -> int:
    return 1 if value.dtype == torch.bool else value.dtype.itemsize * 8
