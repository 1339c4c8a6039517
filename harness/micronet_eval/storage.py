"""What a model has to store: the constants that its operations use, each at the bits of its format.

A tensor is stored dense, or sparse as its non-zero values plus a bitmask of 1 bit an element, whichever is smaller.
`packing` writes exactly these bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.utils._pytree import tree_map

from micronet_eval.costs import FREE
from micronet_eval.formats import FIXED_POINT_OP, Format, Plain
from micronet_eval.precision import data_inputs, fixed_point_format, quantizing_op
from micronet_eval.trace import Op, Trace, Value

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
    """One tensor that has to be stored. `is_overhead` marks what belongs to a format (an activation's exponent)."""

    name: str
    tensor: Tensor
    format: Format
    is_overhead: bool = False

    @property
    def elements(self) -> int:
        return self.tensor.numel()

    @cached_property
    def nonzeros(self) -> int:
        """Elements that are not zero; all of them where there are no values (on the meta device)."""
        return self.elements if self.tensor.device.type == "meta" else int(self.tensor.count_nonzero())

    def bits(self, widest: int = 64) -> Bits:
        """What the tensor takes when no value takes more than `widest` bits (the freebie's 16)."""
        width = min(self.format.code_bits, widest)
        if self.is_overhead:
            return Bits(0, 0, self.elements * width)
        overhead = 8 * len(self.format.overhead)
        if self.is_sparse(width):
            return Bits(self.nonzeros * width, self.elements, overhead)
        return Bits(self.elements * width, 0, overhead)

    def is_sparse(self, width: int) -> bool:
        """Whether non-zero values of `width` bits with a bitmask are smaller than all values."""
        return self.nonzeros * width + self.elements < self.elements * width


def stored_tensors(trace: Trace) -> dict[Stored, Op]:
    """Every stored tensor once, with the operation that uses it first, in order of use."""
    seen: set[Hashable] = set()
    stored: dict[Stored, Op] = {}
    for op in trace.ops:
        for value in _constants(op):
            for source, tensor in _sources(value, op):
                if (key := _identity(source)) not in seen:
                    seen.add(key)
                    stored[tensor] = op
    return stored


def without_values(trace: Trace) -> set[str]:
    """Names of the parameters that operations use although they have no values (they lie on the meta device)."""
    used = (v for op in trace.ops for v in op.inputs if v.data is not None and v.data.is_meta)
    return {leaf.name or "" for value in used for leaf in _leaves(value)}


def freebie_applies(stored: dict[Stored, Op], trace: Trace) -> bool:
    """Whether nothing is quantized below 16 bits, so that parameters and multiplications may count as 16 bit."""
    narrow_weight = any(s.format.code_bits < FREEBIE_BITS for s in stored if not s.is_overhead)
    return not narrow_weight and not any(op.name == FIXED_POINT_OP and op.args[2] < FREEBIE_BITS for op in trace.ops)


def _constants(op: Op) -> Iterator[Value]:
    inputs = op.inputs
    if op.name in ("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training"):
        # In evaluation the running statistics merge into weight and bias: two values a channel are stored.
        affine = tuple(v for v in op.args[1:3] if isinstance(v, Value))
        inputs = affine if len(affine) == 2 else tuple(v for v in op.args[3:5] if isinstance(v, Value))
    yield from (v for v in inputs if v.is_constant)


def _sources(value: Value, op: Op) -> list[tuple[Value, Stored]]:
    """What has to be stored to have the constant `value`: itself, or what it is computed from, whichever is smaller."""
    value = through_views(value)
    itself = (value, _stored(value, op))
    if value.producer is None or quantizing_op(value) is not None:
        return [itself]
    leaves = [(leaf, _stored(leaf, op)) for leaf in _leaves(value)]
    computed = sum(s.bits().total for _, s in leaves)
    return [itself] if itself[1].bits().total <= computed else leaves


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


def through_views(value: Value) -> Value:
    """The tensor that `value` is a view or a copy of."""
    while (op := value.producer) is not None and op.name in FREE and op.name != FIXED_POINT_OP:
        inputs = data_inputs(op)
        if len(inputs) != 1 or inputs[0].numel != value.numel:
            break
        value = inputs[0]
    return value


def _leaves(value: Value) -> dict[Value, None]:
    """The parameters, buffers and constants of the model that `value` is computed from, in order."""
    if value.producer is None:
        return {value: None}
    return {leaf: None for source in value.producer.inputs if source.is_constant for leaf in _leaves(source)}


def _stored(value: Value, op: Op) -> Stored:
    assert value.data is not None
    leaves = [leaf.name for leaf in _leaves(value) if leaf.name]
    name = leaves[0].replace("parametrizations.", "").removesuffix(".original") if leaves else f"constant of {op.name}"
    quantizer = quantizing_op(value)
    if quantizer is not None:
        return Stored(name, value.data, fixed_point_format(quantizer))
    exponent_of_activation = op.name == FIXED_POINT_OP and value is through_views(op.args[1])
    return Stored(name, value.data, Plain.of(value.dtype), is_overhead=exponent_of_activation)
