"""Magnitude sparsity (Han et al. 2015, arXiv 1506.02626): the smallest weights become zero."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.strategy import Context, Sparsifier
from micronet_eval.structure import Mask, copied


class Magnitude(Sparsifier):
    """Zeros the smallest weights of the whole network, no layer losing more than a limit."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of all weights of convolutions and linear layers")
    limit: float = Field(0.95, gt=0, lt=1, description="largest share that one layer may lose")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        magnitudes = [layer.weight.detach().abs().flatten() for layer in layers]
        zeros = zeros_by_layer(magnitudes, self.sparsity, self.limit)
        for layer, magnitude, count in zip(layers, magnitudes, zeros, strict=True):
            mask = torch.ones_like(magnitude, dtype=torch.bool)
            mask[magnitude.argsort(stable=True)[:count]] = False
            set_mask(layer, mask.view_as(layer.weight))
        return model


def zeros_by_layer(magnitudes: list[Tensor], sparsity: float, limit: float) -> list[int]:
    """How many of its smallest weights each layer loses: together the smallest of all, up to `limit` in a layer."""
    candidates = [m.sort(stable=True).values[: int(limit * m.numel())] for m in magnitudes]
    wanted = min(round(sparsity * sum(m.numel() for m in magnitudes)), sum(c.numel() for c in candidates))
    owner = torch.cat([torch.full_like(c, i, dtype=torch.int64) for i, c in enumerate(candidates)])
    chosen = owner[torch.cat(candidates).argsort(stable=True)[:wanted]]
    return torch.bincount(chosen, minlength=len(magnitudes)).tolist()


def set_mask(layer: nn.Module, mask: Tensor) -> None:
    """Holds the weight's zeros at `mask`; a mask that is there already takes the new zeros."""
    if parametrize.is_parametrized(layer, "weight"):
        for parametrization in layer.parametrizations["weight"]:  # type: ignore[index]
            if isinstance(parametrization, Mask):
                parametrization.mask &= mask
                return
    parametrize.register_parametrization(layer, "weight", Mask(mask))
