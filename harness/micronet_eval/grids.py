"""Quantized values: which operations make them, and the grid that they lie on, value = (code - zero point) * scale.

One table says which operations convert (formats.CONVERSIONS); `grid_of` reads the grid from an operation's arguments by
the names of its schema, so that torch's fake-quantize, the operations of the PT2E flow and our own look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from micronet_eval.costs import FREE, SELECTS, VIEW
from micronet_eval.formats import (
    ACCUMULATOR_OP,
    CODEBOOK_OP,
    CONVERSIONS,
    DEQUANTIZE,
    FIXED_POINT_OP,
    FLOAT8,
    QUANTIZE,
    SIGNS_OP,
    Plain,
    bits_of_range,
    block_indices,
    narrowest_floats,
)
from micronet_eval.trace import WRITE_OP, Op, Value

Scale = Value | float

_PIECE = 1 << 16
"""Elements that are looked at together: most tensors show in the first of them that they are no signs."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Codes from `low` to `high`, and what makes values of them.

    `scales` are the tensors or numbers with the scales: none where that is 1, several where tensors were put together.
    `indices` says for each element of a constant which scale is its own. `codes` is the constant with the codes
    themselves, where there is one; 8-bit floats are codes, too.
    """

    low: int
    high: int
    scales: tuple[Scale, ...] = ()
    zero_points: tuple[Value | int, ...] = ()
    indices: Tensor | None = None
    codes: Value | None = None
    blocks: tuple[int, ...] = ()

    @property
    def code_bits(self) -> int:
        return bits_of_range(self.low, self.high)

    @property
    def bits(self) -> int:
        """Bits of code - zero point. What is subtracted when the model is loaded can make a weight wider. *(ours)*"""
        zeros = [int(z) for z in self.zeros()]
        return bits_of_range(self.low - max(zeros, default=0), self.high - min(zeros, default=0))

    def steps(self) -> list[float]:
        """The scales that are known."""
        return [number for scale in self.scales for number in values_of(scale)]

    def zeros(self) -> Iterator[float]:
        """The zero points that are known; those of a tensor without values count as 0."""
        for zero in self.zero_points:
            yield from values_of(zero)

    @property
    def is_dynamic(self) -> bool:
        """Whether a scale is computed from the activations themselves."""
        return any(isinstance(s, Value) and not s.is_constant for s in self.scales)

    @property
    def shifts_while_running(self) -> bool:
        """Whether a zero point is computed from the activations: then it is subtracted from each, one bit wider."""
        return any(isinstance(z, Value) and not z.is_constant for z in self.zero_points)

    @property
    def scale_bits(self) -> int:
        """The width of the scales that are no powers of two, 0 where all are: those are shifts."""
        return max((_scale_width(s) for s in self.scales if not _is_shift(s)), default=0)

    @property
    def weight_scale_bits(self) -> int:
        """The same of a weight. One that is rounded has a format that may hold its scales in 16 bits (Affine)."""
        if self.codes is not None or not self.scale_bits:
            return self.scale_bits
        return max(_stored_width(s) for s in self.scales if not _is_shift(s))


def data_inputs(op: Op) -> tuple[Value, ...]:
    """The inputs whose values flow into the output: no indices, no masks, no scales; of a copy only the source."""
    if op.name == "aten._to_copy" or op.name in CONVERSIONS:
        return op.inputs[:1]
    if op.name == "aten.copy":
        return op.inputs[1:]
    return tuple(v for v in op.inputs if v.dtype.is_floating_point or v.dtype == op.out.dtype)


def keeps_width(op: Op) -> bool:
    """Whether the results of `op` are some of its inputs or zero, so that they need no more bits."""
    moves = op.name in FREE and op.name not in (*CONVERSIONS, ACCUMULATOR_OP) and not is_reinterpreted(op)
    return moves or op.name in SELECTS


def is_reinterpreted(op: Op) -> bool:
    """Whether bits are read as those of another dtype: four float16 in an int64 are not one number of 16 bits."""
    return op.name == "aten.view" and op.inputs[0].dtype != op.out.dtype


Item = TypeVar("Item", bound=Hashable)
Found = TypeVar("Found")


def followed(
    value: Item,
    sources: Callable[[Item], Sequence[Item]],
    find: Callable[[Item, list[Found]], Found],
    known: dict[Item, Found] | None = None,
) -> Found:
    """What `find` says of a value and of what it says of its sources: each is asked once, at whatever depth.

    `known` keeps what was found, for the next value.
    """
    if known is not None and value in known:
        return known[value]
    before = sources(value)
    if not before and known is None:
        return find(value, [])
    known = {} if known is None else known
    waiting = [(value, before)]
    while waiting:
        last, before = waiting[-1]
        if missing := [source for source in before if source not in known]:
            waiting += [(source, sources(source)) for source in missing]
            continue
        waiting.pop()
        if last not in known:
            known[last] = find(last, [known[source] for source in before])
    return known[value]


def through_views(value: Value) -> Value:
    """The tensor that `value` is a view, a copy, or an exact conversion of."""
    while (op := value.producer) is not None and (FREE.get(op.name) == VIEW or op.name == "aten._to_copy"):
        inputs = data_inputs(op)
        whole = len(inputs) == 1 and inputs[0].numel == value.numel and not is_reinterpreted(op)
        if not whole or dtype_width(inputs[0]) > dtype_width(value):
            break
        value = inputs[0]
    return value


def dtype_width(value: Value) -> int:
    """The bits that a value's dtype has, or that a tensor subclass means."""
    return 1 if value.dtype == torch.bool else value.bits or value.dtype.itemsize * 8


