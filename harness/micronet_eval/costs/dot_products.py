"""Convolutions, matrix products and attention: everything that multiplies by weights and accumulates."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from micronet_eval.costs.cost import Cost, Formula
from micronet_eval.nonzeros import by_output, is_nonzero
from micronet_eval.trace import Op, Value


def dot_products(nonzeros: int, outputs: int, times: int, bias: bool) -> Cost:
    """The cost of `times` repetitions of a set of dot products with constant weights.

    With n non-zero weights behind an output: n multiplications, max(n - 1, 0) additions, one more with a bias (n > 0).
    `nonzeros` is the sum of n over all outputs of one repetition, `outputs` the number of those with n > 0.
    """
    mults = nonzeros * times
    return Cost(mults=mults, accumulations=mults - (0 if bias else outputs * times), macs=mults)


def nonzeros_by_output(weight: Value, output_dim: int) -> tuple[int, int]:
    """Non-zero weights, and outputs with at least one, of a weight whose dimension `output_dim` counts the outputs.

    A weight without values counts as dense.
    """
    outputs = weight.shape[output_dim]
    if weight.known is None or weight.numel - weight.nonzeros < weight.numel // max(outputs, 1):
        return weight.nonzeros, outputs  # the zeros are too few to fill one
    return weight.nonzeros, int(np.count_nonzero(by_output(weight.known, output_dim)))


def convolution(op: Op) -> Cost:
    """For each output n mults and n - 1 adds over its n non-zero weights, one more for the bias; padding counts."""
    _, weight, bias, _, _, _, transposed = op.args[:7]
    if transposed:
        return transposed_convolution(op)
    nonzeros, outputs = nonzeros_by_output(weight, 0)
    return dot_products(nonzeros, outputs, op.out.numel // weight.shape[0], bias is not None)


def transposed_convolution(op: Op) -> Cost:
    """x [N, C, ...], weight [C, K / groups, ...]: each element of x times each non-zero weight of its channel. *(ours)*

    Padding of a transposed convolution only cuts off the border of the result. As a convolution counts its products
    with padding, the products that end up in that border count, too (so does torch.utils.flop_counter). An output
    that n of the weights reach costs n - 1 additions, and one for the bias if it is kept; where the stride leaves gaps,
    nothing reaches an output, and n is 0.
    """
    x, weight, bias, stride, padding, dilation, _, output_padding, groups = op.args[:9]
    taps = _taps(weight, groups)
    everywhere = torch.ones(1, 1, *x.shape[2:])

    def reached(padding: list[int], output_padding: list[int]) -> Tensor:
        return torch.convolution(everywhere, taps, None, stride, padding, dilation, True, output_padding, 1)

    no_padding = [0] * len(padding)
    terms = reached(no_padding, no_padding)
    alike = x.shape[0] * op.out.shape[1] // taps.shape[1]
    products = x.numel // x.shape[1] * nonzeros_by_output(weight, 0)[0]
    outputs = alike * int((terms > 0).sum())
    with_bias = alike * int((reached(padding, output_padding) > 0).sum()) if bias is not None else 0
    return Cost(mults=products, accumulations=products - outputs + with_bias, macs=products)


def _taps(weight: Value, groups: int) -> Tensor:
    """[1, K, ...]: how many non-zero weights behind each output channel; all alike, and K = 1, for a dense weight."""
    channels, outputs, *kernel = weight.shape
    if weight.known is None or weight.nonzeros == weight.numel:
        return torch.full((1, 1, *kernel), float(channels // groups))
    by_group = is_nonzero(weight.known).view(groups, channels // groups, outputs, *kernel)
    return by_group.sum(1).flatten(0, 1).unsqueeze(0).float().cpu()


def mm(op: Op) -> Cost:
    """For each output n mults and n - 1 adds over the n non-zero weights, also in batches."""
    return matrix_product(op.args[0], op.args[1], bias=False)


def addmm(op: Op) -> Cost:
    """beta * bias + alpha * (A @ B): a linear layer, or attention with a mask; a factor other than 1 multiplies."""
    return matrix_product(op.args[1], op.args[2], bias=_has_bias(op)) + _factors(op)


def _has_bias(op: Op) -> bool:
    return bool(op.kwargs.get("beta", 1) != 0)


def _factors(op: Op) -> Cost:
    """alpha and beta: a multiplication an output for each that is not 1."""
    beta, alpha = op.kwargs.get("beta", 1), op.kwargs.get("alpha", 1)
    return Cost(mults=op.out.numel * ((beta not in (0, 1, -1)) + (alpha not in (1, -1))))


def addbmm(op: Op) -> Cost:
    """bias + the sum of the products of a batch: dot products that go over the batch, too."""
    a = op.args[1]
    terms = a.shape[0] * a.shape[2]
    return dot_products(op.out.numel * terms, op.out.numel, 1, _has_bias(op)) + _factors(op)


def matrix_product(a: Value, b: Value, bias: bool) -> Cost:
    """[..., M, K] x [..., K, N]: one dot product of K terms an output; zeros of a constant factor are left out."""
    if b.is_constant:
        nonzeros, outputs = nonzeros_by_matrix(b, -1)
        return dot_products(nonzeros, outputs, a.shape[-2], bias)
    nonzeros, outputs = nonzeros_by_matrix(a, -2)
    return dot_products(nonzeros, outputs, b.shape[-1], bias)


def nonzeros_by_matrix(weight: Value, output_dim: int) -> tuple[int, int]:
    """As `nonzeros_by_output`, summed over the batch dimension that a matrix of bmm has in front."""
    if len(weight.shape) == 2:
        return nonzeros_by_output(weight, output_dim)
    if weight.known is None or weight.nonzeros == weight.numel > 0:
        return weight.numel, weight.numel // max(weight.shape[-3 - output_dim], 1)
    counts = is_nonzero(weight.known).sum(-3 - output_dim)
    return int(counts.sum()), int((counts > 0).sum())


def vector_product(op: Op) -> Cost:
    """The products of a matrix and a vector, or of two vectors, without bias."""
    a, b = op.args[:2]
    return _times_vector(a, b, bias=False)


def addmv(op: Op) -> Cost:
    """A matrix times a vector, with bias."""
    return _times_vector(op.args[1], op.args[2], bias=_has_bias(op)) + _factors(op)


def _times_vector(a: Value, vector: Value, bias: bool) -> Cost:
    """[M, K] or [K] times [K]; zeros of a constant factor are left out."""
    rows = a.shape[0] if len(a.shape) == 2 else 1
    data = a.known
    if data is not None and not vector.is_constant:
        counts = (data.reshape(rows, -1) != 0).sum(1)
        return dot_products(int(counts.sum()), int((counts > 0).sum()), 1, bias)
    data = None if a.is_constant else vector.known
    terms = vector.numel if data is None else int(data.count_nonzero())
    return dot_products(rows * terms, rows if terms else 0, 1, bias)


def outer(op: Op) -> Cost:
    """bias [M, N] + a [M] times b [N]: a multiplication and an addition an element."""
    return Cost(mults=op.out.numel, adds=op.out.numel if _has_bias(op) else 0) + _factors(op)


def grouped_mm(op: Op) -> Cost:
    """Rows [T, K] that are dealt to matrices [G, K, N], each row to one of them (a mixture of experts).

    A constant that has zeros counts the mean over the matrices, as who gets which row depends on the data. *(ours)*
    """
    a, b = op.args[:2]
    if len(a.shape) != 2 or len(b.shape) != 3:
        return dot_products(op.out.numel * a.shape[-1], op.out.numel, 1, False)
    nonzeros, outputs = nonzeros_by_matrix(b, -1)
    rows, experts = a.shape[0], b.shape[0]
    mults = rows * nonzeros // experts
    return Cost(mults=mults, accumulations=mults - rows * outputs // experts, macs=mults)


def bilinear(op: Op) -> Cost:
    """x1 [N, I], weight [K, I, J], x2 [N, J]: for each non-zero weight a product with x1 and one with x2. *(ours)*

    The operation is aten._trilinear, called with these three.
    """
    weight = op.args[1]
    nonzeros, outputs = nonzeros_by_output(weight, 0)
    times = op.out.numel // weight.shape[0]
    return dot_products(nonzeros, outputs, times, bias=False) + Cost(mults=nonzeros * times)


def attention(op: Op) -> Cost:
    """softmax(scale * Q K^T + mask) V, when it runs as one fused operation.

    Q [..., L, E], K [..., S, E], V [..., S, F]; the same as the operations that `trace` takes it apart into: Q and K
    are both scaled by the root of the scale, then two products, a softmax, and an addition for a mask.
    """
    q, k, v = op.args[:3]
    length, width, keys, values = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    heads = math.prod(q.shape[:-2])
    masked = isinstance(op.arg(3, "attn_bias", op.kwargs.get("attn_mask")), Value)
    scores = heads * length * keys
    scaling = Cost(mults=heads * width * (length + keys))
    scored = dot_products(scores * width, scores, 1, bias=False)
    softmax = Cost(mults=2 * scores, adds=scores if masked else 0, accumulations=scores - heads * length)
    summed = dot_products(scores * values, heads * length * values, 1, bias=False)
    return scaling + scored + softmax + summed


def embedding_bag(op: Op) -> Cost:
    """Look-ups of rows that are summed (k - 1 additions a bag of k), averaged (1 multiplication more) or maximized.

    With a weight for every look-up it is a dot product. *(ours)*
    """
    table, indices = op.args[:2]
    mode, weights = op.arg(4, "mode", 0), op.arg(6, "per_sample_weights")
    rows = indices.numel * table.shape[1]
    additions = max(rows - op.out.numel, 0)
    if mode == 2:
        return Cost(adds=additions)
    scaled = op.out.numel if mode == 1 else 0
    weighted = rows if weights is not None else 0
    return Cost(mults=scaled + weighted, accumulations=additions, macs=weighted)


def distances(op: Op) -> Cost:
    """Between all pairs of vectors of k elements: k differences, k squares (or powers), k - 1 additions, 1 root."""
    k = op.args[0].shape[-1]
    return Cost(op.out.numel * (k + 1), op.out.numel * k, op.out.numel * (k - 1))


FORMULAS: dict[str, Formula] = {
    "aten.convolution": convolution,
    "aten.mm": mm,
    "aten.bmm": mm,
    "aten._int_mm": mm,
    "aten.addmm": addmm,
    "aten.baddbmm": addmm,
    "aten.addbmm": addbmm,
    "aten.mv": vector_product,
    "aten.dot": vector_product,
    "aten.vdot": vector_product,
    "aten.addmv": addmv,
    "aten.addr": outer,
    "aten._grouped_mm": grouped_mm,
    "aten._trilinear": bilinear,
    "aten._scaled_dot_product_flash_attention": attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": attention,
    "aten._scaled_dot_product_efficient_attention": attention,
    "aten._scaled_dot_product_cudnn_attention": attention,
    "aten._scaled_dot_product_attention_math": attention,
    "aten._scaled_dot_product_fused_attention_overrideable": attention,
    "aten._embedding_bag": embedding_bag,
    "aten._embedding_bag_forward_only": embedding_bag,
    "aten._cdist_forward": distances,
    "aten._euclidean_dist": distances,
}

ADDENDS: dict[str, int] = {
    "aten.convolution": 2,
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv", "aten.addr"), 0),
}
"""Which argument of an operation is only added: its width does not matter to the multiplications."""
