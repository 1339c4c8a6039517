"""The MicroNet score of a traced model: storage and math relative to a task's baseline. Pure arithmetic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from micronet_eval.costs import FREE, SCALE_OP, Cost, Formula, cost_of
from micronet_eval.dotted import WIDE, WIDEST, Accumulator, accumulators
from micronet_eval.formats import Plain
from micronet_eval.precision import bit_widths, factor_widths, factors_of, with_scales
from micronet_eval.storage import FREEBIE_BITS, Bits, Stored, freebie_applies, stored_tensors
from micronet_eval.trace import Op, Trace, Value, changed

Count = int | float
"""Whole operations; of a conditional model the mean over the examples, which need not be whole."""


@dataclass(frozen=True)
class Layer:
    """One operation. `ops32` is its cost in 32-bit operations, `storage_bits` what it is the first to use.

    `macs` says how many of the multiplications belong to dot products, `accumulator_bits` what those are summed in.
    """

    module: str
    op: str
    mults: Count
    adds: Count
    input_bits: int
    weight_bits: int
    ops32: float
    storage_bits: int
    macs: Count = 0
    accumulator_bits: int = WIDEST


@dataclass(frozen=True)
class Module:
    """What one module itself costs in three steps: dense at 32 bits, then sparse, then at its bit-widths.

    `ops32` and `bits` are the real ones. Where a zero weight costs nothing, `sparse_ops` are fewer than `dense_ops`;
    `sparse_bits` are 32-bit values, with a mask where that is smaller. Scales belong to the bit-widths only.
    """

    module: str
    dense_ops: Count
    sparse_ops: Count
    ops32: float
    dense_bits: int
    sparse_bits: int
    bits: int


@dataclass(frozen=True)
class Storage:
    """What is stored. `parameters` counts all values, zeros included; `params32` is bits / 32.

    `code_bits` are those of `bits` that the model's code makes, and no file holds. `file_bytes` is the size of the
    packed file, where the model comes from one.
    """

    parameters: int
    nonzeros: int
    bits: int
    value_bits: int
    mask_bits: int
    overhead_bits: int
    params32: float
    code_bits: int = 0
    file_bytes: int | None = None


@dataclass(frozen=True)
class Math:
    """Operations for one example. `ops32` weighs each by its bit-width / 32; `macs` are those of dot products."""

    mults: Count
    adds: Count
    ops32: float
    mult_ops32: float
    add_ops32: float
    macs: Count


@dataclass(frozen=True)
class Coverage:
    """How many operations ran, how many have a price, and why the others are free; `folded` ran on parameters alone."""

    executed: int
    priced: int
    free: dict[str, str]
    folded: int


@dataclass(frozen=True)
class Priced:
    """An operation with its cost, the widest activation and constant that go in (0: none), and its weighted cost.

    `mult_bits` and `add_bits` are 32 times the 32-bit operations, so that they are whole numbers. `share` of the
    examples execute it: 1, unless the model is conditional. `accumulator` is what its dot products really run in.
    """

    op: Op
    cost: Cost
    input_bits: int
    weight_bits: int
    mult_bits: int
    add_bits: int
    share: Fraction | int = 1
    accumulator: Accumulator = WIDE

    @property
    def bits(self) -> int:
        return self.mult_bits + self.add_bits

    @property
    def ops32(self) -> Fraction:
        return Fraction(self.bits, 32)

    @property
    def accumulating(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The bits and the number of accumulating additions: those in accumulators of the model's own, all others."""
        return self.accumulator.split(self.cost.accumulations)


