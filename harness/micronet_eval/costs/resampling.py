"""Pooling, interpolation and sampling: elements of the output from windows of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.trace import Op


def max_pool(op: Op) -> Cost:
    """Over k elements: k - 1 comparisons, counted as additions. A window over the border counts in full. *(ours)*"""
    return Cost(adds=op.out.numel * (_kernel(op) - 1))


def avg_pool(op: Op) -> Cost:
    """Over k elements: k - 1 additions and 1 multiplication. A window over the border counts in full."""
    return Cost(mults=op.out.numel, accumulations=op.out.numel * (_kernel(op) - 1))


def _kernel(op: Op) -> int:
    """Elements of a window; a single size stands for both (or all three) dimensions."""
    sizes: Sequence[int] = op.args[1]
    dimensions = 3 if "pool3d" in op.name else 2
    return math.prod(sizes) if len(sizes) > 1 else int(sizes[0] ** dimensions)


def adaptive_avg_pool(op: Op) -> Cost:
    """As average pooling, with the windows of `adaptive_elements`."""
    return Cost(mults=op.out.numel, accumulations=adaptive_elements(op) - op.out.numel)


def adaptive_max_pool(op: Op) -> Cost:
    """As maximum pooling, with the windows of `adaptive_elements`. *(ours)*"""
    return Cost(adds=adaptive_elements(op) - op.out.numel)


def adaptive_elements(op: Op) -> int:
    """Elements in all windows: that of output i of o over n inputs goes from floor(i n / o) to ceil((i + 1) n / o)."""
    outputs: Sequence[int] = op.args[1]
    sizes = op.inputs[0].shape[-len(outputs) :]
    channels = op.out.numel // math.prod(outputs)
    return channels * math.prod(
        sum(-(-(i + 1) * n // o) - i * n // o for i in range(o)) for n, o in zip(sizes, outputs, strict=True)
    )


def interpolation(taps: int) -> Formula:
    """Each element of the output is a weighted sum of so many of the input. *(ours)*

    The weights follow from the sizes alone, so that they cost nothing.
    """
    return lambda op: Cost(mults=taps * op.out.numel, accumulations=(taps - 1) * op.out.numel)


def antialiased(reach: int) -> Formula:
    """Interpolation by a filter that grows with the reduction: first along the rows, then along the columns. *(ours)*

    A filter that reaches `reach` elements to either side has ceil(2 * reach * max(n / o, 1)) taps from n to o elements.
    """

    def formula(op: Op) -> Cost:
        (*outer, height, width), (*_, out_height, out_width) = op.inputs[0].shape, op.out.shape
        cost = Cost()
        for n, o, lines in ((width, out_width, height), (height, out_height, out_width)):
            taps = min(n, math.ceil(2 * reach * max(n / o, 1)))
            elements = math.prod(outer) * lines * o
            cost += Cost(mults=taps * elements, accumulations=(taps - 1) * elements)
        return cost

    return formula


def grid_sample(op: Op) -> Cost:
    """Sampling at given places. *(ours)*

    For each place and dimension: coordinate to index 1 multiplication and 1 addition, rounding 1 multiplication; then
    with t taps in all (2 a dimension, 4 if bicubic): 2 additions a dimension for the distances (bicubic: 4 polynomials
    of 3 multiplications and 3 additions), t multiplications for the weights; and for each element of the output t
    multiplications and t - 1 additions.
    """
    mode = op.args[2]
    dimensions = len(op.out.shape) - 2
    places = op.out.numel // op.out.shape[1]
    located = Cost(mults=2 * dimensions * places, adds=dimensions * places)
    if mode == 1:  # nearest
        return located
    taps = (4 if mode == 2 else 2) ** dimensions
    weights = (12, 12) if mode == 2 else (0, 2)
    weighted = Cost(mults=places * (taps + dimensions * weights[0]), adds=places * dimensions * weights[1])
    return located + weighted + Cost(mults=taps * op.out.numel, accumulations=(taps - 1) * op.out.numel)


def affine_grid(op: Op) -> Cost:
    """Each coordinate from the d of its place: d multiplications, d additions (one of them the shift). *(ours)*"""
    terms = op.out.numel * op.out.shape[-1]
    return Cost(mults=terms, accumulations=terms)


FORMULAS: dict[str, Formula] = {
    "aten.max_pool2d_with_indices": max_pool,
    "aten.max_pool3d_with_indices": max_pool,
    "aten.fractional_max_pool2d": max_pool,
    "aten.fractional_max_pool3d": max_pool,
    "aten.avg_pool2d": avg_pool,
    "aten.avg_pool3d": avg_pool,
    "aten._adaptive_avg_pool2d": adaptive_avg_pool,
    "aten._adaptive_avg_pool3d": adaptive_avg_pool,
    "aten.adaptive_max_pool2d": adaptive_max_pool,
    "aten.adaptive_max_pool3d": adaptive_max_pool,
    "aten.upsample_linear1d": interpolation(2),
    "aten.upsample_bilinear2d": interpolation(4),
    "aten.upsample_trilinear3d": interpolation(8),
    "aten.upsample_bicubic2d": interpolation(16),
    "aten._upsample_bilinear2d_aa": antialiased(1),
    "aten._upsample_bicubic2d_aa": antialiased(2),
    "aten.grid_sampler_2d": grid_sample,
    "aten.grid_sampler_3d": grid_sample,
    "aten.affine_grid_generator": affine_grid,
}
