"""The bit-width of every value in a trace, from quantizers and dtypes: moves keep it, arithmetic widens it again."""

from __future__ import annotations

import math
from collections.abc import Mapping

from micronet_eval.costs import ADDENDS, FREE, SELECTS
from micronet_eval.formats import FIXED_POINT_OP, FixedPoint
from micronet_eval.trace import Op, Trace, Value


def keeps_width(op: Op) -> bool:
    """Whether the results of `op` are some of its inputs or zero, so that they need no more bits."""
    return op.name in FREE or op.name in SELECTS


def data_inputs(op: Op) -> tuple[Value, ...]:
    """The inputs whose values flow into the output: no indices, no masks; of a copy only the source."""
    values = tuple(v for v in op.inputs if v.dtype.is_floating_point)
    return values[1:] if op.name == "aten.copy" and len(values) > 1 else values


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
    factors = [v for v in op.inputs if v is not added and v.dtype.is_floating_point]
    scalars = op.args[1:2] if op.name in ("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub") else ()
    return (
        max((widths[v] for v in factors if not v.is_constant), default=0),
        max([widths[v] for v in factors if v.is_constant] + [_number_width(s) for s in scalars], default=0),
    )


def _constant_width(value: Value) -> int:
    quantizer = quantizing_op(value)
    return quantizer.args[2] if quantizer else _dtype_width(value)


def _dtype_width(value: Value) -> int:
    return value.dtype.itemsize * 8


def _number_width(number: object) -> int:
    if not isinstance(number, float | int):
        return 0
    return 1 if math.frexp(number)[0] in (0.5, -0.5) else 32