# --- from an operation ------------------------------------------------------------------------------------------------


def is_conversion(op: Op | None) -> bool:
    """Whether `op` makes, or reads, quantized values."""
    return op is not None and op.name in CONVERSIONS


def grid_of(op: Op) -> Grid:
    """The grid that a conversion's values lie on. Scales and indices are those of its output."""
    a, shape = op.named, op.inputs[0].shape
    if op.name == FIXED_POINT_OP:
        half = 1 << (a["bits"] - 1)
        return Grid(-half, half - 1, tuple(2.0 ** int(e) for e in values_of(a["exponent"])), blocks=shape)
    if op.name == CODEBOOK_OP:
        half = 1 << (dtype_width(a["table"]) - 1)
        return Grid(-half, half - 1)  # multiplied with are the values of the table
    scale = next(a[n] for n in ("scale", "scales", "input_scale") if n in a)
    zero = next((a[n] for n in ("zero_point", "zero_points", "input_zero_point") if a.get(n) is not None), 0)
    blocks = _blocks(op, scale, shape)
    many = isinstance(scale, Value) and scale.numel > 1
    indices = block_indices(shape, blocks) if many and op.out.is_constant else None
    codes = through_views(op.inputs[0]) if op.out.is_constant and not op.inputs[0].dtype.is_floating_point else None
    low, high = (-1, 1) if op.name == SIGNS_OP else (a["quant_min"], a["quant_max"])
    if op.name in DEQUANTIZE:
        low, high = _range_of_codes(op.inputs[0], low, high)
    return Grid(low, high, (scale,), (zero,), indices, codes, blocks)


def _range_of_codes(codes: Value, low: int, high: int) -> tuple[int, int]:
    """What codes lie between that are said to lie from `low` to `high`: what made them has to make that true."""
    while (op := codes.producer) is not None and not codes.is_constant:
        if op.name in QUANTIZE:
            return op.named["quant_min"], op.named["quant_max"]
        inputs = data_inputs(op)
        if len(inputs) != 1 or not keeps_width(op):
            break
        codes = inputs[0]
    if codes.is_constant and (codes.extent is None or (low <= codes.extent[0] and codes.extent[1] <= high)):
        return low, high
    half = 1 << (dtype_width(codes) - 1)
    return (-half, half - 1) if codes.dtype.is_signed else (0, 2 * half - 1)


