"""The MicroNet score of a traced model: storage and math relative to a task's baseline. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch.utils._pytree import tree_map

from micronet_eval.costs import FREE, Cost, Formula, cost_of
from micronet_eval.formats import Plain
from micronet_eval.precision import bit_widths, factor_widths
from micronet_eval.storage import FREEBIE_BITS, Stored, freebie_applies, stored_tensors
from micronet_eval.trace import Op, Trace, Value


@dataclass(frozen=True)
class Layer:
    """One priced operation. `ops32` is its cost in 32-bit operations, `storage_bits` what it is the first to use."""

    module: str
    op: str
    mults: int
    adds: int
    input_bits: int
    weight_bits: int
    ops32: float
    storage_bits: int


@dataclass(frozen=True)
class Module:
    """What one module itself costs in three steps: dense at 32 bits, then sparse, then at its bit-widths.

    `ops32` and `bits` are the real ones. Where a zero weight costs nothing, `sparse_ops` are fewer than `dense_ops`;
    `sparse_bits` are 32-bit values, with a mask where that is smaller.
    """

    module: str
    dense_ops: int
    sparse_ops: int
    ops32: float
    dense_bits: int
    sparse_bits: int
    bits: int


@dataclass(frozen=True)
class Storage:
    """What is stored. `parameters` counts all values, zeros included; `params32` is bits / 32.

    `file_bytes` is the size of the packed file, where the model comes from one.
    """

    parameters: int
    nonzeros: int
    bits: int
    value_bits: int
    mask_bits: int
    overhead_bits: int
    params32: float
    file_bytes: int | None = None


@dataclass(frozen=True)
class Math:
    """Operations for one example. `ops32` weighs each by its bit-width / 32; `macs` are those of dot products."""

    mults: int
    adds: int
    ops32: float
    mult_ops32: float
    add_ops32: float
    macs: int


@dataclass(frozen=True)
class Coverage:
    """How many operations ran, how many have a price, and why the others are free; `folded` ran on parameters alone."""

    executed: int
    priced: int
    free: dict[str, str]
    folded: int


@dataclass(frozen=True)
class Priced:
    """An operation with its cost, the widest activation and constant that go in (0: none), and its weighted cost."""

    op: Op
    cost: Cost
    input_bits: int
    weight_bits: int
    mult_ops32: Fraction
    add_ops32: Fraction

    @property
    def ops32(self) -> Fraction:
        return self.mult_ops32 + self.add_ops32


@dataclass(frozen=True)
class Account:
    """What a model costs by the rules, before any baseline. `freebie` says that it counts as 16 bit.

    `operations` are what `layers` show, and `stored` the tensors behind `storage`, each with the first to use it.
    """

    storage: Storage
    math: Math
    layers: tuple[Layer, ...]
    modules: tuple[Module, ...]
    coverage: Coverage
    freebie: bool
    operations: tuple[Priced, ...] = field(repr=False)
    stored: Mapping[Stored, Op] = field(repr=False)


@dataclass(frozen=True)
class Score:
    """Storage and math as shares of the baseline's; `total` is their sum, the lower the better."""

    storage: float
    math: float
    total: float


