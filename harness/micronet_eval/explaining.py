"""The formula of every operation of a module, with its numbers: how each figure of the report comes about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from micronet_eval import plugins
from micronet_eval.costs import ADDENDS, FREE, Cost, Formula
from micronet_eval.errors import InputError
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.opening import Opened, formulas, open_submission
from micronet_eval.rulesets import DEFAULT
from micronet_eval.rulesets import ruleset as ruleset_of
from micronet_eval.scoring import Account, Priced, dense_cost, weighted
from micronet_eval.storage import FREEBIE_BITS, Bits, Stored
from micronet_eval.trace import Op


@dataclass(frozen=True)
class Explanation:
    """One operation: each of `lines` names a figure and says how it comes about.

    The figures are those of the report's layer, or 0 where the operation is free; `rule` says what the formula counts.
    Where the report counts a mean, over the paths of a conditional model or the tokens of text, they are those of one
    `path`: its `share` of them goes into the report's layer, and all of what is stored.
    """

    module: str
    op: str
    rule: str
    lines: tuple[tuple[str, str], ...]
    mults: int
    adds: int
    ops32: float
    storage_bits: int
    path: str = ""
    share: Fraction | int = 1


def explain(
    submission: str | Path | Opened, module: str = "", ruleset: str = DEFAULT, *, isolation: Isolation = AUTO
) -> tuple[Explanation, ...]:
    """All operations of a submission's module, as `explanations`. Raises InputError that names the submission."""
    ruleset_of(ruleset)  # an unknown one is told before anything is opened
    opened = submission if isinstance(submission, Opened) else open_submission(submission, isolation=isolation)
    counted = opened.account(ruleset)
    try:
        return explanations(counted, module, ruleset)
    except InputError as error:
        raise InputError(f"{opened.folder}: {error}") from error


def explanations(counted: Account, module: str = "", ruleset: str = DEFAULT) -> tuple[Explanation, ...]:
    """All operations of a module and of the modules in it, in order; without a module all of the model.

    Raises InputError where there are none.
    """
    known, ops = formulas(ruleset), counted.trace.ops
    chosen = [op for op in ops if not module or op.module == module or op.module.startswith(f"{module}.")]
    if not chosen:
        raise InputError(plugins.unknown("module", module, dict.fromkeys(op.module for op in ops if op.module)))
    priced = {p.op: p for p in counted.operations}
    shares = {p.op.path: p.share for p in counted.operations} | dict(counted.shares)
    return tuple(_on_path(_explain(op, priced.get(op), counted, known), op.path, shares) for op in chosen)


def _on_path(found: Explanation, path: str, shares: Mapping[str, Fraction | int]) -> Explanation:
    if not path:
        return found
    line = ("path", f"{path}, which has a share of {float(shares[path]):.4g} in the mean of the report")
    return replace(found, lines=(line, *found.lines), path=path, share=shares[path])


def _explain(op: Op, priced: Priced | None, counted: Account, known: Mapping[str, Formula]) -> Explanation:
    widest = FREEBIE_BITS if counted.freebie else 64
    tensors = {tensor: taken for tensor, (user, taken) in counted.stored.items() if user is op}
    stored = [("stored", _storage(tensor, taken, widest)) for tensor, taken in tensors.items()]
    bits = sum(taken.total for taken in tensors.values())
    if len(stored) > 1:
        stored.append(("", f"{' + '.join(f'{taken.total:,}' for taken in tensors.values())} = {bits:,} bits"))
    if priced is None:
        return Explanation(op.module, op.name, f"free: {FREE[op.name]}", tuple(stored), 0, 0, 0.0, bits)
    cost = priced.cost
    lines = _dot_products(priced, dense_cost(priced, known)) or _elements(priced)
    lines += [("bits", _bits(priced, counted.freebie)), ("ops32", _ops32(priced, counted.freebie))]
    rule = " ".join((known[op.name].__doc__ or "").strip().partition("\n\n")[0].split())
    return Explanation(
        op.module, op.name, rule, tuple(lines + stored), cost.mults, cost.all_adds, float(priced.ops32), bits
    )


