"""EigenDamage: layers cut in the eigenbasis of their Fisher matrix (Wang et al. 2019, arXiv 1905.05934), improved.

A layer's weight is rotated into the eigenbasis of its Kronecker-factored Fisher matrix (kronecker.py). There, removing
one weight costs about eigenvalue x weight^2 / 2 of loss; the sums over rows and columns are the saliencies of output
and input directions. One threshold over all layers says which go. The layer becomes rotate in, core, rotate out
(chains.py), refitted to its old weight.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import inf
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Pruner
from micronet_eval.structure import copied, replace
from micronet_plugins.chains import LOST, ONE_PLACE, Chain, Form, Ranks, called_apart, chains, refitted
from micronet_plugins.kronecker import Eigenbasis, batches_of, eigenbases, factors
from micronet_plugins.low_rank import check_runs, signs

RATES = "learning_rate_factors"
"""Attribute of a layer with new directions: the factors of the learning rate by parameter; training.train reads it."""
REMOVED = "removed_parameters"
"""Attribute of a layer, or of what it became: how many parameters the last round that pruned removed of it."""
STATE = (LOST, ONE_PLACE, REMOVED)
"""What a layer keeps when it is given directions back."""
LEAST_CURVATURE = 1e-12
"""Of a direction, as a share of the largest: a refit divides by it."""


class EigenDamage(Pruner):
    """Cuts layers in the eigenbasis of their Fisher matrix, where least loss is; or gives directions back (annealing).

    A layer for which rotations would not save stays as it is. The saliency of a direction says nothing of its cost: in
    one round that removes nearly all, late layers lose most parameters and early ones keep most operations. The nearer
    `limit` is to the ratio, the more evenly all layers lose, and the fewer operations are left.
    """

    ratio: float = Field(0.3, gt=0, lt=1, description="share of the model's parameters to remove in this round")
    parameters: int = Field(0, ge=0, description="parameters of the model at which to stop, though the ratio goes on")
    limit: float = Field(0.5, gt=0, lt=1, description="share of its parameters that a layer loses at most in a round")
    fisher: Literal["true", "empirical"] = Field("true", description="labels from the model's own output, or the data")
    batches: int = Field(4, gt=0, description="batches of training data to calibrate on")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the moving average over batches")
    damping: float = Field(1e-3, gt=0, description="added to eigenvalues, as a share of their mean")
    pool_momentum: float = Field(0.5, ge=0, lt=1, description="of what a layer lost in earlier rounds")
    back_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="annealing: gives back directions, of this share of the parameters that the last round removed",
    )
    rate_factor: float = Field(10.0, gt=0, description="learning rate of directions given back, times the others'")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        for module in model.modules():
            vars(module).pop(RATES, None)  # what was new before this round is not any more
        found = chains(model, called_apart(model, context.example_input))
        if self.back_ratio is not None:
            return self._give_back(model, found, self.back_ratio, context.seed)
        cuts = self._cuts(model, found, context)
        if not cuts:
            raise InputError(
                "eigendamage: the model has no convolution without groups and no linear layer that can be cut; layers "
                "that are masked, quantized or used several times are not, nor is a layer that is the whole model"
            )
        total = sum(p.numel() for p in model.parameters())
        target = max((1 - self.ratio) * total, self.parameters)
        fixed = total - sum(cut.chain.parameters for cut in cuts)
        threshold = smallest_threshold(cuts, target - fixed)
        replaced = {}
        for cut in cuts:
            if (ranks := cut.ranks_at(threshold)) != cut.chain.ranks:
                replaced[cut.chain.path] = self._cut(model, cut, ranks)
                replace(model, cut.chain.path, replaced[cut.chain.path])
        check_runs("eigendamage", model, replaced, context.example_input)
        for chain in found:
            layer = model.get_submodule(chain.path)
            setattr(layer, REMOVED, chain.parameters - sum(p.numel() for p in layer.parameters()))
        return model

    def _cuts(self, model: nn.Module, found: Sequence[Chain], context: Context) -> list[Cut]:
        measured = copied(model).eval().requires_grad_(False)
        layers = {chain.core_path: chain.core_has_extra_input for chain in found}
        data = list(islice(context.training_data, self.batches))
        if not data:
            raise InputError("eigendamage: there are no training data to calibrate on; give at least one batch")
        batches = batches_of(data, self.momentum, self.fisher == "true", context.seed)
        bases = eigenbases(measured, layers, factors(measured, layers, batches), batches, self.damping)
        return [Cut(chain, bases[chain.core_path], self.limit) for chain in found if chain.core_path in bases]

    def _cut(self, model: nn.Module, cut: Cut, ranks: Ranks) -> nn.Module:
        chain = cut.chain
        before = getattr(model.get_submodule(chain.path), LOST, (0.0, 0.0))
        layer = cut.build(ranks)
        if isinstance(layer, nn.Sequential):
            lost = zip(before, cut.lost(ranks), strict=True)
            setattr(layer, LOST, tuple(self.pool_momentum * b + (1 - self.pool_momentum) * now for b, now in lost))
            setattr(layer, ONE_PLACE, chain.is_one_place)
        return layer

    def _give_back(self, model: nn.Module, found: Sequence[Chain], share: float, seed: int) -> nn.Module:
        layers = [model.get_submodule(chain.path) for chain in found]
        removed = [getattr(layer, REMOVED) for layer in layers if hasattr(layer, REMOVED)]
        if not removed:
            raise InputError("eigendamage: back_ratio gives back a part of what a round removed; prune first")
        generator = torch.Generator().manual_seed(seed)
        pooled = [getattr(layer, LOST, (0.0, 0.0)) for layer in layers]
        drawn = draw(found, pooled, round(share * sum(removed)), generator)
        for chain, old, new in zip(found, layers, drawn, strict=True):
            if any(new):
                layer = grown(chain, new, self.rate_factor, generator)
                vars(layer).update({name: getattr(old, name) for name in STATE if hasattr(old, name)})
                replace(model, chain.path, layer)
        return model


@dataclass(frozen=True)
class Cut:
    """A chain, the eigenbasis of its core, and the share of its parameters that it may lose."""

    chain: Chain
    basis: Eigenbasis
    limit: float

    @cached_property
    def saliencies(self) -> tuple[Tensor, Tensor]:
        """Of input directions (columns) and of output directions (rows): sums of eigenvalue x weight^2 / 2."""
        single = self.basis.rotate(self.chain.weight()).square() * self.basis.eigenvalues / 2
        return single.sum((0, 2)), single.sum((1, 2))

    @cached_property
    def order(self) -> list[tuple[float, int]]:
        """Saliency and side (0 in, 1 out) of all directions in the order in which they go; the best of a side never."""
        sides = enumerate(saliency.sort().values[:-1].tolist() for saliency in self.saliencies)
        return sorted((value, side) for side, values in sides if self.chain.may_lose(side) for value in values)

    @cached_property
    def most(self) -> int:
        """How many directions may go: the chain keeps to the limit."""
        least = (1 - self.limit) * self.chain.parameters
        counts = range(len(self.order) + 1)
        return bisect_left(counts, True, key=lambda n: self.chain.cheapest(self._ranks(n))[0] < least) - 1

    def ranks_at(self, threshold: float) -> Ranks:
        """What is left of the ranks without the directions up to the threshold; all, where that would not save."""
        ranks = self._ranks(min(bisect_left(self.order, (threshold, 2)), self.most))
        return ranks if self.chain.cheapest(ranks)[0] < self.chain.parameters else self.chain.ranks

    def parameters_at(self, threshold: float) -> int:
        ranks = self.ranks_at(threshold)
        return self.chain.parameters if ranks == self.chain.ranks else self.chain.cheapest(ranks)[0]

    def lost(self, ranks: Ranks) -> tuple[float, ...]:
        """The saliency of the directions that go, of inputs and of outputs; none go where no rotation takes them."""
        sides = zip(self.saliencies, ranks, self.chain.cheapest(ranks)[1], strict=True)
        return tuple(float(s.sort().values[: len(s) - rank].sum()) if rotated else 0.0 for s, rank, rotated in sides)

    def build(self, ranks: Ranks) -> nn.Module:
        """The chain at these ranks in its cheapest form; old rotations and new ones are merged.

        A side without a rotation keeps all its directions: it costs the same with fewer.
        """
        form: Form = self.chain.cheapest(ranks)[1]
        a, g = self.chain.ranks_of_core(ranks)
        ranks = self.chain.ranks_of_core((a if form[0] else self.chain.ranks[0], g if form[1] else self.chain.ranks[1]))
        kept_in, kept_out = (s.topk(rank).indices for s, rank in zip(self.saliencies, ranks, strict=True))
        profile = self.basis.eigenvalues.double().sum(2)
        # A layer that no gradient reaches has no curvature: then all its directions count the same.
        profile = profile.clamp(min=LEAST_CURVATURE * float(profile.max()) or 1.0)
        scales = profile.sum(0) / profile.sum(), profile.sum(1)
        weight = self.basis.rotate(self.chain.weight())
        basis_in, core, basis_out = refitted(weight, scales, (kept_in, kept_out))
        first = (self.basis.inputs.double() @ basis_in).T
        last = self.basis.outputs.double() @ basis_out
        sign_in, sign_out = signs(first.T), signs(last)
        first, core, last = first * sign_in[:, None], core * sign_in[:, None] * sign_out[:, None, None], last * sign_out
        old_in, old_out = self.chain.rotations()
        first, last = first if old_in is None else first @ old_in, last if old_out is None else old_out @ last
        if not form[0]:
            core = torch.einsum("gak,ai->gik", core, first)
        if not form[1]:
            core = torch.einsum("og,gik->oik", last, core)
        return self.chain.rebuilt(first if form[0] else None, core, last if form[1] else None)

    def _ranks(self, removed: int) -> Ranks:
        outputs = sum(side for _, side in self.order[:removed])
        inputs, all_outputs = self.chain.ranks
        return inputs - (removed - outputs), all_outputs - outputs


def smallest_threshold(cuts: Sequence[Cut], parameters: float) -> float:
    """The smallest saliency up to which directions go, so that the chains have at most so many parameters.

    Where the limits do not allow so few: the largest saliency, at which each chain has reached its limit. Where they
    have so few already: less than any.
    """
    values = [-inf, *sorted({value for cut in cuts for value, _ in cut.order})]
    at = bisect_left(values, True, key=lambda t: sum(cut.parameters_at(t) for cut in cuts) <= parameters)
    return values[min(at, len(values) - 1)]


def missing(chain: Chain) -> Ranks:
    """How many input and output directions a chain's rotations have lost."""
    (i, o), (a, g), k = chain.sizes, chain.ranks, chain.kernel
    return (
        max(min(i, k * g if chain.form[1] else k * o) - a, 0) if chain.form[0] else 0,
        max(min(o, k * a if chain.form[0] else k * i) - g, 0) if chain.form[1] else 0,
    )


