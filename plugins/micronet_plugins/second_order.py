"""Sparsifiers that look at calibration data: what a layer's inputs say about which weights its outputs need."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.strategy import Context, Sparsifier
from micronet_eval.structure import copied
from micronet_plugins.layerwise import set_weight
from micronet_plugins.magnitude import LIMIT, SHARING, SPARSITY, Scope, allocated, set_mask, share_of, zero_smallest
from micronet_plugins.weights import (
    by_weight,
    grouped,
    second_moments,
    ungrouped,
    upper_factor_of_inverse,
    weight_of,
)


class _ByMoments(Sparsifier):
    """Zeros by what layers read, as many in each as `scope` allocates; where that is not seen the smallest weights."""

    strategy: ClassVar[str]

    sparsity: float = SPARSITY
    scope: Scope = Field("lamp", description=SHARING)
    limit: float = LIMIT
    batches: int = Field(4, gt=0, description="batches of training data for calibration")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        moments = second_moments(model, context, self.batches, self.strategy)
        layers = by_weight(model)
        counts = allocated(list(layers.values()), self.scope, self.sparsity, self.limit)
        for (path, layer), count in zip(layers.items(), counts, strict=True):
            if (moment := moments.get(path)) is None:
                zero_smallest(model, layer, weight_of(layer).abs(), count)
            else:
                set_mask(model, layer, self.kept(layer, moment, count))
        return model

    @abstractmethod
    def kept(self, layer: nn.Module, moment: Tensor, count: int) -> Tensor:
        """The mask of a layer that loses `count` weights, and any change of them; `moment` is from `second_moments`."""


class Wanda(_ByMoments):
    """Zeros in each output the weights with the smallest |weight| x norm of the input.

    Sun et al. 2023, arXiv 2306.11695: score |W_ij| ||X_j||_2, compared within an output; of a convolution j is an input
    channel at a kernel position. The paper takes the same share of each layer, as `scope` = layer. Cheap, no weight
    changes; better than `magnitude` where inputs differ in size. Layers that share a weight add their inputs up. Layers
    whose inputs do not tell what the weight is for lose the smallest weights: a table that is the embedding, too, the
    last layer of attention, subclasses of torch's layers.
    """

    strategy: ClassVar[str] = "wanda"

    def kept(self, layer: nn.Module, moment: Tensor, count: int) -> Tensor:
        weight = grouped(layer, weight_of(layer)).flatten(2)
        scores = weight.abs() * moment.diagonal(dim1=1, dim2=2).sqrt()[:, None, :]
        scores = scores.masked_fill(weight == 0, -1)
        ranks = scores.argsort(dim=2, stable=True).argsort(2)
        inputs = weight.shape[2]
        zeros = share_of(inputs, count / weight.numel(), self.limit)
        return ungrouped(layer, ranks >= zeros)


class OBS(_ByMoments):
    """Zeros weights by the error that they cause in the layer's output, and lets the remaining ones make up for it.

    Optimal brain surgeon (Hassibi and Stork 1992) on each layer's least squares problem, by the sweep of SparseGPT
    (Frantar and Alistarh 2023, arXiv 2301.00774). With H = X X^T + damping, saliency w_j^2 / [H^-1]_jj; the weights
    behind j change by -w_j / [H^-1]_jj x [H^-1]_j, where H is that of the inputs from j on. Then all that remain are
    refitted to the layer's outputs. The best without training, and the dearest: d^3 a layer, d = inputs x kernel. The
    paper takes the same share of each layer, as `scope` = layer. Shared weights, and layers whose inputs do not tell
    what the weight is for, as in `wanda`; those keep their values.
    """

    strategy: ClassVar[str] = "obs"

    damping: float = Field(0.01, gt=0, description="added to H's diagonal, as a share of its mean")
    block: int = Field(128, gt=0, description="inputs among which the weights to remove are chosen at a time")

    def kept(self, layer: nn.Module, moment: Tensor, count: int) -> Tensor:
        matrices = grouped(layer, weight_of(layer)).flatten(2).double()
        found = [
            sweep(matrix, damped(h, self.damping), count / weight_of(layer).numel(), self.block)
            for matrix, h in zip(matrices, moment, strict=True)
        ]
        weight, kept = (ungrouped(layer, torch.stack(parts)) for parts in zip(*found, strict=True))
        set_weight(layer, "weight", weight)
        return kept


def damped(moment: Tensor, damping: float) -> Tensor:
    """H with `damping` x its mean diagonal added to the diagonal, so that it has an inverse."""
    mean = moment.diagonal().mean().item()
    return moment + torch.eye(len(moment), dtype=moment.dtype) * (damping * mean if mean > 0 else 1.0)


def sweep(weight: Tensor, h: Tensor, sparsity: float, block: int) -> tuple[Tensor, Tensor]:
    """New weights and mask, [outputs, d] both, of `weight` under the second moment `h` [d, d] of its inputs.

    Row j of the upper Cholesky factor U of H^-1 is the first row of the inverse of H[j:, j:], divided by its root
    U_jj. What is zero already comes first.
    """
    factor = upper_factor_of_inverse(h)
    new, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, len(h), block):
        end = min(start + block, len(h))
        scores = new[:, start:end].square() / factor.diagonal()[start:end].square()
        scores = scores.masked_fill(weight[:, start:end] == 0, -1)
        count = round(sparsity * len(weight) * end) - round(sparsity * len(weight) * start)
        lowest = scores.flatten().argsort(stable=True)[:count]
        kept[:, start:end] = torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, lowest, False).view_as(scores)
        kept[:, start:end] &= weight[:, start:end] != 0  # where there are more zeros than that, all stay
        for j in range(start, end):
            error = new[:, j].masked_fill(kept[:, j], 0) / factor[j, j]
            new[:, j:] -= error[:, None] * factor[j, j:]
    return refitted(weight, new * kept, kept, h), kept


def refitted(weight: Tensor, start: Tensor, kept: Tensor, h: Tensor, steps: int = 20) -> Tensor:
    """The weights [outputs, d] at `kept` whose outputs are closest to those of `weight`, found from `start` on.

    Minimises (w - v) H (w - v)^T for each row by conjugate gradients, preconditioned by H's diagonal. The sweep leaves
    the weights in front of a removed one as they are; this lets them make up for it, too. *(ours)*
    """
    new, diagonal = start.clone(), h.diagonal()
    residual = (weight - new) @ h * kept
    direction = residual / diagonal
    energy = (residual * direction).sum(1, keepdim=True)
    enough = 1e-14 * (weight @ h * weight).sum(1, keepdim=True)
    for _ in range(steps):
        going = energy > enough
        if not bool(going.any()):
            break
        curved = direction @ h * kept
        step = torch.where(going, energy / (direction * curved).sum(1, keepdim=True).clamp(min=1e-300), 0)
        new += step * direction
        residual -= step * curved
        conditioned = residual / diagonal
        before, energy = energy, (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + torch.where(going, energy / before.clamp(min=1e-300), 0) * direction
    return new
