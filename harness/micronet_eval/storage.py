"""What a model has to store: the constants that its operations use, each at the bits of its format.

A tensor is stored dense, or as its non-zero values plus a bitmask of 1 bit an element, or as its non-zero blocks plus 1
bit a block, whichever is smallest.
`packing` writes exactly these bits; what the model's code makes by itself counts, too, but is not in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from micronet_eval.costs import ADDENDS, FREE, permutation_of
from micronet_eval.dotted import summed
from micronet_eval.errors import InputError
from micronet_eval.formats import (
    CODEBOOK_OP,
    FIXED_POINT_OP,
    FLOAT8,
    Affine,
    Codebook,
    FixedPoint,
    Format,
    Integer,
    OffGrid,
    Plain,
    Signs,
    bits_of_range,
    index_bits,
)
from micronet_eval.grids import (
    Grid,
    constant_grid,
    data_inputs,
    dtype_width,
    exponent_of_shift,
    followed,
    grid_of,
    has_only_signs,
    is_conversion,
    keeps_width,
    moves,
    through_views,
    values_of,
)
from micronet_eval.masks import ELEMENT, Block, Mask, candidates, fewest, kept_elements, mask_bits
from micronet_eval.nonzeros import is_nonzero
from micronet_eval.precision import number_width, numbers, written_number
from micronet_eval.shapes import hashable
from micronet_eval.trace import FILLS, Op, Trace, Value, constant

FREEBIE_BITS = 16

_UNKNOWN = 1 / 3  # a scale that is not known counts as one that takes 32 bits

_MANY = 1 << 16
"""Elements of a tensor that is looked at in part first."""


@dataclass(frozen=True)
class Bits:
    """Bits of one tensor by what they hold."""

    values: int
    mask: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        return self.values + self.mask + self.overhead


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor that has to be stored.

    `is_overhead` marks what belongs to a format (an activation's exponent), `is_index` what only says where values go.
    `in_code` marks what the model's code makes from no parameter: a number, a table, random weights.
    """

    name: str
    value: Value
    format: Format
    is_overhead: bool
    is_index: bool = False
    in_code: bool = False

    @property
    def tensor(self) -> Tensor:
        assert self.value.data is not None
        return self.value.data

    @property
    def elements(self) -> int:
        return self.value.numel

    @property
    def nonzeros(self) -> int:
        """Elements that are not zero; all of them where there are no values (on the meta device)."""
        return self.value.nonzeros

    def bits(self, widest: int = 64, of: Format | None = None) -> Bits:
        """What it takes in its format or `of`, when no float takes more than `widest` bits (the freebie's 16).

        Integers would be others in fewer bits.
        """
        number_format = of or self.format
        is_float = self.value.dtype.is_floating_point
        width = min(number_format.code_bits, widest) if is_float else number_format.code_bits
        if self.is_overhead:
            return Bits(0, 0, self.elements * width)
        if self.in_code and self.value.is_pattern:
            return Bits(width if self.nonzeros else 0, self.elements if 0 < self.nonzeros < self.elements else 0)
        block = self.mask(width, number_format)
        if block is None:
            return Bits(self.elements * width, 0, number_format.side_bits)
        return Bits(self._kept(block) * width, mask_bits(self.value.shape, block), number_format.side_bits)

    def mask(self, width: int, number_format: Format) -> Block | None:
        """The blocks of the smallest mask for values of `width` bits; None where all values are smaller without one.

        The largest blocks come last: of two that are equally small the first is taken.
        """
        if self.nonzeros == self.elements:
            return None
        if not number_format.holds_zero:
            return ELEMENT  # a block could hold a zero
        if width not in self._masks:
            self._masks[width] = self._smallest_mask(width)
        return self._masks[width]

    def _smallest_mask(self, width: int) -> Block | None:
        best: Block | None = None
        smallest = self.elements * width
        if not self.nonzeros:
            block = fewest(self.value.shape)
            return block if mask_bits(self.value.shape, block) < smallest else None
        if self.nonzeros * width + self.elements < smallest:
            best, smallest = ELEMENT, self.nonzeros * width + self.elements
        for block in candidates(self.value.shape):
            room = (smallest - mask_bits(self.value.shape, block) - 1) // width  # elements that may be kept
            if self.nonzeros <= room and not self._keeps_more(block, room) and (kept := self._kept(block)) <= room:
                best, smallest = block, kept * width + mask_bits(self.value.shape, block)
        return best

    def _keeps_more(self, block: Block, room: int) -> bool:
        """Whether blocks can be told to keep more than `room` elements without looking at all of them."""
        if any(kept > room and _lies_in(inner, block) for inner, kept in self._found.items()):
            return True
        if self.elements < _MANY or block in self._found:
            return False
        part = self.is_nonzero[: len(self.is_nonzero) // 4 // block[0] * block[0]]
        if not len(part):
            return False
        return bool(kept_elements(part, block) + self.nonzeros - np.count_nonzero(part) > room)

    @cached_property
    def _masks(self) -> dict[int, Block | None]:
        return {}

    @cached_property
    def is_nonzero(self) -> Mask:
        """Which elements are not zero."""
        kept: Mask = is_nonzero(self.tensor).cpu().numpy()
        return kept

    @cached_property
    def _found(self) -> dict[Block, int]:
        return {ELEMENT: self.nonzeros}

    def _kept(self, block: Block) -> int:
        """The elements in blocks that are not zero."""
        if block not in self._found:
            self._found[block] = kept_elements(self.is_nonzero, block) if self.nonzeros else 0
        return self._found[block]


def _lies_in(inner: Block, block: Block) -> bool:
    """Whether blocks of one size are made of whole blocks of the other, so that they keep at least as many elements."""
    return block[0] % inner[0] == 0 and block[1] % inner[1] == 0


def stored_tensors(trace: Trace) -> dict[Stored, Op | None]:
    """Every stored tensor once, with the operation that uses it first (None: it is returned), in order of use.

    Parts of one tensor, as slices of it, are stored as that tensor if they take more, or if it is stored anyway.
    """
    alike = _Alike()
    found: dict[Hashable, tuple[Stored, Op | None]] = {}
    origins: dict[Hashable, tuple[Value, Stored]] = {}
    for op in (*trace.ops, None):
        sources = [s for value in _constants(op, trace) for s in _sources(value, op)]
        if op is not None and _chooses_summands(op, trace):
            sources = [(value, replace(tensor, is_index=False), origin) for value, tensor, origin in sources]
        for source, tensor, origin in sources:
            first, user = found.setdefault(alike(source), (tensor, op))
            if first.is_index and not tensor.is_index:
                found[alike(source)] = tensor, user  # where to look for one reader, a code for another
            if origin is not None:
                origins[alike(source)] = origin
        for key, tensor in (*_numbers(op), *_permutation(op)):
            found.setdefault(key, (tensor, op))
    parts: Counter[Hashable] = Counter()
    for key, (whole, _) in origins.items():
        parts[alike(whole)] += found[key][0].bits().total
    stored: dict[Stored, Op | None] = {}
    for key, (tensor, op) in list(found.items()):
        if key in origins:
            whole, itself = origins[key]
            if (of := alike(whole)) in found:
                continue
            if parts[of] > itself.bits().total:
                tensor, _ = found[of] = itself, op
        stored[tensor] = op
    return stored


def without_values(trace: Trace) -> set[str]:
    """Names of the parameters that operations use although they have no values (they lie on the meta device)."""
    used = (v for op in trace.ops for v in op.inputs if v.data is not None and v.data.is_meta)
    return {leaf.name or "" for value in used for leaf in value.leaves()}


def freebie_applies(stored: Iterable[Stored], trace: Trace) -> bool:
    """Whether nothing is quantized below 16 bits, so that parameters and multiplications may count as 16 bit."""
    narrow_weight = any(s.format.code_bits < FREEBIE_BITS for s in stored if not (s.is_overhead or s.is_index))
    return not narrow_weight and not any(narrows(op) for op in trace.ops)


def narrows(op: Op) -> bool:
    """Whether an operation quantizes an activation below 16 bits, by a quantizer or by a dtype."""
    if op.name in ("aten._to_copy", "aten.copy"):
        return dtype_width(data_inputs(op)[0]) >= FREEBIE_BITS > dtype_width(op.out) and op.out.dtype != torch.bool
    return is_conversion(op) and grid_of(op).code_bits < FREEBIE_BITS


def _constants(op: Op | None, trace: Trace) -> Iterator[Value]:
    inputs = trace.outputs if op is None else op.inputs
    if op is not None and op.name in ("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"):
        # In evaluation the running statistics merge into weight and bias: two values a channel are stored.
        # An activation as weight or bias merges with none.
        affine = tuple(v for v in op.args[1:3] if isinstance(v, Value) and v.is_constant)
        running = tuple(v for v in op.args[3:5] if isinstance(v, Value))
        inputs = affine if len(affine) == 2 or not running else (*running, *(v for v in affine if v is op.args[2]))
    elif op is not None and op.name == "aten.copy":
        inputs = data_inputs(op)  # what it overwrites does not matter
    elif op is not None and summed(op) is not None:
        inputs = op.inputs[:1]  # steps and bias are those of the dot product
    yield from (v for v in inputs if v.is_constant)


_Source = tuple[Value, Stored, tuple[Value, Stored] | None]
"""What is stored, and the tensor that it is a part of, if it is stored as a part."""


_Use = tuple[Value, Op | None]
"""A constant, and the operation that reads it; None: it is returned."""


def _sources(value: Value, op: Op | None) -> list[_Source]:
    """What has to be stored to have the constant `value`: itself, or what it is moved from, if that takes no more.

    Codes are stored with their scales and zero points. The result of other arithmetic on constants is itself what
    inference needs. *(ours)*
    """
    sources = followed((value, op), _moved_from, _sources_of)
    return [(source, _as_read(stored, value, op), origin) for source, stored, origin in sources]


def _as_read(stored: Stored, value: Value, op: Op | None) -> Stored:
    """The same but for whether it is an index, which only the operation that reads the constant says."""
    is_index = _only_says_where(stored, value, op)
    return stored if is_index == stored.is_index else replace(stored, is_index=is_index)


def _only_says_where(stored: Stored, value: Value, op: Op | None) -> bool:
    """Whether what is stored to have a constant only says where values go, for the operation that reads the constant.

    An index into another constant is a code of a codebook, unless what was looked up is added, as the bias of a
    relative position, and is no factor of a product. A mask may be multiplied by, but not in a dot product. *(ours)*
    """
    if op is None:
        return False
    if stored.is_index:
        return stored.value is through_views(value) or _is_added(value, op)
    return stored.value.dtype == torch.bool and op.name in _MASKS


_MASKS = frozenset(f"aten.{name}" for name in ("bitwise_and", "bitwise_or", "logical_and", "logical_or", "mul"))
"""Operations of which a boolean input keeps some elements."""


_CHOOSES = frozenset((*_MASKS, "aten.where"))
_SUMS = frozenset(f"aten.{name}" for name in ("sum", "mean", "cumsum", "avg_pool2d", "_adaptive_avg_pool2d"))


def _chooses_summands(op: Op, trace: Trace) -> bool:
    """Whether a boolean constant says which elements of an activation go into which of several sums.

    That is a matrix of weights of 1 bit, though nobody writes a dot product. A mask has one place for each element.
    """
    if op.name not in _CHOOSES or not any(v.is_constant and v.dtype == torch.bool for v in op.inputs):
        return False
    if not any(_is_repeated(v, op.out) for v in op.inputs):
        return False
    value = op.out
    while len(readers := trace.users.get(value, [])) == 1 and keeps_width(readers[0]):
        value = readers[0].out
    return any(reader.name in _SUMS for reader in readers)


def _is_repeated(value: Value, out: Value) -> bool:
    """Whether `out` has several elements for one of an activation, which may have been expanded before."""
    if value.is_constant:
        return False
    while (op := value.producer) is not None and keeps_width(op) and value.numel >= out.numel:
        moved = data_inputs(op)
        if len(moved) != 1:
            break
        (value,) = moved
    return value.numel < out.numel


def _is_added(value: Value, op: Op) -> bool:
    added = op.args[ADDENDS[op.name]] if op.name in ADDENDS else None
    return op.name in ("aten.add", "aten.sub", "aten.rsub") or (added is value and op.inputs.count(value) == 1)


def _moved_from(use: _Use) -> list[_Use]:
    """The constants that one is moved from; none where it is stored as itself."""
    value = through_views(use[0])
    producer = value.producer
    if producer is None or not moves(producer) or producer.name in FILLS or not producer.inputs:
        return []  # made of other values, or of numbers
    if _costs_nothing(value) or _codes_of(value, constant_grid(value)) is not None:
        return []
    return [(source, producer) for source in producer.inputs if source.is_constant]


def _codes_of(value: Value, grid: Grid | None) -> Value | None:
    """The codes that a constant on a grid is made of, which are stored in its place."""
    return grid.codes if grid is not None and grid.codes is not value else None


def _sources_of(use: _Use, found: list[list[_Source]]) -> list[_Source]:
    """What has to be stored for one constant; `found` is that for what it is moved from."""
    value, op = through_views(use[0]), use[1]
    if _costs_nothing(value):
        return []
    grid = constant_grid(value)
    if grid is not None and (codes := _codes_of(value, grid)) is not None:
        parts = [v for v in (*grid.scales, *grid.zero_points) if isinstance(v, Value) and v.is_constant]
        sides: list[_Source] = [
            (v, _side(v, grid), None)
            for v in map(through_views, parts)
            if v.data is None or v.data.is_meta or v.data.any()
        ]
        sides += [(stored.value, stored, None) for stored in _scales_in_code(grid)]
        return [(codes, _stored(codes, op, grid, value), None), *sides]
    itself = _stored(value, op, grid)
    producer = value.producer
    if producer is None or not found:
        return [(value, itself, None)]
    moved = {s[0]: s for sources in (*found, _written_numbers(producer)) for s in sources}
    if not moved:
        return [] if _counts(value) else [(value, itself, None)]  # a pattern made of nothing
    chosen = _chooses(producer, found)
    if not chosen and itself.bits().total >= sum(s.bits().total for _, s, _ in moved.values()):
        return list(moved.values())
    if chosen or len(moved) != 1:
        return [(value, itself, None)]
    (source, whole, further) = next(iter(moved.values()))
    return [(value, itself, further or (source, whole))]


_JOINS = frozenset(
    f"aten.{name}" for name in ("block_diag", "cat", "diagonal_scatter", "select_scatter", "slice_scatter", "stack")
)
"""Moves that put tensors together at places that the model's code gives as numbers."""


def _chooses(op: Op, found: list[list[_Source]]) -> bool:
    """Whether an operation puts together pieces of which the code, which is stored nowhere, chooses one for each place.

    So are weights written into the code: pieces that cost nothing, parts of a table, one piece at several places among
    others. Tensors that are whole and each there once are no choice, nor is one that is repeated.
    """
    if op.name not in _JOINS or len(set(op.inputs)) == 1:
        return False
    pieces = [source for sources in found for source in sources if not source[1].is_overhead]
    is_part = any(origin is not None for _, _, origin in pieces)
    return is_part or not all(found) or len({value for value, _, _ in pieces}) < len(pieces)


def _numbers(op: Op | None) -> list[tuple[Hashable, Stored]]:
    """The numbers in the model's code that tensors are multiplied by, added to, converted or written into with.

    Powers of two are shifts: as a factor they take nothing, as a scale an exponent of 8 bits.
    """
    if op is None:
        return []
    if is_conversion(op) and op.name != FIXED_POINT_OP:
        return [(stored.value, stored) for stored in _scales_in_code(grid_of(op))]
    of_sums = [float(op.kwargs.get(name, 1)) for name in ("alpha", "beta")] if op.name in ADDENDS else []
    found = [n for n in (*numbers(op), *of_sums, written_number(op) or 0.0) if number_width(n) > 1]
    return [(n, _in_code(f"number {n!r}", torch.tensor(float(n)), Plain("float32"))) for n in found]


def _written_numbers(op: Op) -> list[_Source]:
    """The number that a move writes between constants, counted as one that tensors are multiplied by."""
    if (number := written_number(op)) is None:
        return []
    stored = _number(number)
    return [(stored.value, stored, None)]


@cache
def _number(number: float) -> Stored:
    """The same for the same number, so that it is stored once."""
    return _in_code(f"number {number!r}", torch.tensor(number), Plain("float32"))


def _in_code(name: str, tensor: Tensor, number_format: Format, is_overhead: bool = False) -> Stored:
    return Stored(name, constant(tensor), number_format, is_overhead, in_code=True)


def _permutation(op: Op | None) -> list[tuple[Hashable, Stored]]:
    """The places that a permutation of n elements takes them from, ceil(log2 n) bits each."""
    order = permutation_of(op) if op is not None else ()
    if not order:
        return []
    places = Integer(index_bits(len(order)), False, "int64")
    name = f"permutation of {len(order):,}"
    return [(("permutation", order), _in_code(name, torch.tensor(order), places, is_overhead=True))]


def _scales_in_code(grid: Grid) -> list[Stored]:
    """The scales and zero points that a conversion has as numbers; those that are equal are stored once."""
    zeros = [int(zero) for zero in grid.zero_points if not isinstance(zero, Value) and zero]
    return [
        *(_scale(float(scale)) for scale in grid.scales if not isinstance(scale, Value)),
        *(_zero_point(zero, _format_of_zeros(grid, (zero, zero), Plain("int64"))) for zero in zeros),
    ]


@cache
def _scale(scale: float) -> Stored:
    """The same for the same number; of a power of two its exponent."""
    exponent = exponent_of_shift(scale)
    tensor = torch.tensor(scale) if exponent is None else torch.tensor(exponent, dtype=torch.int8)
    return _in_code(f"scale {scale!r}", tensor, Plain.of(tensor.dtype), is_overhead=True)


@cache
def _zero_point(zero: int, number_format: Integer) -> Stored:
    return _in_code(f"zero point {zero}", torch.tensor(zero), number_format, is_overhead=True)


def _costs_nothing(value: Value) -> bool:
    """Whether the model's code makes `value` from nothing, as a fill or a counter: it holds nothing of the model."""
    if not _is_made(value):
        return False
    if value.producer is not None and value.producer.name == "aten.arange":
        start, step = value.producer.named.get("start", 0), value.producer.named.get("step", 1)
        if number_width(float(start)) == number_width(float(step)) == 1:
            return True
    is_fill = value.producer is not None and (not value.producer.inputs or value.producer.name in FILLS)
    if not is_fill or value.counter is None or not value.numel:
        return False
    least, greatest, _ = value.counter
    return least == greatest and number_width(least) == 1


def _counts(value: Value) -> bool:
    """Whether a constant is a counter seen from any side, or one number everywhere, of numbers that say nothing."""
    if value.counter is None:
        return False
    least, greatest, step = value.counter
    return 1 in (number_width(least), number_width(greatest)) and number_width(step) == 1


def _is_made(value: Value) -> bool:
    return not _names(value)


class _Alike:
    """One representative for values that are computed alike from the same parameters: a layer that is used twice."""

    def __init__(self) -> None:
        self.found: dict[Value, Value] = {}
        self.made: dict[Hashable, Value] = {}

    def __call__(self, value: Value) -> Value:
        waiting = [value]
        while waiting:
            last, op = waiting[-1], waiting[-1].producer
            if op is None or op.func is None or torch.Tag.nondeterministic_seeded in getattr(op.func, "tags", ()):
                self.found[last] = last  # numbers that are drawn twice are others
            elif missing := [source for source in op.inputs if source not in self.found]:
                waiting += missing
                continue
            else:
                arguments = tree_map(lambda a: self.found[a] if isinstance(a, Value) else a, (op.args, op.kwargs))
                self.found[last] = self.made.setdefault((op.name, hashable(arguments), op.outputs.index(last)), last)
            waiting.pop()
        return self.found[value]


def _names(value: Value) -> list[str]:
    """The names of the parameters, buffers and constants that `value` is computed from."""
    return [leaf.name for leaf in value.leaves() if leaf.name]


def _stored(value: Value, op: Op | None, grid: Grid | None = None, made: Value | None = None) -> Stored:
    """`value` in the format of its `grid`; where it holds codes, `made` is what is made of them.

    A ternary weight is 1 bit a sign behind a bitmask, or 2 bits a code behind a mask of blocks, as is smaller.
    """
    leaves = _names(value)
    name = _path(leaves) if leaves else f"constant of {op.name if op is not None else 'the output'}"
    exponent = is_conversion(op) and op is not None and value is not through_views(op.inputs[0])
    if exponent:
        return Stored(name, value, _side_format(value, grid_of(op)), is_overhead=True, in_code=not leaves)  # type: ignore[arg-type]
    index = op is not None and not value.dtype.is_floating_point and value in map(through_views, _places(op))
    try:
        number_format = _declared_format(value, grid, index)
    except OffGrid as error:
        raise InputError(f"{name!r} cannot be stored: {error}") from error
    codes = Stored(name, value, number_format, False, index, in_code=not leaves)
    if grid is None or isinstance(number_format, Codebook | Plain) or not has_only_signs(made or value, grid):
        return codes
    return min(replace(codes, format=Signs(number_format)), codes, key=lambda stored: stored.bits().total)


def _places(op: Op) -> list[Value]:
    """What says from where, or whereto, an operation moves values."""
    if op.name not in FREE:
        return []
    named = [op.named.get(name) for name in ("index", "indices", "mask", "condition", "repeats")]
    return [item for item in tree_flatten(named)[0] if isinstance(item, Value)]


def _side(value: Value, grid: Grid) -> Stored:
    leaves = _names(value)
    name = _path(leaves) if leaves else "constant"
    return Stored(name, value, _side_format(value, grid), is_overhead=True, in_code=not leaves)


def _side_format(value: Value, grid: Grid) -> Format:
    """A scale as it is; a zero point, which is a code, at the bits of one, or at those that its own numbers take."""
    if value.dtype.is_floating_point or value not in map(through_views, _values(grid.zero_points)):
        return Plain.of(value.dtype)
    return _format_of_zeros(grid, value.extent or (0, 0), Plain.of(value.dtype))


def _format_of_zeros(grid: Grid, extent: tuple[int, int], dtype: Plain) -> Integer:
    """Zero points are codes; where codes are only read, nothing keeps them from being wider."""
    low, high = min(grid.low, extent[0]), max(grid.high, extent[1])
    return Integer(min(bits_of_range(low, high), dtype.code_bits), low < 0, dtype.name)


def _values(items: Iterable[object]) -> Iterator[Value]:
    return (item for item in items if isinstance(item, Value))


def _path(leaves: list[str]) -> str:
    """The name that a parameter has in the model, without parametrizations and masks around it."""
    name = leaves[0].replace("parametrizations.", "").removesuffix(".original")
    base = name.removesuffix("_orig")  # torch.nn.utils.prune
    return base if f"{base}_mask" in leaves else name


def _declared_format(value: Value, grid: Grid | None, index: bool) -> Format:
    """The format of a stored constant as its grid says."""
    op, data = value.producer, value.data
    assert data is not None
    if is_conversion(op) and op is not None:
        return _format_of_conversion(op)
    if index and not data.is_meta and data.numel() and value.dtype != torch.bool and int(data.min()) >= 0:
        return Integer(index_bits(int(data.max()) + 1), False, Plain.of(value.dtype).name)
    if grid is None:
        return Plain.of(value.dtype) if value.bits is None else _integer(value, value.bits)
    if value.dtype.is_floating_point:
        return Plain.of(value.dtype) if value.dtype in FLOAT8 else FixedPoint(max(2, grid.code_bits), 0)
    return _integer(value, grid.code_bits)


def _integer(value: Value, bits: int) -> Format:
    return Integer(bits, value.dtype.is_signed, Plain.of(value.dtype).name)


def _format_of_conversion(op: Op) -> Format:
    """The format that a conversion gives. What has no values (on the meta device) reads as 0, a scale as no shift."""
    if op.name == FIXED_POINT_OP:
        exponent = values_of(op.named["exponent"])
        return FixedPoint(op.named["bits"], int(exponent[0]) if exponent else 0)
    if op.name == CODEBOOK_OP:
        table = op.named["table"]
        return Codebook(torch.zeros(table.shape, dtype=table.dtype) if table.data.is_meta else table.data)
    grid = grid_of(op)
    (scale,), (zero,) = grid.scales, grid.zero_points
    count = scale.numel if isinstance(scale, Value) else 1
    scales = torch.tensor(values_of(scale) or [_UNKNOWN] * count, dtype=torch.float32)
    zeros = torch.tensor(values_of(zero) or [0] * count, dtype=torch.int64)
    return Affine(grid.low, grid.high, grid.blocks, scales, zeros.expand(count) if bool(zeros.any()) else None)
