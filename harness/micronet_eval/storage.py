"""What a model has to store: the constants that its operations use, each at the bits of its format.

A tensor is stored dense, or sparse as its non-zero values plus a bitmask of 1 bit an element, whichever is smaller.
`packing` writes exactly these bits; what the model's code makes by itself counts, too, but is not in the file.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from micronet_eval.costs import FREE
from micronet_eval.formats import FIXED_POINT_OP, FLOAT8, Format, Plain
from micronet_eval.precision import data_inputs, fixed_point_format, number_width, numbers, quantizing_op, through_views
from micronet_eval.trace import WRITE_OP, Op, Trace, Value

FREEBIE_BITS = 16


@dataclass(frozen=True)
class Bits:
    """Bits of one tensor by what they hold."""

    values: int
    mask: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        return self.values + self.mask + self.overhead


@dataclass(frozen=True)
class Stored:
    """One tensor that has to be stored.

    `is_overhead` marks what belongs to a format (an activation's exponent), `is_index` what only says where values go.
    `in_code` marks what the model's code makes from no parameter: a number, a table, random weights.
    """

    name: str
    tensor: Tensor
    format: Format
    is_overhead: bool = False
    is_index: bool = False
    in_code: bool = False

    @property
    def elements(self) -> int:
        return self.tensor.numel()

    @cached_property
    def nonzeros(self) -> int:
        """Elements that are not zero; all of them where there are no values (on the meta device)."""
        if self.tensor.is_meta:
            return self.elements
        # torch has no arithmetic on 8-bit floats
        return int((self.tensor.float() if self.tensor.dtype in FLOAT8 else self.tensor).count_nonzero())

    def bits(self, widest: int = 64) -> Bits:
        """What the tensor takes when no value takes more than `widest` bits (the freebie's 16)."""
        width = min(self.format.code_bits, widest)
        if self.is_overhead:
            return Bits(0, 0, self.elements * width)
        overhead = 8 * len(self.format.overhead)
        if self.in_code and self._is_pattern():
            return Bits(width, self.elements)
        if self.is_sparse(width):
            return Bits(self.nonzeros * width, self.elements, overhead)
        return Bits(self.elements * width, 0, overhead)

    def is_sparse(self, width: int) -> bool:
        """Whether non-zero values of `width` bits with a bitmask are smaller than all values."""
        return self.nonzeros * width + self.elements < self.elements * width

    def _is_pattern(self) -> bool:
        """Whether all values that are not zero are the same, as in the mask of causal attention."""
        values = self.tensor[self.tensor != 0]
        return self.elements > 1 and values.numel() > 0 and bool((values == values[0]).all())


def stored_tensors(trace: Trace) -> dict[Stored, Op | None]:
    """Every stored tensor once, with the operation that uses it first (None: it is returned), in order of use."""
    seen: set[Hashable] = set()
    stored: dict[Stored, Op | None] = {}
    for op in (*trace.ops, None):
        found = [s for value in _constants(op, trace) for s in _sources(value, op)]
        for key, tensor in [(_identity(source), tensor) for source, tensor in found] + _numbers(op):
            if key not in seen:
                seen.add(key)
                stored[tensor] = op
    return stored


def without_values(trace: Trace) -> set[str]:
    """Names of the parameters that operations use although they have no values (they lie on the meta device)."""
    used = (v for op in trace.ops for v in op.inputs if v.data is not None and v.data.is_meta)
    return {leaf.name or "" for value in used for leaf in _leaves(value)}


def freebie_applies(stored: Iterable[Stored], trace: Trace) -> bool:
    """Whether nothing is quantized below 16 bits, so that parameters and multiplications may count as 16 bit."""
    narrow_weight = any(s.format.code_bits < FREEBIE_BITS for s in stored if not (s.is_overhead or s.is_index))
    return not narrow_weight and not any(op.name == FIXED_POINT_OP and op.args[2] < FREEBIE_BITS for op in trace.ops)


def _constants(op: Op | None, trace: Trace) -> Iterator[Value]:
    inputs = trace.outputs if op is None else op.inputs
    if op is not None and op.name in ("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"):
        # In evaluation the running statistics merge into weight and bias: two values a channel are stored.
        affine = tuple(v for v in op.args[1:3] if isinstance(v, Value))
        inputs = affine if len(affine) == 2 else tuple(v for v in op.args[3:5] if isinstance(v, Value))
    elif op is not None and op.name == "aten.copy":
        inputs = data_inputs(op)  # what it overwrites does not matter
    yield from (v for v in inputs if v.is_constant)


def _sources(value: Value, op: Op | None) -> list[tuple[Value, Stored]]:
    """What has to be stored to have the constant `value`: itself, or what it is moved from, whichever is smaller.

    The result of arithmetic on constants is itself what inference needs. *(ours)*
    """
    value = through_views(value)
    if _costs_nothing(value):
        return []
    itself = (value, _stored(value, op))
    producer = value.producer
    if producer is None or producer.name not in FREE or producer.name == WRITE_OP or quantizing_op(value) is not None:
        return [itself]
    moved = dict(s for source in producer.inputs if source.is_constant for s in _sources(source, producer))
    return [itself] if itself[1].bits().total <= sum(s.bits().total for s in moved.values()) else list(moved.items())


def _numbers(op: Op | None) -> list[tuple[Hashable, Stored]]:
    """The numbers in the model's code that tensors are multiplied by or added to. Powers of two are shifts."""
    found = [number for number in (numbers(op) if op is not None else ()) if number_width(number) > 1]
    return [(n, Stored(f"number {n!r}", torch.tensor(float(n)), Plain("float32"), in_code=True)) for n in found]


def _costs_nothing(value: Value) -> bool:
    """Whether the model's code makes `value` from nothing, as a fill or a counter: it holds nothing of the model."""
    if not _is_made(value):
        return False
    if value.producer is not None and value.producer.name == "aten.arange":
        return True
    assert value.data is not None
    return not value.data.is_meta and bool((value.data == value.data.flatten()[:1]).all())


def _is_made(value: Value) -> bool:
    return not any(leaf.name for leaf in _leaves(value))


def _identity(value: Value) -> Hashable:
    """The same for values that are computed alike from the same parameters, as those of a layer that is used twice."""
    op = value.producer
    if op is None:
        return value
    arguments = tree_map(lambda a: _identity(a) if isinstance(a, Value) else a, (op.args, op.kwargs))
    return op.name, _frozen(arguments), op.outputs.index(value)


def _frozen(item: object) -> Hashable:
    if isinstance(item, list | tuple):
        return tuple(map(_frozen, item))
    if isinstance(item, dict):
        return tuple((k, _frozen(v)) for k, v in item.items())
    return item


def _leaves(value: Value) -> dict[Value, None]:
    """The parameters, buffers and constants of the model that `value` is computed from, in order."""
    if value.producer is None:
        return {value: None}
    return {leaf: None for source in value.producer.inputs if source.is_constant for leaf in _leaves(source)}


def _stored(value: Value, op: Op | None) -> Stored:
    assert value.data is not None
    leaves = [leaf.name for leaf in _leaves(value) if leaf.name]
    where = op.name if op is not None else "the output"
    name = leaves[0].replace("parametrizations.", "").removesuffix(".original") if leaves else f"constant of {where}"
    quantizer = quantizing_op(value)
    if quantizer is not None:
        return Stored(name, value.data, fixed_point_format(quantizer), in_code=not leaves)
    exponent_of_activation = op is not None and op.name == FIXED_POINT_OP and value is through_views(op.args[1])
    index = op is not None and op.name in FREE and not value.dtype.is_floating_point
    return Stored(name, value.data, Plain.of(value.dtype), exponent_of_activation, index, in_code=not leaves)
