"""Sums, means, maxima, sorting and softmax: many elements make one, or each other's place."""

from __future__ import annotations

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.trace import Op


def _elements(op: Op) -> int:
    return op.inputs[0].numel


def _length(op: Op, position: int) -> int:
    """The size of the dimension that argument `position` names; the last one without it, 1 of a scalar."""
    dim = op.arg(position, "dim", -1)
    shape = op.inputs[0].shape
    return shape[-1 if dim is None else dim] if shape else 1


def mean(op: Op) -> Cost:
    """Over k elements: k - 1 additions and 1 multiplication by 1/k."""
    return Cost(mults=op.out.numel, accumulations=_elements(op) - op.out.numel)


def total(op: Op) -> Cost:
    """Sum over k elements: k - 1 additions. *(ours)*"""
    return Cost(accumulations=_elements(op) - op.out.numel)


def product(op: Op) -> Cost:
    """Product of k elements: k - 1 multiplications. *(ours)*"""
    return Cost(mults=_elements(op) - op.out.numel)


def variance(op: Op) -> Cost:
    """Over k elements: mean (k - 1 additions, 1 multiplication), k differences, k squares, k - 1 additions, 1 / k.

    *(ours)*, as executed.
    """
    k, groups = _elements(op), op.out.numel
    return Cost(mults=k + 2 * groups, adds=k, accumulations=2 * (k - groups))


def deviation(op: Op) -> Cost:
    """The variance and a square root. *(ours)*"""
    return variance(op) + Cost(mults=op.out.numel)


def largest(op: Op) -> Cost:
    """Maximum or minimum over k elements: k - 1 comparisons, counted as additions. *(ours)*

    Also `any`, `all` and the place of the maximum.
    """
    return Cost(adds=_elements(op) - op.out.numel)


def extremes(op: Op) -> Cost:
    """Minimum and maximum over k elements: twice k - 1 comparisons. *(ours)*"""
    return Cost(adds=2 * (_elements(op) - op.out.numel))


def count_nonzero(op: Op) -> Cost:
    """Of k elements: k comparisons and k - 1 additions. *(ours)*"""
    return Cost(adds=_elements(op), accumulations=_elements(op) - op.out.numel)


def running(mults: int = 0, adds: int = 0, accumulations: int = 0, each: int = 0) -> Formula:
    """A running sum, product or maximum over k elements: k - 1 operations a row, and `each` mults an element."""

    def formula(op: Op) -> Cost:
        steps = op.out.numel - op.out.numel // max(_length(op, 1), 1)
        return Cost(mults * steps + each * op.out.numel, adds * steps, accumulations * steps)

    return formula


def sort(op: Op) -> Cost:
    """Of k elements: k ceil(log2 k) comparisons, the bound of a merge sort. *(ours)*"""
    return Cost(adds=_elements(op) * _log2(_length(op, 1)))


def select_by_sorting(position: int) -> Formula:
    """Median, mode and the like of k elements along one dimension: counted as a sort. *(ours)*"""

    def formula(op: Op) -> Cost:
        over_all = len(op.args) == 1 and "dim" not in op.kwargs and op.out.numel == 1
        return Cost(adds=_elements(op) * _log2(_elements(op) if over_all else _length(op, position)))

    return formula


def topk(op: Op) -> Cost:
    """The best m of k: each but the first is compared ceil(log2(m + 1)) times, with a heap of the best. *(ours)*"""
    rows = _elements(op) // max(_length(op, 2), 1)
    return Cost(adds=(_elements(op) - rows) * _log2(op.args[1] + 1))


def search(op: Op) -> Cost:
    """The place of a value among n sorted ones: ceil(log2(n + 1)) comparisons. *(ours)*"""
    borders = op.args[0] if op.name == "aten.searchsorted" else op.args[1]
    return Cost(adds=op.out.numel * _log2(borders.shape[-1] + 1))


def histogram(op: Op) -> Cost:
    """Each element finds its bin, 1 multiplication and 1 addition, and adds 1 to it. *(ours)*"""
    return Cost(_elements(op), _elements(op), _elements(op))


def _log2(n: int) -> int:
    """ceil(log2 n), exactly."""
    return max(n - 1, 0).bit_length()