def dequantized(op: Op) -> Grid | None:
    """The grid of what `op` makes of codes: a conversion to values, or codes of activations multiplied by scales.

    Those scales are of the tensor, or of a token; zero points, of the same, may have been subtracted before.
    """
    if is_conversion(op):
        return None if op.name in QUANTIZE else grid_of(op)
    if op.name != "aten.mul" or op.out.is_constant:
        return None
    for codes, scale in permutations(op.inputs, 2):
        source, zeros = through_views(codes), tuple[Value, ...]()
        if (before := source.producer) is not None and _subtracts_zero_point(before):
            source, zero = map(through_views, before.inputs)
            zeros = (zero,)
        one_a_token = scale.dtype.is_floating_point and scale.shape[-1:] in ((), (1,)) and scale.numel < codes.numel
        if not source.is_constant and source.dtype in (torch.int8, torch.uint8) and one_a_token:
            half = 1 << (dtype_width(source) - 1)
            low = -half if source.dtype.is_signed else 0
            whole = codes.shape if scale.numel == 1 else (1,) * (len(codes.shape) - 1) + codes.shape[-1:]
            return Grid(low, low + 2 * half - 1, (scale,), zeros, blocks=whole)
    return None


def _subtracts_zero_point(op: Op) -> bool:
    """Whether `op` takes from codes others, one for all or one for each token: any other number makes more bits."""
    if op.name != "aten.sub" or len(op.inputs) != 2 or op.arg(2, "alpha", 1) != 1:
        return False
    codes, zero = map(through_views, op.inputs)
    if op.inputs[1].shape[-1:] not in ((), (1,)) or codes.dtype not in (torch.int8, torch.uint8):
        return False
    limits, known = torch.iinfo(codes.dtype), values_of(zero) if zero.is_constant else []
    held = bool(known) and all(z.is_integer() and limits.min <= z <= limits.max for z in map(float, known))
    return held or zero.dtype == codes.dtype


