"""Learned step size quantization (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.formats import SMALLEST_SCALE, Affine, AffineQuantizer
from micronet_plugins.affine import ScaledQuantizer
from micronet_plugins.calibration import Observed, with_least_error
from micronet_plugins.layerwise import blocks_of


class LSQ(ScaledQuantizer):
    """Learned step sizes: integers whose scales, of weights and of activations, are trained with the weights.

    Each step s begins where the squared error is least (as those of activations in LSQ+, Bhalgat et al. 2020, arXiv
    2004.09576; the 2 mean|v| / sqrt(Q) of the paper lose more before training). Its gradient is that of the rounded
    value, round(v / s) - v / s, times 1 / sqrt(N Q), Q the largest code. Use it for 2 to 4 bits; at more than 8 there
    is nothing to learn, and steps are so small that an optimizer overshoots them. Activations that are never negative,
    or that only a ReLU reads, have no sign. At 4 bits and fewer give the first and the last layer 8 bits, as the paper
    does, take `activations = "layers"`, and scales by channel with `keep_batch_norm`.

    A step that is no power of two costs one more multiplication an output, and 32 bits. With `power_of_two` every step
    is the power of two nearest to what is learned, in the logarithm, and the gradient passes straight through: a shift,
    and 8 bits. (Jain et al. 2020, arXiv 1903.08066, learn the logarithms of thresholds, and round them up.)
    """

    weight_bits: int = Field(4, ge=2, le=8, description="bits of a weight")
    activation_bits: int = Field(
        4, ge=0, le=8, description="bits of an activation that is multiplied; 0 leaves activations as they are"
    )
    granularity: Literal["tensor", "channel"] = Field("tensor", description="what shares a step: tensor or channel")
    power_of_two: bool | Literal["activations"] = Field(
        False, description="steps are powers of two, which cost no multiplications: all, or those of activations"
    )

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        weight = getattr(layer, name)
        half = 2 ** (self.weight_bits - 1)
        # Batch norm may change the sign of an output: its integers need their counterparts.
        low = 1 - half if self.keep_batch_norm else -half
        blocks = blocks_of(layer, weight, self.granularity)
        return _learned(weight, low, half - 1, blocks, self.power_of_two is True)

    def activation_quantizer(self, seen: Observed) -> AffineQuantizer:
        half = 2 ** (self.activation_bits - 1)
        low, high = (0, 2 * half - 1) if seen.low >= 0 else (-half, half - 1)
        return _learned(seen.sample, low, high, (), bool(self.power_of_two))


def _learned(values: Tensor, low: int, high: int, blocks: tuple[int, ...], power_of_two: bool) -> AffineQuantizer:
    unknown = Affine(low, high, blocks, torch.ones(1))
    quantizer = AffineQuantizer(with_least_error(unknown, values, power_of_two), learned=True)
    if power_of_two:
        parametrize.register_parametrization(quantizer, "scale", PowerOfTwo())
    return quantizer


class PowerOfTwo(nn.Module):
    """The power of two nearest to each learned step, in the logarithm; the gradient passes straight through."""

    def forward(self, step: Tensor) -> Tensor:
        positive = step.clamp_min(SMALLEST_SCALE)
        nearest = torch.exp2(torch.log2(positive.double()).round()).to(step.dtype)
        return positive + (nearest - positive).detach()  # exact, as neither is twice the other

    def right_inverse(self, step: Tensor) -> Tensor:
        return step