@dataclass(frozen=True)
class Account:
    """What a model costs by the rules, before any baseline. `freebie` says that it counts as 16 bit.

    `layers` are the priced operations. `free_layers` are those that cost nothing but are the first to use something
    that is stored: the table of a look-up, the exponent of a quantizer.

    `paths` is what an example costs on each path of a conditional model, and `shares` how many of the examples take
    it; `math` is the mean. Both are empty for other models.

    `trace` is what was counted, scales written into it. `operations` are those of it that `layers` show, and `stored`
    the tensors behind `storage`, each with the first to use it and the bits that it takes. `widths` are the bits of
    every value.
    """

    storage: Storage
    math: Math
    layers: tuple[Layer, ...]
    coverage: Coverage
    freebie: bool
    trace: Trace = field(repr=False, compare=False)
    operations: tuple[Priced, ...] = field(repr=False, compare=False)
    stored: Mapping[Stored, tuple[Op | None, Bits]] = field(repr=False, compare=False)
    free_layers: tuple[Layer, ...] = ()
    paths: Mapping[str, Math] = field(default_factory=dict)
    shares: Mapping[str, Fraction] = field(default_factory=dict)
    widths: Mapping[Value, int] = field(default_factory=dict, repr=False, compare=False)


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
    executed, trace = trace, with_scales(trace)
    used_by = stored_tensors(trace)
    freebie = freebie and freebie_applies(used_by, trace)
    widest = FREEBIE_BITS if freebie else 64
    stored = {tensor: (op, tensor.bits(widest)) for tensor, op in used_by.items()}
    bits_of_op: Counter[Op | None] = Counter()
    for op, bits in stored.values():
        bits_of_op[op] += bits.total
    values = [s for s in stored if not s.is_overhead]
    total_bits = sum(bits_of_op.values())
    storage = Storage(
        parameters=sum(s.elements for s in values),
        nonzeros=sum(s.nonzeros for s in values),
        bits=total_bits,
        value_bits=sum(bits.values for _, bits in stored.values()),
        mask_bits=sum(bits.mask for _, bits in stored.values()),
        overhead_bits=sum(bits.overhead for _, bits in stored.values()),
        params32=total_bits / 32,
        code_bits=sum(bits.total for tensor, (_, bits) in stored.items() if tensor.in_code),
    )
    widths = bit_widths(executed)
    narrow = {} if freebie else accumulators(executed)
    operations: list[Priced] = []
    free: dict[str, str] = {}
    free_layers: list[Layer] = []
    for op in trace.ops:
        cost = cost_of(op, formulas)
        if cost is not None:
            inputs, weights = factor_widths(op, widths)
            own = narrow.get(op, WIDE)
            if own.additions + own.biases != cost.accumulations:  # another ruleset or a plugin counts something else
                own = WIDE
            bits_of_cost = weighted_bits(cost, max(inputs, weights), freebie, own)
            operations.append(Priced(op, cost, inputs, weights, *bits_of_cost, accumulator=own))
            continue
        free[op.name] = FREE[op.name]
        if bits_of_op[op]:
            free_layers.append(Layer(op.module, op.name, 0, 0, 0, 0, 0.0, bits_of_op[op]))
    layers = tuple(
        Layer(
            module=p.op.module,
            op=p.op.name,
            mults=p.cost.mults,
            adds=p.cost.all_adds,
            input_bits=p.input_bits,
            weight_bits=p.weight_bits,
            ops32=p.bits / 32,
            storage_bits=bits_of_op[p.op],
            macs=p.cost.macs,
            accumulator_bits=p.accumulator.bits,
        )
        for p in operations
    )
    return Account(
        storage=storage,
        math=math_of(operations),
        layers=layers,
        coverage=Coverage(len(executed.ops) + trace.folded, len(operations), dict(sorted(free.items())), trace.folded),
        freebie=freebie,
        trace=trace,
        operations=tuple(operations),
        stored=stored,
        widths=widths,
        free_layers=tuple(free_layers),
    )


def math_of(operations: Iterable[Priced]) -> Math:
    """The sums over operations, whatever share of the examples executes them."""
    priced = list(operations)
    mult_bits, add_bits = sum(p.mult_bits for p in priced), sum(p.add_bits for p in priced)
    return Math(
        mults=sum(p.cost.mults for p in priced),
        adds=sum(p.cost.all_adds for p in priced),
        ops32=(mult_bits + add_bits) / 32,
        mult_ops32=mult_bits / 32,
        add_ops32=add_bits / 32,
        macs=sum(p.cost.macs for p in priced),
    )


