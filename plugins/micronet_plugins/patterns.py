"""Sparsifiers whose zeros follow a pattern: n of m, blocks, random."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from micronet_eval.masks import ELEMENT, elements, mask_shape
from micronet_eval.strategy import Context, Sparsifier
from micronet_eval.structure import copied
from micronet_plugins.magnitude import (
    LIMIT,
    MAC_COST,
    SHARING,
    SPARSITY,
    costs_of,
    set_mask,
    without_lowest,
    worths,
    zero_smallest,
    zeros_by_layer,
)
from micronet_plugins.weights import by_weight, grouped, ungrouped, weight_of


class NofM(Sparsifier):
    """Keeps the n largest of every m consecutive inputs of an output, as sparse tensor cores take them (2 of 4).

    Mishra et al. 2021, arXiv 2104.08378. Groups run along the inputs, at each kernel position on its own; fewer than m
    inputs at the end keep n as well, or all that there are. For hardware that wants the pattern; at the same sparsity
    `magnitude` is freer.
    """

    n: int = Field(2, gt=0, description="weights that stay of each group")
    m: int = Field(4, gt=1, description="consecutive inputs that are a group")

    @model_validator(mode="after")
    def _fewer(self) -> NofM:
        if self.n >= self.m:
            raise ValueError(f"n = {self.n} of m = {self.m} removes nothing; n must be smaller than m")
        return self

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        for layer in by_weight(model).values():
            set_mask(model, layer, n_of_m(layer, weight_of(layer).abs(), self.n, self.m))
        return model


def n_of_m(layer: nn.Module, scores: Tensor, n: int, m: int) -> Tensor:
    """Mask [the weight's shape] of the n highest scores in every m consecutive inputs."""
    by_input = grouped(layer, scores).transpose(2, 3)  # inputs last
    inputs = by_input.shape[-1]
    groups = nn.functional.pad(by_input, (0, -inputs % m), value=-torch.inf).unflatten(-1, (-1, m))  # type: ignore[no-untyped-call]
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ungrouped(layer, (ranks < n).flatten(-2)[..., :inputs].transpose(2, 3))


class Block(Sparsifier):
    """Zeros whole blocks of the weight matrix, those with the smallest weights.

    Gray et al. 2017; Narang et al. 2017, arXiv 1711.02782. The matrix is the weight's first dimension by all others,
    as masks are stored. A mask of blocks takes 1 bit a block, so it pays where masks weigh: at few bits a weight. With
    `columns = 0` and one row a block is a kernel: what connects one input channel with one output channel.

    `scope` and `mac_cost` allocate the zeros as in `magnitude`, a block's norm in the place of |w|.
    """

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of all blocks")
    rows: int = Field(4, gt=0, description="rows of a block: values of the weight's first dimension, mostly outputs")
    columns: int = Field(4, ge=0, description="columns of a block: inputs with their kernel positions; 0: one kernel's")
    norm: Literal["l1", "l2"] = Field("l1", description="mean magnitude, or root of the mean square, of a block")
    scope: Literal["global", "lamp"] = Field("global", description=SHARING)
    limit: float = LIMIT
    mac_cost: float = MAC_COST

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        layers = list(by_weight(model).values())
        blocks = [(self.rows, self.columns or math.prod(weight_of(layer).shape[2:])) for layer in layers]
        norms = [block_norms(weight_of(x), b, self.norm) for x, b in zip(layers, blocks, strict=True)]
        scores = worths([norm.flatten() for norm in norms], self.scope, costs_of(model, layers, self.mac_cost, context))
        counts = zeros_by_layer(scores, self.sparsity, self.limit)
        for layer, block, norm, count in zip(layers, blocks, norms, counts, strict=True):
            kept = elements(without_lowest(norm, count).cpu().numpy(), block, weight_of(layer).shape)
            set_mask(model, layer, torch.from_numpy(kept).to(norm.device))
        return model


def block_norms(weight: Tensor, block: tuple[int, int], norm: Literal["l1", "l2"]) -> Tensor:
    """Of each block [ceil(rows / r), ceil(columns / c)] the mean magnitude or the root of the mean square.

    Blocks at the edges hold fewer weights; the mean is over those that there are.
    """
    rows, columns = mask_shape(weight.shape, ELEMENT)
    values = weight.reshape(1, rows, columns).double()
    values = values.abs() if norm == "l1" else values.square()
    means = nn.functional.avg_pool2d(values, block, ceil_mode=True, count_include_pad=False)[0]
    return means if norm == "l1" else means.sqrt()


class Random(Sparsifier):
    """Zeros weights at random: the control to compare the others with.

    Each weight of the network is as likely as any other; weights that are zero already come first.
    """

    sparsity: float = SPARSITY
    limit: float = LIMIT

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        generator = torch.Generator().manual_seed(context.seed)
        layers = list(by_weight(model).values())
        drawn = [torch.rand(weight_of(layer).numel(), generator=generator) for layer in layers]
        scores = [d.masked_fill(weight_of(layer).flatten() == 0, -1) for layer, d in zip(layers, drawn, strict=True)]
        for layer, score, count in zip(layers, scores, zeros_by_layer(scores, self.sparsity, self.limit), strict=True):
            zero_smallest(model, layer, score, count)
        return model
