"""Learned step size quantization (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.formats import SMALLEST_SCALE, Affine, AffineQuantizer, block_indices
from micronet_plugins.affine import ScaledQuantizer
from micronet_plugins.calibration import Observed, with_shifts
from micronet_plugins.layerwise import blocks_of


class LSQ(ScaledQuantizer):
    """Learned step sizes: integers whose scales, of weights and of activations, are trained with the weights.

    Each step s begins at 2 mean|v| / sqrt(Q), Q the largest code, of a weight over what is not zero. Its gradient is
    that of the rounded value, round(v / s) - v / s, times 1 / sqrt(N Q). It needs fine-tuning behind it: before, it is
    worse than `affine`. Use it for 2 to 4 bits; at more than 8 there is nothing to learn, and steps are so small that
    an optimizer overshoots them. Activations that are never negative, or that only a ReLU reads, have no sign.

    A step that is no power of two costs one more multiplication an output, and 32 bits. With `power_of_two` every step
    is the power of two nearest to what is learned, in the logarithm, and the gradient passes straight through: a shift,
    and 8 bits. (Jain et al. 2020, arXiv 1903.08066, learn the logarithms of thresholds, and round them up.) Such steps
    begin where the squared error is least.
    """

    weight_bits: int = Field(4, ge=2, le=8, description="bits of a weight")
    activation_bits: int = Field(
        4, ge=0, le=8, description="bits of an activation that is multiplied; 0 leaves activations as they are"
    )
    granularity: Literal["tensor", "channel"] = Field("tensor", description="what shares a step: tensor or channel")
    power_of_two: bool = Field(False, description="steps are powers of two, which cost no multiplications")

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        weight = getattr(layer, name).detach()
        blocks = blocks_of(layer, weight, self.granularity)
        where = block_indices(weight.shape, blocks).flatten()
        size = weight.abs().flatten().float()
        kept = torch.zeros(int(where.max()) + 1).index_add_(0, where, (size > 0).float())  # zeros fit any step
        means = torch.zeros(len(kept)).index_add_(0, where, size) / kept.clamp(min=1)
        half = 2 ** (self.weight_bits - 1)
        return self._learned(Affine(-half, half - 1, blocks, first_step(means, half - 1)), weight)

    def _learned(self, number_format: Affine, values: Tensor) -> AffineQuantizer:
        if not self.power_of_two:
            return AffineQuantizer(number_format, learned=True)
        quantizer = AffineQuantizer(with_shifts(number_format, values), learned=True)
        parametrize.register_parametrization(quantizer, "scale", PowerOfTwo())
        return quantizer

    def activation_quantizer(self, seen: Observed) -> AffineQuantizer:
        bits = self.activation_bits
        low, high = (0, 2**bits - 1) if seen.low >= 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        step = first_step(seen.sample.abs().mean().view(1).float(), high)
        return self._learned(Affine(low, high, (), step), seen.sample)


class PowerOfTwo(nn.Module):
    """The power of two nearest to each learned step, in the logarithm; the gradient passes straight through."""

    def forward(self, step: Tensor) -> Tensor:
        positive = step.clamp_min(SMALLEST_SCALE)
        nearest = torch.exp2(torch.log2(positive.double()).round()).to(step.dtype)
        return positive + (nearest - positive).detach()  # exact, as neither is twice the other

    def right_inverse(self, step: Tensor) -> Tensor:
        return step


def first_step(mean: Tensor, largest: int) -> Tensor:
    """2 mean|v| / sqrt(Q), or 1 where all values are 0."""
    step = 2 * mean / largest**0.5
    return torch.where(step > 0, step, 1.0)