def scattered_sum(op: Op) -> Cost:
    """One addition for each element that is added, or compared, somewhere; or one multiplication. *(ours)*

    A mean divides, and a factor multiplies.
    """
    how = op.named.get("reduce", "sum")
    many = op.named["source" if op.name == "aten.index_add" else "index"].numel
    if how in ("prod", "multiply"):
        return Cost(mults=many)
    if how in ("amax", "amin"):
        return Cost(adds=many)
    scales = op.kwargs.get("alpha", 1) not in (1, -1)  # of index_add
    return Cost(mults=op.out.numel * (how == "mean") + many * scales, accumulations=many)


def index_put(op: Op) -> Cost:
    """Written values cost nothing; with `accumulate` one addition for each. *(ours)*"""
    return Cost(accumulations=op.args[2].numel) if op.arg(3, "accumulate", False) else Cost()


def fold(op: Op) -> Cost:
    """Overlapping windows are added up: one addition for each element beyond the first at a place. *(ours)*"""
    return Cost(accumulations=max(_elements(op) - op.out.numel, 0))


def softmax(op: Op) -> Cost:
    """Over k elements: k exponentials, k - 1 additions, k divisions. *(ours)*"""
    k = _length(op, 1)
    return Cost(mults=2 * op.out.numel, accumulations=op.out.numel - op.out.numel // k)


def log_softmax(op: Op) -> Cost:
    """Over k elements: k exponentials, k - 1 additions, 1 logarithm, k subtractions. *(ours)*"""
    rows = op.out.numel // _length(op, 1)
    return Cost(mults=op.out.numel + rows, adds=op.out.numel, accumulations=op.out.numel - rows)


def logsumexp(op: Op) -> Cost:
    """Over k elements: k exponentials, k - 1 additions, 1 logarithm. *(ours)*"""
    return Cost(mults=_elements(op) + op.out.numel, accumulations=_elements(op) - op.out.numel)


def vector_norm(op: Op) -> Cost:
    """Over k elements: k squares (absolute values, powers), k - 1 additions, 1 root. *(ours)*

    The sum of absolute values has no root; their maximum has k - 1 comparisons.
    """
    k, groups = _elements(op), op.out.numel
    order = op.arg(1, "ord" if "linalg" in op.name else "p", 2)
    if order in (float("inf"), float("-inf")):
        return Cost(mults=k, adds=k - groups)
    return Cost(mults=k + (0 if order == 1 else groups), accumulations=k - groups)


def distance(op: Op) -> Cost:
    """Between two tensors of k elements: k differences, k squares (or powers), k - 1 additions, 1 root. *(ours)*"""
    k = _elements(op)
    return Cost(mults=k + 1, adds=k, accumulations=k - 1)


FORMULAS: dict[str, Formula] = {
    "aten.mean": mean,
    "aten.sum": total,
    "aten.nansum": total,
    "aten.trace": lambda op: Cost(accumulations=min(op.inputs[0].shape) - 1),
    "aten.prod": product,
    "aten.var": variance,
    "aten.var_mean": variance,
    "aten.std": deviation,
    "aten.std_mean": deviation,
    **{f"aten.{name}": largest for name in ("amax", "amin", "max", "min", "argmax", "argmin", "any", "all")},
    "aten.aminmax": extremes,
    "aten.count_nonzero": count_nonzero,
    "aten.cumsum": running(accumulations=1),
    "aten.cumprod": running(mults=1),
    "aten.cummax": running(adds=1),
    "aten.cummin": running(adds=1),
    "aten.logcumsumexp": running(accumulations=1, each=2),
    "aten.sort": sort,
    "aten.median": select_by_sorting(1),
    "aten.nanmedian": select_by_sorting(1),
    "aten.mode": select_by_sorting(1),
    "aten.kthvalue": select_by_sorting(2),
    "aten.topk": topk,
    "aten.searchsorted": search,
    "aten.bucketize": search,
    "aten.histc": histogram,
    "aten.scatter_add": scattered_sum,
    "aten.scatter_reduce": scattered_sum,
    "aten.index_add": scattered_sum,
    "aten.index_put": index_put,
    "aten.col2im": fold,
    "aten._softmax": softmax,
    "aten._safe_softmax": softmax,
    "aten._log_softmax": log_softmax,
    "aten.logsumexp": logsumexp,
    "aten.linalg_vector_norm": vector_norm,
    "aten.norm": vector_norm,
    "aten.dist": distance,
}