def draw(
    found: Sequence[Chain], scores: Sequence[tuple[float, float]], parameters: int, generator: torch.Generator
) -> list[Ranks]:
    """New input and output directions for each chain, drawn with probability proportional to the scores of its sides.

    None has more than it is missing, and all of them together have at most so many parameters; as many as that allows.
    """
    weights = torch.tensor(scores, dtype=torch.float64)
    if not float(weights[torch.tensor([missing(chain) for chain in found]) > 0].sum()):
        weights = torch.ones_like(weights)
    new: list[Ranks] = [(0, 0)] * len(found)
    costs = [_costs_of_next(chain, (0, 0)) for chain in found]
    while bool((is_open := weights * (torch.tensor(costs) <= parameters)).any()):
        at, side = divmod(int(torch.multinomial(is_open.reshape(-1), 1, generator=generator)), 2)
        parameters -= int(costs[at][side])
        new[at] = (new[at][0] + (side == 0), new[at][1] + (side == 1))
        costs[at] = _costs_of_next(found[at], new[at])
    return new


def _costs_of_next(chain: Chain, new: Ranks) -> tuple[float, float]:
    """Parameters of one more input direction, and of one more output direction; infinite where none is missing."""
    a, g = chain.ranks[0] + new[0], chain.ranks[1] + new[1]
    lacks = missing(chain)
    now, wider, higher = (chain.costs(ranks)[chain.form] for ranks in ((a, g), (a + 1, g), (a, g + 1)))
    return wider - now if new[0] < lacks[0] else inf, higher - now if new[1] < lacks[1] else inf