def account(trace: Trace, formulas: Mapping[str, Formula], freebie: bool = True) -> Account:
    """Counts a trace of one example. `freebie=False` counts what is stored and computed as it is, at up to 32 bits.

    Raises NoFormula where an operation has no price.
    """
    stored = stored_tensors(trace)
    freebie = freebie and freebie_applies(stored, trace)
    widest = FREEBIE_BITS if freebie else 64
    bits = {s: s.bits(widest) for s in stored}
    bits_of_op: Counter[Op] = Counter()
    for tensor, op in stored.items():
        bits_of_op[op] += bits[tensor].total
    values = [s for s in stored if not s.is_overhead]
    total_bits = sum(b.total for b in bits.values())
    storage = Storage(
        parameters=sum(s.elements for s in values),
        nonzeros=sum(s.nonzeros for s in values),
        bits=total_bits,
        value_bits=sum(b.values for b in bits.values()),
        mask_bits=sum(b.mask for b in bits.values()),
        overhead_bits=sum(b.overhead for b in bits.values()),
        params32=total_bits / 32,
    )
    widths = bit_widths(trace)
    operations: list[Priced] = []
    free: dict[str, str] = {}
    for op in trace.ops:
        cost = cost_of(op, formulas)
        if cost is None:
            free[op.name] = FREE[op.name]
            continue
        inputs, weights = factor_widths(op, widths)
        operations.append(Priced(op, cost, inputs, weights, *weighted(cost, max(inputs, weights), freebie)))
    mult_ops32 = sum((p.mult_ops32 for p in operations), Fraction(0))
    add_ops32 = sum((p.add_ops32 for p in operations), Fraction(0))
    math = Math(
        mults=sum(p.cost.mults for p in operations),
        adds=sum(p.cost.all_adds for p in operations),
        ops32=float(mult_ops32 + add_ops32),
        mult_ops32=float(mult_ops32),
        add_ops32=float(add_ops32),
        macs=sum(p.cost.macs for p in operations),
    )
    layers = tuple(
        Layer(
            p.op.module, p.op.name, p.cost.mults, p.cost.all_adds, p.input_bits, p.weight_bits, float(p.ops32),
            bits_of_op[p.op],
        )
        for p in operations
    )  # fmt: skip
    coverage = Coverage(len(trace.ops) + trace.folded, len(operations), dict(sorted(free.items())), trace.folded)
    modules = _by_module(trace, operations, stored, bits_of_op, formulas)
    return Account(storage, math, layers, modules, coverage, freebie, tuple(operations), stored)


def _by_module(
    trace: Trace,
    operations: list[Priced],
    stored: Mapping[Stored, Op],
    bits_of_op: Mapping[Op, int],
    formulas: Mapping[str, Formula],
) -> tuple[Module, ...]:
    """The cost of each module in steps, in order of execution; what neither computes nor stores is left out."""
    dense_ops, sparse_ops, dense_bits, sparse_bits, bits = (Counter[str]() for _ in range(5))
    ops32: dict[str, Fraction] = {}
    for p in operations:
        path, all_weights = p.op.module, cost_of(dense(p.op), formulas) or p.cost
        dense_ops[path] += all_weights.mults + all_weights.all_adds
        sparse_ops[path] += p.cost.mults + p.cost.all_adds
        ops32[path] = ops32.get(path, Fraction(0)) + p.ops32
    for tensor, op in stored.items():
        if not tensor.is_overhead:
            dense_bits[op.module] += 32 * tensor.elements
            sparse_bits[op.module] += replace(tensor, format=Plain("float32")).bits().total
    for op, total in bits_of_op.items():
        bits[op.module] += total
    paths = dict.fromkeys(op.module for op in trace.ops)
    return tuple(
        Module(m, dense_ops[m], sparse_ops[m], float(ops32.get(m, 0)), dense_bits[m], sparse_bits[m], bits[m])
        for m in paths
        if m in ops32 or m in bits
    )


def dense(op: Op) -> Op:
    """The same operation on constants without values, all of which formulas count as not zero."""

    def unknown(item: object) -> object:
        if not isinstance(item, Value) or item.data is None:
            return item
        return replace(item, data=torch.empty_like(item.data, device="meta"))

    return Op(op.name, op.module, tree_map(unknown, op.args), tree_map(unknown, op.kwargs), op.outputs)


def weighted(cost: Cost, width: int, freebie: bool = False) -> tuple[Fraction, Fraction]:
    """Multiplications and additions in 32-bit operations, exactly, for inputs of at most `width` bits.

    An operation counts width / 32, never more than 1. Accumulating additions count 1. With the freebie
    multiplications count at most 16 / 32 and all additions 1.
    """
    mult_width = min(width, FREEBIE_BITS if freebie else 32)
    add_width = 32 if freebie else min(width, 32)
    return Fraction(cost.mults * mult_width, 32), Fraction(cost.adds * add_width, 32) + cost.accumulations


def score(account: Account, baseline_storage: float, baseline_math: float) -> Score:
    """The MicroNet score; the baseline in 32-bit parameters and 32-bit operations."""
    storage = account.storage.params32 / baseline_storage
    math = account.math.ops32 / baseline_math
    return Score(storage, math, storage + math)
