"""Magnitude sparsity (Han et al. 2015, arXiv 1506.02626), and what all sparsifiers share: choosing zeros, holding them.

How many weights each layer loses is the allocation. LAMP: Lee et al. 2021, arXiv 2010.07611. ERK (Erdos-Renyi kernel):
Evci et al. 2020, arXiv 1911.11134.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.conditional import paths_of
from micronet_eval.costs.dot_products import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Sparsifier
from micronet_eval.structure import Mask, copied, original_of
from micronet_eval.trace import trace
from micronet_plugins.weights import by_weight, grouped, parametrizations_of, sharing, weight_of

SPARSITY = Field(0.5, gt=0, lt=1, description="share of all weights of convolutions and linear layers")
LIMIT = Field(0.95, gt=0, lt=1, description="largest share that one layer may lose")
Scope = Literal["global", "layer", "lamp", "erk"]
MAC_COST = Field(
    0.0, ge=0, description="stored weights that a MAC is worth, where scope is global or lamp: dear weights go first"
)
SHARING = "how layers share the sparsity, as the sparsifier magnitude explains"


class Magnitude(Sparsifier):
    """Zeros the smallest weights: of the whole network, of each layer, or allocated by LAMP or ERK.

    `global` ranks |w| over all layers. `layer` takes the same share of each. `lamp` ranks w^2 divided by the sum of
    all squares in the layer that are not smaller, the error that removing it makes. `erk` keeps of each layer a density
    proportional to (inputs + outputs + kernel sides) / (inputs x outputs x kernel), so that small layers stay dense.
    The strong default without data; `lamp` and `erk` at high sparsity, where `global` empties whole layers.

    A weight of an early layer is used at many positions, and costs an operation at each. With `mac_cost` a weight's
    rank, w^2 or LAMP's score, is divided by 1 + mac_cost x positions: of equal harm the dearer weight goes first.
    """

    sparsity: float = SPARSITY
    scope: Scope = Field("global", description=SHARING)
    limit: float = LIMIT
    mac_cost: float = MAC_COST

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        layers = list(by_weight(model).values())
        costs = costs_of(model, layers, self.mac_cost, context)
        for layer, count in zip(layers, allocated(layers, self.scope, self.sparsity, self.limit, costs), strict=True):
            zero_smallest(model, layer, weight_of(layer).abs(), count)
        return model


def costs_of(model: nn.Module, layers: Sequence[nn.Module], mac_cost: float, context: Context) -> list[float]:
    """What a weight of each layer costs, in stored weights: 1 + mac_cost x the positions where it is used."""
    if not mac_cost:
        return [1.0] * len(layers)
    return [1 + mac_cost * n for n in positions(model, layers, context)]


def positions(model: nn.Module, layers: Sequence[nn.Module], context: Context) -> list[int]:
    """How often each layer's weights are multiplied for an example: the elements of an output channel; 0 for never.

    Whatever multiplies by the weight counts, layers that share it and functions, too; of several paths through a model
    the one that does most.
    """
    elements: Counter[tuple[str | None, str]] = Counter()
    for op in trace(model, context.example_input).ops:
        if op.name in FORMULAS:
            for name in {leaf.name for value in op.inputs if value.is_constant for leaf in value.leaves()}:
                elements[name, op.path] += op.out.numel
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    most = [max(elements[names[id(original_of(x, "weight"))], path] for path in paths_of(model)) for x in layers]
    return [count // dimensions(layer)[0] for count, layer in zip(most, layers, strict=True)]


def allocated(
    layers: Sequence[nn.Module], scope: Scope, sparsity: float, limit: float, costs: Sequence[float] | None = None
) -> list[int]:
    """How many weights each layer loses: together `sparsity` of all, as far as `limit` allows.

    `costs` divide what a weight of each layer is worth in the scopes that rank over all layers.
    """
    magnitudes = [weight_of(layer).abs().flatten() for layer in layers]
    if scope == "layer":
        return [share_of(m.numel(), sparsity, limit) for m in magnitudes]
    if scope == "erk":
        densities = erk_densities([dimensions(layer) for layer in layers], 1 - sparsity, 1 - limit)
        return [share_of(m.numel(), 1 - d, limit) for d, m in zip(densities, magnitudes, strict=True)]
    return zeros_by_layer(worths(magnitudes, scope, costs or [1.0] * len(layers)), sparsity, limit)


def share_of(count: int, share: float, limit: float) -> int:
    """The nearest whole number to a share of so many, not above the limit's."""
    return min(round(share * count), int(limit * count))


