"""Weights as places in a table of values that k-means finds (Deep Compression, Han et al. 2016, arXiv 1510.00149)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.formats import Codebook, CodebookQuantizer
from micronet_plugins.layerwise import ActivationBits, WeightQuantizer


class CodebookStrategy(WeightQuantizer):
    """Clusters each weight tensor by k-means: ceil(log2 K) bits a weight, and a table of K values, learned.

    Lloyd's algorithm in one dimension from evenly spaced values, as in the paper, or from quantiles, whichever ends
    better. 0 is in the table where a weight is 0, so that masks hold. Table values are 32-bit numbers, and so are the
    products with them: it saves storage, not multiplications. Use it where storage is what counts, for tensors much
    larger than their table.
    """

    values: int = Field(16, ge=2, le=4096, description="values in the table of a tensor")
    iterations: int = Field(100, gt=0, description="iterations of k-means, at most")
    activation_bits: ActivationBits = Field(
        0, ge=0, le=16, description="bits of an activation; products stay at the 32 bits of the table"
    )

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        weight = getattr(layer, name).detach()
        return CodebookQuantizer(Codebook(k_means(weight, self.values, self.iterations)), learned=True)


def k_means(values: Tensor, count: int, iterations: int) -> Tensor:
    """At most `count` values that stand for all, in order: each the mean of those nearest to it.

    Where there is a zero, one of the values is 0 and stays it. Where there are few values, these are the table. Of two
    starts, values evenly spaced and quantiles, the one that ends with the smaller squared error counts.
    """
    points, counts = torch.unique(values.double(), return_counts=True)
    if len(points) <= count:
        return points.to(values.dtype)
    spaced = torch.linspace(float(points[0]), float(points[-1]), count, dtype=torch.float64)
    places = (torch.arange(count) + 0.5) / count * (counts.sum() - 1)
    quantiles = points[torch.searchsorted(counts.cumsum(0), places.round().long(), right=True)]
    ends = [_lloyd(points, counts, start, iterations) for start in (spaced, torch.unique(quantiles))]
    return min(ends, key=lambda end: end[0])[1].to(values.dtype)


def _lloyd(points: Tensor, counts: Tensor, centres: Tensor, iterations: int) -> tuple[float, Tensor]:
    """The squared error and the centres, without those that no point is nearest to."""
    has_zero = bool((points == 0).any())
    if has_zero:
        centres[centres.abs().argmin()] = 0
    for _ in range(iterations):
        nearest = torch.bucketize(points, (centres[1:] + centres[:-1]) / 2)
        weights = torch.zeros_like(centres).index_add_(0, nearest, counts.double())
        means = torch.zeros_like(centres).index_add_(0, nearest, points * counts) / weights.clamp(min=1)
        moved = torch.where((weights > 0) & ~(has_zero & (centres == 0)), means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved.sort().values
    nearest = torch.bucketize(points, (centres[1:] + centres[:-1]) / 2)
    error = float(((centres[nearest] - points).square() * counts).sum())
    return error, centres[torch.unique(nearest)]
