"""The bit-width of every value in a trace: conversions narrow it, moves keep it, arithmetic widens it again.

A scale that is no power of two is put off until after a dot product, a mean or a sum, which is where the rules count
it: one multiplication an output. `with_scales` writes these multiplications into a trace. Everywhere else the values
are multiplied by their scale first, and are as wide as their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from micronet_eval.costs import ADDENDS, SCALE_OP
from micronet_eval.formats import ACCUMULATOR_OP, DEQUANTIZE, QUANTIZE
from micronet_eval.grids import (
    Grid,
    constant_grid,
    data_inputs,
    dequantized,
    dtype_width,
    exponent_of_shift,
    followed,
    grid_of,
    has_only_signs,
    is_conversion,
    keeps_width,
    through_views,
)
from micronet_eval.trace import Op, Trace, Value

LINEAR = frozenset(
    f"aten.{name}"
    for name in (
        "convolution", "mm", "bmm", "addmm", "baddbmm", "mean", "sum",
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    )
)  # fmt: skip
"""Operations that a factor common to all elements of an input passes through unchanged."""


def bit_widths(trace: Trace) -> Mapping[Value, int]:
    """The bits of every value that the operations of `trace` read or write: those of its codes where it has some."""
    widths: dict[Value, int] = {}
    known: dict[Value, Grid | None] = {}
    for op in trace.ops:
        for value in op.inputs:
            if value not in widths:
                widths[value] = _constant_width(value) if value.is_constant else dtype_width(value)
        for out in op.outputs:
            grid = None if out is not op.out else grid_of(op) if op.name in QUANTIZE else _waiting(op)
            if grid is not None:
                widths[out] = _code_width(op, grid, widths, known)
            elif _moves_into(op, out) and (inputs := data_inputs(op)):
                widths[out] = min(_moved_width(out, inputs, widths, known), dtype_width(out))
            else:
                widths[out] = dtype_width(out)
    return widths


def factor_widths(op: Op, widths: Mapping[Value, int]) -> tuple[int, int]:
    """The widest activation and the widest constant that `op` computes with, in bits; 0 where there is none.

    What is only added to a dot product does not count. A Python number counts 32 bits, unless it is a power of two.
    Where signs are all that is multiplied with values that have a sign bit of their own, both sides are 1 bit.
    """
    if op.name == SCALE_OP:
        return 0, op.kwargs["bits"]
    factors = factors_of(op)
    if _flips_signs(op, factors):
        return 1, 1
    used = {v: widths[v] if _takes_codes(op, v) else _applied_width(v, widths) for v in factors}
    return (
        max((used[v] for v in factors if not v.is_constant), default=0),
        max([used[v] for v in factors if v.is_constant] + [number_width(n) for n in numbers(op)], default=0),
    )


def numbers(op: Op) -> tuple[float, ...]:
    """The Python numbers that the elements of a tensor are multiplied by, divided by, or added to."""
    names = _NUMBERS.get(op.name)
    if names is None:
        return ()
    found = (op.arg(position, name, default) for name, (position, default) in names.items())
    used = (n for n in found if isinstance(n, float | int) and not isinstance(n, bool))
    return tuple(n for n in used if op.name in ("aten.mul", "aten.div") or abs(n) != 1)  # alpha = 1 does nothing


def number_width(number: float) -> int:
    """A power of two, or zero, counts 1 bit, any other number 32."""
    return 1 if math.frexp(number)[0] in (0, 0.5, -0.5) else 32


_NUMBERS: Mapping[str, Mapping[str, tuple[int, float]]] = {
    **{f"aten.{name}": {"other": (1, 1)} for name in ("mul", "div")},
    **{f"aten.{name}": {"other": (1, 1), "alpha": (2, 1)} for name in ("add", "sub", "rsub")},
    "aten.leaky_relu": {"negative_slope": (1, 0.01)},
    "aten.lerp": {"weight": (2, 1)},
    "aten.addcmul": {"value": (3, 1)},
    "aten.addcdiv": {"value": (3, 1)},
    "aten.scatter_reduce": {"value": (3, 1)},
    **{f"aten.avg_pool{n}d": {"divisor_override": (6, 1)} for n in (2, 3)},
}
"""Operation -> its arguments that may be such numbers -> where they stand, and what they are if they are not given."""


def _code_width(op: Op, grid: Grid, widths: Mapping[Value, int], known: dict[Value, Grid | None]) -> int:
    """The codes that `op` makes or reads, as wide as those that they are made of where they are the same or shifted."""
    source, bits = op.inputs[0], grid.code_bits
    if op.name in DEQUANTIZE or (is_conversion(op) and _needs_no_more(grid, pending(source, known))):
        bits = min(bits, widths[source])
    return min(bits, dtype_width(op.out)) + (op.name not in QUANTIZE and grid.shifts_while_running)


def _moved_width(
    out: Value, inputs: Sequence[Value], widths: Mapping[Value, int], known: dict[Value, Grid | None]
) -> int:
    """The widest of what is moved, zeros apart; a scale that cannot wait, as it is not of all, was applied before."""
    waits = pending(out, known) is not None
    said = [v for v in inputs if not _is_zero(v)] or inputs
    return max(widths[v] if waits else _applied_width(v, widths, known) for v in said)


def _moves_into(op: Op, out: Value) -> bool:
    """Whether an output is some of the values that go in: no places of them, and no other number beside them."""
    return keeps_width(op) and (out is op.out or out.dtype == op.out.dtype) and written_number(op) is None


_WRITES: Mapping[str, int] = {
    "aten.constant_pad_nd": 2, "aten.fill": 1, "aten.masked_fill": 2, "aten.index_fill": 3, "aten.scatter": 3,
    "aten.threshold": 2,
}  # fmt: skip
"""Moves and selections that write a number -> where it stands."""


def written_number(op: Op) -> float | None:
    """The number that a move writes beside the values, if it says something.

    Powers of two do not, and infinity does not, which masks of attention are made of.
    """
    number = op.arg(_WRITES[op.name], "value") if op.name in _WRITES else None
    if not isinstance(number, int | float) or math.isinf(number) or number_width(number) == 1:
        return None
    return float(number)


def factors_of(op: Op) -> list[Value]:
    """What `op` computes with, but for what is only added to a dot product."""
    factors = list(op.inputs)
    added = op.args[ADDENDS[op.name]] if op.name in ADDENDS else None
    if added is not None:
        factors.remove(added)  # once: it may be a factor, too
    return factors


def _constant_width(value: Value) -> int:
    grid = constant_grid(value)
    return min(grid.bits, dtype_width(value)) if grid else dtype_width(through_views(value))


def _takes_codes(op: Op, value: Value) -> bool:
    """Whether `op` moves, or sums up, codes of which it puts off the scale."""
    if op.name not in LINEAR:
        return keeps_width(op) and pending(op.out) is not None
    return value.is_constant or pending(value) is None or _pending_in(op, value) is not None


def _applied_width(value: Value, widths: Mapping[Value, int], known: dict[Value, Grid | None] | None = None) -> int:
    """The width of a value whose scale had to be applied first."""
    grid = constant_grid(value) if value.is_constant else pending(value, known)
    return dtype_width(value) if grid is not None and grid.scale_bits else widths[value]


# --- signs ------------------------------------------------------------------------------------------------------------


def _flips_signs(op: Op, factors: list[Value]) -> bool:
    """Whether `op` multiplies values with a sign bit by a binary or ternary weight: 1/32 of an operation."""
    constants, activations = [v for v in factors if v.is_constant], [v for v in factors if not v.is_constant]
    if len(constants) != 1 or len(activations) != 1 or not (op.name in LINEAR or op.name == "aten.mul"):
        return False
    grid = constant_grid(constants[0])
    if grid is None or (op.name not in LINEAR and grid.scale_bits):
        return False
    return has_sign_bit(activations[0]) and has_only_signs(constants[0], grid)


def has_sign_bit(value: Value) -> bool:
    """Whether a sign stands for itself, as in floating point. Fixed point is two's complement: it does not. *(ours)*"""

    def moved_from(value: Value) -> tuple[Value, ...]:
        return _moved_by(value) if value.dtype.is_floating_point else ()

    def has_one(value: Value, inputs: list[bool]) -> bool:
        op = value.producer
        if not value.dtype.is_floating_point or (op is not None and (is_conversion(op) or dequantized(op) is not None)):
            return False
        return all(inputs) and not _is_partly_written(value)

    return followed(value, moved_from, has_one)


