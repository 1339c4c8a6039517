"""Batch, layer, group, instance and root-mean-square norm."""

from __future__ import annotations

import math

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.trace import Op


def batch_norm(op: Op) -> Cost:
    """In evaluation a fixed scale and shift for each channel: 1 multiplication and 1 addition an element.

    Without running statistics (instance norm, too) it computes those of its input, as executed.
    """
    if op.name == "aten.native_batch_norm" and op.args[5]:
        x, weight, bias = op.args[:3]
        return normalization(x.shape[1], x.numel, weight is not None, bias is not None)
    return Cost(mults=op.out.numel, accumulations=op.out.numel)


def normalization(groups: int, elements: int, scale: bool, shift: bool) -> Cost:
    """Layer and group norm as executed, for each group of k elements. *(ours)*

    mean (k - 1 additions, 1 multiplication), centring (k additions), variance (k multiplications, k - 1 additions,
    1 multiplication), epsilon (1 addition), reciprocal square root (1), scaling (k), then weight (k) and bias (k).
    """
    k = elements // groups
    mults = 1 + k + 1 + 1 + k + (k if scale else 0)
    return Cost(groups * mults, groups * (k + 1 + (k if shift else 0)), groups * 2 * (k - 1))


def layer_norm(op: Op) -> Cost:
    """A group is what one mean is taken over: the trailing dimensions."""
    x, shape, weight, bias = op.args[:4]
    return normalization(x.numel // math.prod(shape), x.numel, weight is not None, bias is not None)


def group_norm(op: Op) -> Cost:
    """A group is what one mean is taken over: a group of channels of one example."""
    x, weight, bias, batch, _, _, groups = op.args[:7]
    return normalization(batch * groups, x.numel, weight is not None, bias is not None)


def rms_norm(op: Op) -> Cost:
    """Where it runs as one operation, as where it is taken apart; for each group of k elements. *(ours)*

    k squares, their mean (k - 1 additions, 1 multiplication), epsilon (1 addition), reciprocal square root (1),
    scaling (k), weight (k).
    """
    x, shape, weight = op.args[:3]
    k = math.prod(shape)
    groups = x.numel // k
    return Cost(groups * (2 * k + 2 + (k if weight is not None else 0)), groups, groups * (k - 1))


FORMULAS: dict[str, Formula] = {
    "aten.native_batch_norm": batch_norm,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten.native_layer_norm": layer_norm,
    "aten.native_group_norm": group_norm,
    "aten._fused_rms_norm": rms_norm,
}
