"""The MicroNet score of a traced model: storage and math relative to a task's baseline. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from micronet_eval.costs import FREE, Cost, Formula, cost_of
from micronet_eval.precision import bit_widths, factor_widths
from micronet_eval.storage import FREEBIE_BITS, freebie_applies, stored_tensors
from micronet_eval.trace import Op, Trace

RULESET = "micronet-2019"


@dataclass(frozen=True)
class Layer:
    """One priced operation. `ops32` is its cost in 32-bit operations, `storage_bits` what it is the first to use."""

    module: str
    op: str
    mults: int | float
    adds: int | float
    input_bits: int
    weight_bits: int
    ops32: float
    storage_bits: int


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
    """Operations for one example. `ops32` weighs each by its bit-width / 32; `macs` are those of dot products.

    Counts are whole numbers, but for a mean over positions or paths.
    """

    mults: int | float
    adds: int | float
    ops32: float
    mult_ops32: float
    add_ops32: float
    macs: int | float


@dataclass(frozen=True)
class Coverage:
    """How many operations ran, how many have a price, and why the others are free; `folded` ran on parameters alone."""

    executed: int
    priced: int
    free: dict[str, str]
    folded: int


@dataclass(frozen=True)
class Account:
    """What a model costs by the rules, before any baseline. `freebie` says that it counts as 16 bit."""

    storage: Storage
    math: Math
    layers: tuple[Layer, ...]
    coverage: Coverage
    freebie: bool


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
    bits_of_op: Counter[Op | None] = Counter()
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
        code_bits=sum(b.total for s, b in bits.items() if s.in_code),
    )
    widths = bit_widths(trace)
    priced: list[tuple[Op, Cost, Layer, Fraction, Fraction]] = []
    free: dict[str, str] = {}
    for op in trace.ops:
        cost = cost_of(op, formulas)
        if cost is None:
            free[op.name] = FREE[op.name]
            continue
        inputs, weights = factor_widths(op, widths)
        mult_ops, add_ops = weighted(cost, max(inputs, weights), freebie)
        layer = Layer(
            op.module, op.name, cost.mults, cost.all_adds, inputs, weights, float(mult_ops + add_ops), bits_of_op[op]
        )
        priced.append((op, cost, layer, mult_ops, add_ops))
    mult_ops32 = sum((m for *_, m, _ in priced), Fraction(0))
    add_ops32 = sum((a for *_, a in priced), Fraction(0))
    math = Math(
        mults=sum(cost.mults for _, cost, *_ in priced),
        adds=sum(cost.all_adds for _, cost, *_ in priced),
        ops32=float(mult_ops32 + add_ops32),
        mult_ops32=float(mult_ops32),
        add_ops32=float(add_ops32),
        macs=sum(cost.macs for _, cost, *_ in priced),
    )
    layers = tuple(layer for _, _, layer, _, _ in priced)
    coverage = Coverage(len(trace.ops) + trace.folded, len(priced), dict(sorted(free.items())), trace.folded)
    return Account(storage, math, layers, coverage, freebie)


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