# --- scales -----------------------------------------------------------------------------------------------------------


def pending(value: Value, known: dict[Value, Grid | None] | None = None) -> Grid | None:
    """The grid of an activation that is still codes times one scale: from a conversion, through moves, ReLU and max.

    What is looked up in a table of codes is an activation, too. `known` keeps what was found on the way.
    """
    if known is not None:
        return followed(value, _moved_into, _pending, known)
    whole = True
    while len(moved := _moved_into(value)) == 1:  # as nearly always
        whole, value = whole and _keeps_rows(value), moved[0]
    grid = followed(value, _moved_into, _pending) if moved else _pending(value, [])
    return grid if whole or _has_one_scale(grid) else None


def _moved_into(value: Value) -> list[Value]:
    """What an activation is moved or selected from, zeros apart: those are zeros of any scale."""
    if value.is_constant:
        return []
    return [v for v in _moved_by(value) if not _is_zero(v)]


def _is_zero(value: Value) -> bool:
    return value.is_constant and value.nonzeros == 0


def _moved_by(value: Value) -> tuple[Value, ...]:
    """What the operation that made a value moved or selected it from; nothing where it computed it."""
    op = value.producer
    if op is None or is_conversion(op) or not keeps_width(op) or _is_partly_written(value):
        return ()
    return data_inputs(op)


