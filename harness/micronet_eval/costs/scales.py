"""Scales of quantized values that are no powers of two: multiplications that the rules charge for."""

from __future__ import annotations

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.trace import Op

SCALE_OP = "micronet.scale"
"""Written into a trace by `precision.with_scales`: the multiplications by scales that are no powers of two."""


def scale(op: Op) -> Cost:
    """Multiplications by scales, and additions that correct for zero points."""
    return Cost(mults=op.kwargs["mults"], accumulations=op.kwargs["adds"])


def choose_scale(op: Op) -> Cost:
    """Scale and zero point of k elements found while running, for each of the scales. *(ours)*

    Smallest and largest (2 k - 2 comparisons); scale: 1 subtraction, 1 multiplication; zero point: 1 and 1.
    """
    scales = op.out.numel
    return Cost(2 * scales, 2 * (op.inputs[0].numel - scales) + 2 * scales)


FORMULAS: dict[str, Formula] = {
    SCALE_OP: scale,
    **{
        f"quantized_decomposed.{name}": choose_scale
        for name in (
            "choose_qparams", "choose_qparams_symmetric", "choose_qparams_per_token",
            "_choose_qparams_per_token_asymmetric_impl", "choose_qparams_per_token_asymmetric",
        )
    },
}  # fmt: skip