def _blocks(op: Op, scale: Scale, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many elements share a scale, dimension by dimension."""
    a = op.named
    if not isinstance(scale, Value) or scale.numel == 1:
        return shape
    if "block_size" in a:
        return tuple(a["block_size"])
    axis = a.get("axis", a.get("ch_axis"))
    if axis is not None:
        return tuple(1 if d == axis % len(shape) else n for d, n in enumerate(shape))
    return (1,) * (len(shape) - 1) + (a.get("group_size", shape[-1]),)  # per group, or per token


# --- of constants -----------------------------------------------------------------------------------------------------


def constant_grid(value: Value) -> Grid | None:
    """The grid of a constant: of the conversion that made it, or of codes that are multiplied by scales.

    Seen through moves; the index of each element's scale moves along. None where the values lie on no grid.
    """
    return followed(value, _moved_constants, _constant_grid)


def moves(op: Op) -> bool:
    """Whether `op` makes of constants others with the same elements, by no conversion and no partial write."""
    return op.name in FREE and not (op.name == WRITE_OP or is_conversion(op) or is_reinterpreted(op))


def _moved_constants(value: Value) -> tuple[Value, ...]:
    return data_inputs(value.producer) if value.producer is not None and moves(value.producer) else ()


def _constant_grid(value: Value, grids: list[Grid | None]) -> Grid | None:
    """The same, where the grids of what it is moved from are known."""
    op = value.producer
    if op is None:
        return None
    if is_conversion(op):
        return grid_of(op)
    if moves(op):
        return _moved(op, value, grids)
    if op.name == "aten.mul":
        for codes, scale in permutations((v for v in op.inputs if v.is_constant), 2):
            grid = _codes(codes)
            if grid is not None and scale.dtype.is_floating_point and scale.numel < value.numel and not grid.scales:
                indices = torch.arange(scale.numel, device="cpu").view(scale.shape).expand(value.shape)
                return replace(grid, scales=(scale,), indices=indices)
    return _codes(value)


def _moved(op: Op, value: Value, grids: list[Grid | None]) -> Grid | None:
    sources = data_inputs(op)
    found = [g for g in grids if g is not None]
    if not found or len(found) < len(grids):
        return None
    count, moved = 0, dict[Value, Tensor]()
    for source, grid in zip(sources, found, strict=True):
        own = torch.zeros(source.shape, dtype=torch.int64, device="cpu") if grid.indices is None else grid.indices
        moved[source] = own.contiguous() + count  # in rows, as what is moved: a view needs that
        count += sum(s.numel if isinstance(s, Value) else 1 for s in grid.scales) or 1
    indices: Tensor | None = found[0].indices
    if (count > 1 or indices is not None) and op.func is not None and op.name != "aten._to_copy":
        args, kwargs = tree_map(lambda a: moved.get(a, a.data) if isinstance(a, Value) else a, (op.args, op.kwargs))
        indices = tree_flatten(op.func(*args, **kwargs))[0][op.outputs.index(value)]
    if len(found) == 1:
        return replace(found[0], indices=indices)
    scales, zeros = (tuple(x for g in found for x in getattr(g, name)) for name in ("scales", "zero_points"))
    return Grid(min(g.low for g in found), max(g.high for g in found), scales, zeros, indices)


def _codes(value: Value) -> Grid | None:
    """The grid of integers or 8-bit floats, converted or not, with a zero point subtracted or not, or of signs."""
    source = through_views(value)
    op = source.producer
    if source.dtype in FLOAT8 or not (source.dtype.is_floating_point or source.dtype == torch.bool):
        width, signed = dtype_width(source), source.dtype.is_signed
        half = 1 << (width - 1)
        return Grid(-half if signed else 0, half - 1 if signed else 2 * half - 1, codes=source)
    if op is not None and op.name == "aten.sub" and all(v.is_constant for v in op.inputs) and len(op.inputs) == 2:
        codes, zero = (_codes(v) for v in op.inputs)
        if codes is not None and zero is not None and not codes.zero_points:
            return replace(codes, zero_points=(through_views(op.inputs[1]),))
    if op is not None and op.name not in FREE and _are_signs(source):
        return Grid(-1, 1, codes=source)
    return None


def _are_signs(value: Value) -> bool:
    """Whether computed values are -1 and +1, both, and at most 0 beside them: a binary or ternary weight."""
    data = value.data
    if data is None or data.is_meta or not value.dtype.is_floating_point or not value.numel:
        return False
    return _are_steps(data, torch.ones((), device=data.device)) and bool(data.min() == -1) and bool(data.max() == 1)


def has_only_signs(value: Value, grid: Grid) -> bool:
    """Whether a constant is its scale, its scale with the sign reversed, or zero, and not zero everywhere."""
    data, magnitudes = value.data, grid.steps()
    if data is None or data.is_meta or not value.dtype.is_floating_point or any(grid.zeros()):
        return False
    steps = torch.tensor(magnitudes or [1.0], device="cpu")
    where = grid.indices if steps.numel() > 1 else None
    if steps.numel() > 1 and where is None:
        return False
    data = data.float()
    return _are_steps(data, steps, where) and bool((data != 0).any())


def _are_steps(data: Tensor, steps: Tensor, where: Tensor | None = None) -> bool:
    """Whether each element is -1, 0 or +1 times a step: the only one, or that of its number in `where`."""
    if not data.dim():
        data, where = data[None], None if where is None else where[None]
    rows = max(1, _PIECE // max(data[:1].numel(), 1))
    for part in (slice(start, start + rows) for start in range(0, len(data), rows)):
        own = steps if where is None else steps[where[part]]
        if not bool(((data[part] == 0) | (data[part].abs() == own)).all()):
            return False
    return True


# --- scales -----------------------------------------------------------------------------------------------------------


def values_of(item: Value | float) -> list[float]:
    """The numbers that a scale or zero point holds, as far as they are known."""
    if not isinstance(item, Value):
        return [float(item)]
    known = item.data is not None and not item.data.is_meta
    return item.data.reshape(-1).tolist() if known else []  # type: ignore[union-attr]


def exponent_of_shift(number: float) -> int | None:
    """The exponent of a power of two; None for any other number."""
    fraction, exponent = math.frexp(number)
    return exponent - 1 if fraction == 0.5 else None


def _is_shift(scale: Scale) -> bool:
    values = values_of(scale)
    return bool(values) and all(exponent_of_shift(v) is not None for v in values)


def _scale_width(scale: Scale) -> int:
    return min(32, dtype_width(scale)) if isinstance(scale, Value) else 32


def _stored_width(scale: Scale) -> int:
    """16 where a float of 16 bits holds every number, else that of the dtype."""
    if not isinstance(scale, Value):
        return Plain(narrowest_floats(torch.tensor(scale, dtype=torch.float64, device="cpu"))).code_bits
    known = scale.data is not None and not scale.data.is_meta and _scale_width(scale) == 32
    return Plain(narrowest_floats(scale.data)).code_bits if known else _scale_width(scale)  # type: ignore[arg-type]
