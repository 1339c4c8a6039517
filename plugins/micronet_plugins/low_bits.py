"""Binary and ternary weights: a sign and a scale (XNOR-Net's BWN, arXiv 1603.05279; TWN, arXiv 1605.04711)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.formats import SignQuantizer, block_indices
from micronet_plugins.layerwise import ActivationBits, WeightQuantizer, blocks_of


class _Signs(WeightQuantizer):
    activation_bits: ActivationBits = Field(
        0, ge=0, le=16, description="bits of an activation; at 0 it keeps its sign bit, so a product counts 1/32"
    )
    granularity: Literal["tensor", "channel"] = Field("channel", description="what shares a scale: tensor or channel")

    def _signs(self, layer: nn.Module, name: str, factor: float) -> nn.Module:
        """Thresholds are `factor` x the mean magnitude of what is not 0, scales the mean of the magnitudes above."""
        weight = getattr(layer, name).detach()
        blocks = blocks_of(layer, weight, self.granularity)
        where, sizes = block_indices(weight.shape, blocks).flatten(), weight.abs().flatten()
        thresholds = factor * _means(sizes, where, (sizes > 0).to(sizes.dtype))
        scales = _means(sizes, where, (sizes > thresholds[where]).to(sizes.dtype))
        return SignQuantizer(torch.where(scales > 0, scales, 1.0), thresholds, blocks)


class Binary(_Signs):
    """Binary weights: their signs times a scale, per channel or tensor; a product with a float counts 1/32.

    The scale starts at mean|w|, the best for given signs (arXiv 1603.05279), and is then learned. A weight takes 1 bit,
    a scale 32 bits and one multiplication an output. Weights that a mask holds at 0 stay 0. Activations stay in
    floating point: a product is 1/32 of an operation only where the sign stands for itself. It needs fine-tuning behind
    it. Use it for wide layers of robust networks.
    """

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        return self._signs(layer, name, 0.0)


class Ternary(_Signs):
    """Ternary weights: -scale, 0 or +scale by a threshold; zeros are not multiplied, other products count 1/32.

    The threshold is 0.7 mean|w|. The scale starts at the mean of |w| above it (arXiv 1605.04711) and is then learned,
    as in arXiv 1612.01064, but one for both signs: with two, products would be no sign flips. Stored are 1 bit a weight
    for where it is not 0, and 1 bit a sign. It needs fine-tuning behind it. Use it where `binary` loses too much.
    """

    threshold: float = Field(0.7, gt=0, description="share of mean|w| up to which a weight is 0")

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        return self._signs(layer, name, self.threshold)


def _means(values: Tensor, where: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values of each block that are counted (1, not 0), and 0 where none is."""
    zeros = torch.zeros(int(where.max()) + 1, dtype=values.dtype)
    return zeros.index_add(0, where, values * counted) / zeros.index_add(0, where, counted).clamp(min=1)