def worths(magnitudes: Sequence[Tensor], scope: Literal["global", "lamp"], costs: Sequence[float]) -> list[Tensor]:
    """Scores that rank over all layers: w^2, or LAMP's, by what a weight of the layer costs."""
    worth = lamp_scores if scope == "lamp" else lambda m: m.double().square()
    return [worth(m) / cost for m, cost in zip(magnitudes, costs, strict=True)]


def lamp_scores(magnitudes: Tensor) -> Tensor:
    """w^2 / (sum of v^2 over all v of the layer with |v| >= |w|): [n] of [n]. 1 for the largest, 0 for a zero."""
    squares = magnitudes.double().square()
    order = squares.argsort(stable=True)
    rest = squares[order].flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter(0, order, squares[order] / rest.clamp(min=1e-300))


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float, least: float = 0.0) -> list[float]:
    """The share of weights that each layer keeps, in all `density` of them, none below `least` or above 1.

    A shape is (outputs, inputs, kernel sides...); densities are proportional to the sum of its sides by their product.
    Layers that would keep more than all, or less than the least, are set there and the others share what is left.
    """
    sizes = [float(torch.Size(shape).numel()) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    low, high = 0.0, max(1 / r for r in raw)  # at the upper end all layers are full
    for _ in range(100):
        middle = (low + high) / 2
        kept = sum(size * min(1.0, max(least, middle * r)) for size, r in zip(sizes, raw, strict=True))
        low, high = (middle, high) if kept < density * sum(sizes) else (low, middle)
    return [min(1.0, max(least, high * r)) for r in raw]


def dimensions(layer: nn.Module) -> tuple[int, ...]:
    """Outputs, the inputs that each of them sees, and the sides of the kernel."""
    weight = weight_of(layer)
    groups, outputs, inputs, _ = grouped(layer, weight).shape
    return groups * outputs, inputs, *weight.shape[2:]


def zeros_by_layer(scores: Sequence[Tensor], sparsity: float, limit: float) -> list[int]:
    """How many of its lowest scores each layer loses: together the lowest of all, up to `limit` in a layer."""
    candidates = [s.sort(stable=True).values[: int(limit * s.numel())] for s in scores]
    wanted = min(round(sparsity * sum(s.numel() for s in scores)), sum(c.numel() for c in candidates))
    owner = torch.cat([torch.full_like(c, i, dtype=torch.int64) for i, c in enumerate(candidates)])
    chosen = owner[torch.cat(candidates).argsort(stable=True)[:wanted]]
    return torch.bincount(chosen, minlength=len(scores)).tolist()


def zero_smallest(model: nn.Module, layer: nn.Module, scores: Tensor, count: int) -> None:
    """Holds the `count` weights with the lowest scores [all weights, flat] at zero; of equals the first."""
    set_mask(model, layer, without_lowest(scores, count).view_as(weight_of(layer)))


def without_lowest(scores: Tensor, count: int) -> Tensor:
    """Mask [the scores' shape] of all but the `count` lowest; of equals the first go."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = False
    return mask.view_as(scores)


def set_mask(model: nn.Module, layer: nn.Module, mask: Tensor) -> None:
    """Holds the weight's zeros at `mask`; a mask that is there already takes the new zeros.

    All modules that hold the weight share the mask, an embedding that is tied to the layer among them.

    Raises InputError where a quantizer would come before the mask: what a mask makes of codes is no code any more.
    """
    for parametrization in parametrizations_of(layer) or ():
        if isinstance(parametrization, Mask):
            parametrization.mask &= mask
            return
    if parametrizations_of(layer) is not None:
        raise InputError("the weights are quantized already; put the sparsifier before the quantizer")
    shared = Mask(mask)
    for other, name in sharing(model, layer):
        parametrize.register_parametrization(other, name, shared)