def _dot_products(priced: Priced, all_weights: Cost) -> list[tuple[str, str]]:
    """By the non-zero weights, the positions that they are used at, and the outputs that have any; else nothing."""
    op, cost = priced.op, priced.cost
    added = op.args[ADDENDS[op.name]] if op.name in ADDENDS else None
    weight = max((v for v in op.inputs if v.is_constant and v is not added), key=lambda v: v.numel, default=None)
    if weight is None or not cost.macs or cost.macs != cost.mults or all_weights.macs % weight.numel:
        return []
    positions = all_weights.macs // weight.numel
    nonzeros, without = cost.macs // positions, cost.mults - cost.all_adds
    if nonzeros * positions != cost.macs or without % positions:
        return []
    shape = "x".join(map(str, weight.shape))
    times = f" x {positions:,} positions" if positions > 1 else ""
    adds = "one fewer an output, one more for its bias"
    if without:
        adds = f"({nonzeros:,} - {without // positions:,} outputs with weights){times}"
    return [
        ("mults", f"{nonzeros:,} non-zero of {weight.numel:,} weights ({shape}){times} = {cost.mults:,}"),
        ("adds", f"{adds} = {cost.all_adds:,}"),
    ]


def _elements(priced: Priced) -> list[tuple[str, str]]:
    """By the elements of the output, as far as they are a multiple."""
    outputs, cost = priced.op.out.numel, priced.cost
    counts = (("mults", cost.mults), ("adds", cost.all_adds))
    return [(name, _times(count, outputs)) for name, count in counts if count]


def _times(count: int, outputs: int) -> str:
    each, rest = divmod(count, outputs) if outputs else (0, count)
    return f"{count:,} in {outputs:,} outputs" if rest else f"{each:,} x {outputs:,} outputs = {count:,}"


def _bits(priced: Priced, freebie: bool) -> str:
    widest = max(priced.input_bits, priced.weight_bits)
    inputs = f"{priced.input_bits} by {priced.weight_bits}" if priced.weight_bits else str(priced.input_bits)
    mult, add = _weights(priced, freebie)
    why = " (freebie)" if freebie and widest > FREEBIE_BITS else ""
    (bits, narrow), (_, wide) = priced.accumulating
    counts = (
        (priced.cost.mults, f"a multiplication counts {mult * 32}/32{why}"),
        (priced.cost.adds, f"an addition counts {add * 32}/32"),
        (narrow, f"an addition in the accumulator counts {bits}/32"),
        (wide, "an accumulating addition counts 32/32"),
    )
    return ": ".join(filter(None, (inputs, ", ".join(text for count, text in counts if count))))


def _weights(priced: Priced, freebie: bool) -> tuple[Fraction, Fraction]:
    """What one multiplication and one element-wise addition count."""
    one = replace(priced.cost, mults=1, adds=1, accumulations=0, macs=0)
    return weighted(one, max(priced.input_bits, priced.weight_bits), freebie)


def _ops32(priced: Priced, freebie: bool) -> str:
    cost = priced.cost
    mult, add = _weights(priced, freebie)
    accumulating = ((n, Fraction(bits, 32)) for bits, n in priced.accumulating)
    counts = ((cost.mults, mult), (cost.adds, add), *accumulating)
    terms = [f"{n:,}" + (f" x {weight * 32}/32" if weight != 1 else "") for n, weight in counts if n]
    return f"{' + '.join(terms) or '0'} = {float(priced.ops32):,.10g}"


def _storage(tensor: Stored, bits: Bits, widest: int) -> str:
    width = min(tensor.format.code_bits, widest)
    if tensor.is_overhead:
        return f"{tensor.name}: {tensor.elements:,} x {width} = {bits.total:,} bits"
    values = tensor.nonzeros if bits.mask else tensor.elements
    what = f"{values:,} non-zero of {tensor.elements:,} values" if bits.mask else f"{values:,} values"
    terms = [f"{what} x {width}"]
    if bits.mask:
        terms.append(f"{bits.mask:,} mask")
    if bits.overhead:
        terms.append(f"{bits.overhead:,} {tensor.format.spec.partition(':')[0]} overhead")
    return f"{tensor.name}: {' + '.join(terms)} = {bits.total:,} bits"