_FLOAT = Plain("float32")


def by_module(account: Account, formulas: Mapping[str, Formula]) -> tuple[Module, ...]:
    """The cost of each module in steps, in order of execution; what neither computes nor stores is left out."""
    dense_ops, sparse_ops, op_bits = (defaultdict[str, Fraction | int](int) for _ in range(3))
    dense_bits, sparse_bits, bits = (Counter[str]() for _ in range(3))
    for p in account.operations:
        op_bits[p.op.module] += p.bits * p.share
        if p.op.name != SCALE_OP:
            whole = dense_cost(p, formulas)
            dense_ops[p.op.module] += (whole.mults + whole.all_adds) * p.share
            sparse_ops[p.op.module] += (p.cost.mults + p.cost.all_adds) * p.share
    for tensor, (op, taken) in account.stored.items():
        module = op.module if op is not None else ""
        bits[module] += taken.total
        if not tensor.is_overhead:
            dense_bits[module] += 32 * tensor.elements
            sparse_bits[module] += tensor.bits(of=_FLOAT).total
    return tuple(
        Module(
            module=m,
            dense_ops=number(dense_ops.get(m, 0)),
            sparse_ops=number(sparse_ops.get(m, 0)),
            ops32=float(op_bits.get(m, 0) / 32),
            dense_bits=dense_bits[m],
            sparse_bits=sparse_bits[m],
            bits=bits[m],
        )
        for m in dict.fromkeys((*(op.module for op in account.trace.ops), *bits))
        if m in op_bits or m in bits
    )


def dense_cost(priced: Priced, formulas: Mapping[str, Formula]) -> Cost:
    """What an operation costs with every weight counted; nothing is priced again where no weight is zero.

    Zeros in a bias change nothing: it is added to each output whatever it holds.
    """
    if all(not value.is_constant or value.nonzeros == value.numel for value in factors_of(priced.op)):
        return priced.cost
    return cost_of(dense(priced.op), formulas) or priced.cost


def dense(op: Op) -> Op:
    """The same operation on constants without values, all of which formulas count as not zero."""

    def unknown(value: Value) -> Value:
        if value.data is None or value.nonzeros == value.numel:
            return value
        return replace(value, data=torch.empty(value.shape, dtype=value.dtype, device="meta"))

    return replace(op, args=changed(op.args, Value, unknown), kwargs=changed(op.kwargs, Value, unknown))


def number(exact: Fraction | int) -> Count:
    """A whole number as such."""
    return exact.numerator if exact.denominator == 1 else float(exact)


def weighted(cost: Cost, width: int, freebie: bool = False) -> tuple[Fraction, Fraction]:
    """Multiplications and additions in 32-bit operations, exactly, for inputs of at most `width` bits."""
    mult_bits, add_bits = weighted_bits(cost, width, freebie)
    return Fraction(mult_bits, 32), Fraction(add_bits, 32)


def weighted_bits(cost: Cost, width: int, freebie: bool = False, accumulator: Accumulator = WIDE) -> tuple[int, int]:
    """Multiplications and additions, each times the bits that it counts, for inputs of at most `width` bits.

    An operation counts width / 32, never more than 1. Accumulating additions count 1, those in a narrower accumulator
    its bits / 32. With the freebie multiplications count at most 16 / 32 and all additions 1.
    """
    mult_width = min(width, FREEBIE_BITS if freebie else 32)
    add_width = 32 if freebie else min(width, 32)
    accumulating = sum(bits * n for bits, n in accumulator.split(cost.accumulations))
    return cost.mults * mult_width, cost.adds * add_width + accumulating


def score(account: Account, baseline_storage: float, baseline_math: float) -> Score:
    """The MicroNet score; the baseline in 32-bit parameters and 32-bit operations."""
    storage = account.storage.params32 / baseline_storage
    math = account.math.ops32 / baseline_math
    return Score(storage, math, storage + math)