def grown(chain: Chain, new: Ranks, rate_factor: float, generator: torch.Generator) -> nn.Module:
    """The chain with so many new input and output directions, and a learning rate of their own.

    A new direction is random and orthogonal to the old ones; the core starts at zero along it, so that the chain
    computes what it did before.
    """
    core = chain.weight()
    outputs, inputs, kernel = core.shape
    wide = torch.zeros(outputs + new[1], inputs + new[0], kernel, dtype=core.dtype)
    wide[:outputs, :inputs] = core
    old_in, old_out = chain.rotations()
    rotate_in = None if old_in is None else _extended(old_in.T, new[0], generator).T
    rotate_out = None if old_out is None else _extended(old_out, new[1], generator)
    made = chain.rebuilt(rotate_in, wide, rotate_out)
    assert isinstance(made, nn.Sequential)
    for at, layer in enumerate(made):
        # Seen from the core, a rotation in has new rows, and a rotation out new columns.
        columns = new[0] if at == chain.core_at else new[1] if at > chain.core_at else 0
        rows = new[1] if at == chain.core_at else new[0] if at < chain.core_at else 0
        setattr(layer, RATES, _rates(layer, rows, columns, rate_factor))
    return made


def _extended(basis: Tensor, new: int, generator: torch.Generator) -> Tensor:
    """A basis with so many new columns of length 1, orthogonal to all others."""
    old, _ = torch.linalg.qr(basis)
    drawn = torch.randn(len(basis), new, generator=generator, dtype=basis.dtype)
    drawn, _ = torch.linalg.qr(drawn - old @ (old.T @ drawn))
    return torch.cat([basis, drawn], 1)


def _rates(layer: Any, rows: int, columns: int, factor: float) -> dict[str, Tensor]:
    weight = torch.ones_like(layer.weight.detach())
    weight[weight.shape[0] - rows :] = factor
    weight[:, weight.shape[1] - columns :] = factor
    if layer.bias is None or not rows:
        return {"weight": weight}
    bias = torch.ones_like(layer.bias.detach())
    bias[len(bias) - rows :] = factor
    return {"weight": weight, "bias": bias}