def _is_partly_written(value: Value) -> bool:
    """Whether a value is what a write into a part of it, even an empty one, left: nothing tells what the rest was."""
    return value.producer is not None and value not in value.producer.outputs


def _pending(value: Value, grids: list[Grid | None]) -> Grid | None:
    op = value.producer
    if value.is_constant:
        table = constant_grid(value)
        return table if table is not None and table.scale_bits and _is_of_all(table) else None
    if op is None:
        return None
    if value is op.out and (grid := dequantized(op)) is not None:
        return grid if _is_common(op, grid) else None
    same = bool(grids) and all(g is not None and _same(g, grids[0]) for g in grids)
    return grids[0] if same and (_has_one_scale(grids[0]) or _keeps_rows(value)) else None


def _is_of_all(grid: Grid) -> bool:
    """Whether there is one scale, and no zero point."""
    one = len(grid.scales) == 1 and (isinstance(grid.scales[0], float) or grid.scales[0].numel == 1)
    return one and not any(grid.zeros())


def _has_one_scale(grid: Grid | None) -> bool:
    """Whether one scale, of what was not put together, holds for all values, and not one for each token."""
    return grid is None or all(isinstance(s, float) or s.numel == 1 for s in grid.scales)


_KEEPS_ROWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias", "clone", "contiguous", "detach", "expand", "relu", "slice", "split", "split_with_sizes", "squeeze",
        "unsqueeze", "view", "_reshape_alias", "_to_copy", "_unsafe_view",
    )
)  # fmt: skip
"""Moves and selections that keep the order of elements: a last dimension that is as long as before is the same."""


def _keeps_rows(value: Value) -> bool:
    """Whether the rows of a value (its last dimension) are rows of what it is moved from, whole and in order."""
    op = value.producer
    return op is not None and op.name in _KEEPS_ROWS and value.shape[-1:] == op.inputs[0].shape[-1:]


_OF_ROWS = frozenset(f"aten.{name}" for name in ("mm", "bmm", "addmm", "baddbmm"))
"""Products of matrices, whose first factor's rows are summed."""


