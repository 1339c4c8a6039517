"""Quantizers: operations that round to a format, visible to the tracer, and the modules that run them.

They are part of the model: what is trained and tested is what is counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from micronet_eval.formats.number import Affine, Codebook, FixedPoint, block_indices


@torch.library.custom_op("micronet::fixed_point", mutates_args=())
def fixed_point(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """`x` rounded to the nearest multiple of 2**exponent (ties to even), saturated to `bits` bits two's complement."""
    step = 2.0 ** int(exponent.item())
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # Adding 0.0 turns negative zeros, which fixed point does not have, into zeros.
    return ((x / step).round_().clamp_(low, high) + 0.0).mul_(step)


@fixed_point.register_fake
def _(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, exponent, bits = inputs
    ctx.save_for_backward(x, exponent)
    ctx.bits = bits


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Straight-through estimator (Bengio et al. 2013): the rounding passes the gradient, saturation stops it."""
    x, exponent = ctx.saved_tensors
    limit = 2.0 ** (int(exponent.item()) + ctx.bits - 1)
    return gradient * ((x >= -limit) & (x < limit)), None, None


fixed_point.register_autograd(_straight_through, setup_context=_save_for_backward)


class FixedPointQuantizer(nn.Module):
    """Rounds what passes through it to fixed point: an activation, or (as a parametrization) a weight."""

    exponent: Tensor

    def __init__(self, bits: int, exponent: int = 0) -> None:
        super().__init__()
        FixedPoint(bits, exponent)  # checks the bounds
        self.bits = bits
        self.register_buffer("exponent", torch.tensor(exponent, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = fixed_point(x, self.exponent, self.bits)
        return quantized

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"bits={self.bits}, exponent={int(self.exponent)}"


@torch.library.custom_op("micronet::affine", mutates_args=())
def affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, block_size: list[int]
) -> Tensor:
    """`x` rounded to (integer - zero point) * scale, the integers saturated to quant_min ... quant_max.

    `scale` and `zero_point` have one element for each block of `block_size` elements, in row-major order.
    """
    where = block_indices(x.shape, block_size)
    scales, zeros = scale[where], zero_point[where]
    return ((x / scales).round_() + zeros).clamp_(quant_min, quant_max).sub_(zeros).add_(0.0).mul_(scales)


@affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, block_size: list[int]) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("micronet::codebook", mutates_args=())
def codebook(x: Tensor, table: Tensor) -> Tensor:
    """Each element of `x` replaced by the nearest value of `table`, the smaller one of two that are equally near."""
    ordered = table.sort().values
    middles = (ordered[1:] + ordered[:-1]) / 2
    return ordered[torch.bucketize(x.contiguous(), middles)]


@codebook.register_fake
def _(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x)


class AffineQuantizer(nn.Module):
    """A parametrization that rounds a weight to integers with scales and zero points, one for each block of it."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, number_format: Affine) -> None:
        super().__init__()
        self.range, self.blocks = (number_format.low, number_format.high), number_format.blocks
        zeros = number_format.zero_points
        self.register_buffer("scale", number_format.scales)
        self.register_buffer("zero_point", torch.zeros(len(self.scale), dtype=torch.int32) if zeros is None else zeros)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = affine(x, self.scale, self.zero_point, *self.range, list(self.blocks))
        return quantized

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


class CodebookQuantizer(nn.Module):
    """A parametrization that replaces each weight by the nearest value of a table."""

    table: Tensor

    def __init__(self, number_format: Codebook) -> None:
        super().__init__()
        self.register_buffer("table", number_format.table)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = codebook(x, self.table)
        return quantized

    def right_inverse(self, x: Tensor) -> Tensor:
        return x
