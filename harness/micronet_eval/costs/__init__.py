"""What each operation costs: one small function per kind of operation, from its record to a Cost.

The rules are those of the MicroNet Challenge (docs/scoring.md); a formula that the rules leave open is marked (ours).
An operation that is neither in FORMULAS nor in FREE nor added by a plugin is an error, never a silent zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from micronet_eval.costs import dot_products, norms, reductions, resampling, scales
from micronet_eval.costs import elementwise as by_element
from micronet_eval.costs.cost import Cost, Formula, NoFormula
from micronet_eval.costs.dot_products import ADDENDS
from micronet_eval.costs.elementwise import elementwise
from micronet_eval.costs.moves import FREE, VIEW, permutation, permutation_of, permutes
from micronet_eval.costs.scales import SCALE_OP
from micronet_eval.trace import Op

FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        **dot_products.FORMULAS,
        **by_element.FORMULAS,
        **reductions.FORMULAS,
        **norms.FORMULAS,
        **resampling.FORMULAS,
        **scales.FORMULAS,
        "aten.channel_shuffle": permutation,
        "aten.native_channel_shuffle": permutation,
    }
)
"""Operation -> what it costs."""

SELECTS = frozenset(
    f"aten.{name}"
    for name in (
        "relu", "threshold", "amax", "amin", "max", "min", "maximum", "minimum", "fmax", "fmin", "aminmax", "cummax",
        "cummin", "sort", "topk", "mode", "kthvalue", "max_pool2d_with_indices", "max_pool3d_with_indices",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
        "channel_shuffle", "native_channel_shuffle",
    )
)  # fmt: skip
"""Priced operations whose results are some of their inputs, or zero: the results need no more bits than the inputs."""


def cost_of(op: Op, formulas: Mapping[str, Formula]) -> Cost | None:
    """The cost of `op`, or None where it is declared free. Raises NoFormula where nobody knows."""
    formula = formulas.get(op.name)
    if formula is not None:
        if any(v.dtype.is_complex for v in (*op.inputs, *op.outputs)):
            raise NoFormula(op, "on complex numbers")
        return formula(op) if any(out.numel for out in op.outputs) or not op.outputs else Cost()
    if op.name in FREE:
        return permutation(op) if permutes(op) else None
    raise NoFormula(op)


__all__ = ["ADDENDS", "FORMULAS", "FREE", "SCALE_OP", "SELECTS", "VIEW", "Cost", "Formula", "NoFormula", "cost_of",
           "elementwise", "permutation_of"]  # fmt: skip