def _is_common(op: Op, grid: Grid) -> bool:
    """Whether one scale holds for all that a dot product adds up: one of the tensor, or of a token (last dimension)."""
    shape = op.out.shape
    return grid.blocks[-1:] == shape[-1:] and (grid.blocks == shape or grid.is_dynamic)


def _waiting(op: Op) -> Grid | None:
    """The grid of what `op` makes of codes, if its scales can wait, or are shifts."""
    grid = dequantized(op)
    return grid if grid is not None and (not grid.scale_bits or _is_common(op, grid)) else None


def _same(a: Grid, b: Grid | None) -> bool:
    return b is not None and a.scales == b.scales and a.zero_points == b.zero_points


def _needs_no_more(grid: Grid, before: Grid | None) -> bool:
    """Whether values on one grid have codes on another that are no wider: the same, of a larger step, or shifted ones.

    On a step that is a power of two smaller the codes end in zeros, unless they saturate. On any other smaller step, as
    with a zero point of their own, they are other and longer numbers.
    """
    if before is None or (grid.scales and _same(grid, before)):
        return before is not None
    if grid.shifts_while_running or before.shifts_while_running or any((*grid.zeros(), *before.zeros())):
        return False
    steps = [(old, step) for old in before.steps() for step in grid.steps()]
    return bool(steps) and all(0 < old <= step or _is_shifted(before, old, grid, step) for old, step in steps)


def _is_shifted(before: Grid, old: float, grid: Grid, step: float) -> bool:
    factor = old / step if step else 0
    return bool(exponent_of_shift(factor)) and grid.low <= before.low * factor and before.high * factor <= grid.high


def with_scales(trace: Trace) -> Trace:
    """The same trace with the multiplications by scales that are no powers of two, where the rules count them.

    - Behind a linear operation with scaled inputs, one an output, for all scales that are known before together, one
      more for those that are computed from activations, and one for each group where a weight has several scales
      along the sum. The product of scales is as wide as all of them together, 32 bits at most. A zero point of an
      activation times the weights is a constant, folded into the bias; without a bias it is one more addition an
      output. One that is computed from activations is subtracted from each. *(ours)*
    - At a conversion to codes, one an element, unless the values come straight from such a linear operation, whose
      multiplication takes it in, or have the same scale already. It takes in the scale of one conversion, and only
      where nothing else reads the values. *(ours)*
    - At a conversion to values, one an element, if anything else than linear operations and conversions to codes reads
      them. *(ours)*
    """
    users = trace.users
    ops: list[Op] = []
    scaled: dict[Value, tuple[int, Grid | None]] = {}  # outputs of dot products: where in `ops`, what it takes in
    widened = set[int]()
    known: dict[Value, Grid | None] = {}
    for op in trace.ops:
        explicit = None if is_conversion(op) else dequantized(op)
        if explicit is not None and _is_common(op, explicit) and _is_put_off(op.out, users, trace):
            continue  # a multiplication by scales that the model's code makes before the linear operation
        ops.append(op)
        if is_conversion(op):
            taken_in = _taken_in(op, scaled)
            if taken_in is not None and taken_in not in widened:  # conversions to one grid share a factor
                ops[taken_in] = _with_factor(ops[taken_in], grid_of(op).scale_bits)
                widened.add(taken_in)
            found = _scalings_of_conversion(op, users, trace, taken_in is not None, known)
        else:
            found, takes_more = _scalings_of_linear(op)
            if takes_more:
                scaled[op.out] = len(ops), _one_factor(op.out, users, trace)
        for mults, adds, bits in found:
            kwargs = {"mults": mults, "adds": adds, "bits": bits}
            ops.append(Op(SCALE_OP, op.module, (op.out,), kwargs, (replace(op.out),), path=op.path))
    return replace(trace, ops=tuple(ops))


Scaling = tuple[int, int, int]
"""Multiplications, additions, and bits of the scale."""


def _scalings_of_linear(op: Op) -> tuple[list[Scaling], bool]:
    """Those by scales that are known before, which come first, and by others; whether one more may be a factor."""
    if op.name not in LINEAR:
        return [], False
    factors = factors_of(op)
    constants = [v for v in factors if v.is_constant]
    of_weights = [g for v in constants if (g := constant_grid(v)) is not None and g.scale_bits]
    waiting = [g for v in factors if not v.is_constant and (g := _pending_in(op, v)) is not None]
    static, dynamic = ([g for g in waiting if g.scale_bits and g.is_dynamic is found] for found in (False, True))
    shifted = any(any(g.zeros()) for g in waiting)
    if not (of_weights or static or dynamic or shifted):
        return [], False
    bias = op.name in ADDENDS and op.args[ADDENDS[op.name]] is not None
    outputs, groups = _outputs_and_groups(op, constants[0]) if len(constants) == 1 else (op.out.numel, op.out.numel)
    adds = outputs if shifted and constants and not bias else 0
    product = sum(g.weight_scale_bits for g in of_weights) + sum(g.scale_bits for g in static)
    found = [(groups if of_weights or static else 0, adds, min(32, product))]
    found += [(outputs, 0, g.scale_bits) for g in dynamic]
    found = [scaling for scaling in found if scaling[0] or scaling[1]]
    return found, bool(found and found[0][0] and (of_weights or static))


def _pending_in(op: Op, value: Value) -> Grid | None:
    """The scale of an activation that `op` can put off. One for each token only if its features are what is summed.

    Those are rows of the first factor of a product with a constant.
    """
    grid = pending(value)
    if grid is None or not grid.is_dynamic or value.numel == 0 or _has_one_scale(grid):
        return grid
    first, *others = factors_of(op)
    of_rows = op.name in _OF_ROWS and value is first and all(v.is_constant for v in others)
    return grid if of_rows else None


def _outputs_and_groups(op: Op, weight: Value) -> tuple[int, int]:
    """The outputs of a dot product with a constant that have a non-zero weight, and their scales along the sum."""
    grid = constant_grid(weight)
    summed = _output_dims(op, weight)
    known = weight.data is not None and not weight.data.is_meta
    nonzero = (weight.data.float() != 0) if known else torch.ones(weight.shape, dtype=torch.bool, device="cpu")  # type: ignore[union-attr]
    rows = math.prod(weight.shape[d] for d in summed)
    used = nonzero.movedim(summed, tuple(range(len(summed)))).reshape(rows, -1)
    times = op.out.numel // max(rows, 1)
    outputs = int(used.any(1).sum()) * times
    if grid is None or grid.indices is None or not used.numel():
        return outputs, outputs
    along = [d for d in range(len(weight.shape)) if d not in summed]
    if all(grid.indices.stride(d) == 0 or weight.shape[d] == 1 for d in along):  # one scale for each output
        return outputs, outputs
    where = grid.indices.movedim(summed, tuple(range(len(summed)))).reshape(rows, -1)
    ordered = torch.where(used, where, -1).sort(1).values
    starts = ordered[:, 1:] != ordered[:, :-1]
    distinct = int((starts & (ordered[:, 1:] >= 0)).sum()) + int((ordered[:, 0] >= 0).sum())
    return outputs, distinct * times


def _output_dims(op: Op, weight: Value) -> tuple[int, ...]:
    """The dimensions of a constant that count outputs, over which nothing is summed."""
    if op.name == "aten.convolution":
        return (1,) if op.args[6] else (0,)  # transposed: inputs come first
    batch = tuple(range(len(weight.shape) - 2))
    first = op.args[1 if op.name in ADDENDS else 0]
    return (*batch, len(weight.shape) - (2 if first is weight else 1))


def _taken_in(op: Op, scaled: Mapping[Value, tuple[int, Grid | None]]) -> int | None:
    """Where the multiplication behind a dot product stands that has the scale of a conversion to codes as a factor."""
    grid, source = grid_of(op), op.inputs[0]
    if not grid.scale_bits or grid.is_dynamic or not source.dtype.is_floating_point:
        return None
    (origin,) = _origin(source) or (source,)
    place, factor = scaled.get(origin, (None, None))
    return place if _same(grid, factor) else None


def _one_factor(outputs: Value, users: Mapping[Value, list[Op]], trace: Trace) -> Grid | None:
    """The grid of the first conversion to codes that reads the outputs of a dot product: a factor to take in.

    Other conversions are factors of their own. None where outputs are read as they are, or are shifted to codes.
    """
    read = [None if r is None or not is_conversion(r) else grid_of(r) for r in _readers(outputs, users, trace)]
    return read[0] if read and all(g is not None and g.scale_bits for g in read) else None


def _readers(value: Value, users: Mapping[Value, list[Op]], trace: Trace) -> Iterator[Op | None]:
    """What reads a value, seen through moves, ReLU, max and accumulators; None: it is returned, or part of another."""
    waiting, seen = [value], {value}
    while waiting:
        value = waiting.pop()
        if value in trace.outputs:
            yield None
        for op in users.get(value, []):
            if op in trace.writing_parts:
                yield None
            elif keeps_width(op) or op.name == ACCUMULATOR_OP:
                waiting += [out for out in op.outputs if out not in seen]
                seen.update(op.outputs)
            else:
                yield op


def _with_factor(op: Op, bits: int) -> Op:
    """A multiplication by scales with one more in their product."""
    return replace(op, kwargs={**op.kwargs, "bits": min(32, op.kwargs["bits"] + bits)})


def _scalings_of_conversion(
    op: Op, users: Mapping[Value, list[Op]], trace: Trace, is_taken_in: bool, known: dict[Value, Grid | None]
) -> list[Scaling]:
    grid, source = grid_of(op), op.inputs[0]
    before = pending(source, known) if source.dtype.is_floating_point else None
    bits, mults, adds = grid.scale_bits, 0, 0
    if before is not None and before.scale_bits and not _same(grid, before) and _waits(source, users, trace):
        mults, bits = op.out.numel, min(32, before.scale_bits + bits)  # from one grid to another
    elif bits and source.dtype.is_floating_point and not is_taken_in and not _same(grid, before):
        mults = op.out.numel
    if grid.scale_bits and op.name not in QUANTIZE:
        mults += 0 if _is_common(op, grid) and _is_put_off(op.out, users, trace) else op.out.numel
        adds = op.out.numel if grid.shifts_while_running else 0
    return [(mults, adds, bits)] if mults or adds else []


def _waits(value: Value, users: Mapping[Value, list[Op]], trace: Trace) -> bool:
    """Whether the scale of pending codes has not been multiplied in, for something that reads the values."""
    return all(_is_put_off(origin, users, trace) for origin in _origin(value))


def _origin(value: Value) -> set[Value]:
    """Where a value comes from through moves, ReLU, max and accumulators; nothing where that is in several places."""
    while (op := value.producer) is not None and (keeps_width(op) or op.name == ACCUMULATOR_OP):
        if _is_partly_written(value):
            return set()
        inputs = [v for v in data_inputs(op) if not v.is_constant]
        if len(inputs) != 1:
            return set()
        value = inputs[0]
    return {value}


def _is_put_off(value: Value, users: Mapping[Value, list[Op]], trace: Trace) -> bool:
    """Whether all that read a value, through moves, ReLU and max, can put its scale off, or convert it again."""
    waiting, seen = [value], set[Value]()
    while waiting:
        value = waiting.pop()
        seen.add(value)
        if value in trace.outputs:
            return False
        for op in users.get(value, []):
            if keeps_width(op):
                if op in trace.writing_parts or pending(op.out) is None:
                    return False
                waiting += (out for out in op.outputs if out not in seen)
            elif not is_conversion(op) and (
                op.name not in LINEAR or value not in factors_of(op) or not _pending_in(op, value)
            ):
                return False
    return True


__all__ = [
    "LINEAR",
    "bit_widths",
    "data_inputs",
    "factor_widths",
    "has_sign_bit",
    "keeps_width",
    "number_width",
    "numbers",
    "pending",
    "through_views",
    "with_scales",
    "written_number",
]
