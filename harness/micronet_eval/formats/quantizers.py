"""Quantizers: operations that round to a format, visible to the tracer, and the modules that run them.

They are part of the model: what is trained and tested is what is counted.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from micronet_eval.formats.number import (
    Affine,
    Codebook,
    FixedPoint,
    Format,
    OffGrid,
    Plain,
    Signs,
    bits_of_range,
    block_indices,
)


class ActivationQuantizer(nn.Module):
    """A quantizer that may follow a node of a graph; all of them serve as parametrizations of weights, too."""

    @property
    @abstractmethod
    def declared(self) -> int | str:
        """What the packed file says of it, from which `of_activations` builds it again: bits, or a format."""

    @abstractmethod
    def check(self) -> None:
        """Raises OffGrid where the exponent, scale or zero point is out of its bounds."""

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


def _operation(function: Callable[..., Tensor]) -> Any:
    """The function as an operation of torch, `micronet::` and its name; its result is like its first argument.

    torch.library.custom_op would wrap it for torch's compiler, which takes as long to import as all of torch.
    """
    name = f"micronet::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, lambda x, *more, **options: torch.empty_like(x))
    return getattr(torch.ops.micronet, function.__name__)


@cache
def _shift(step: float) -> Tensor:
    """1.5 * 2**23 steps, kept: to make a tensor of a number takes longer than to add it to an activation of an image.

    From numpy, so that it is an ordinary tensor of the CPU whatever torch's modes are when it is first made.
    """
    with torch.inference_mode(False):
        return torch.from_numpy(np.array(1.5 * 2**23 * step, np.float32))


@_operation
def fixed_point(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """`x` rounded to the nearest multiple of 2**exponent (ties to even), saturated to `bits` bits two's complement."""
    step = 2.0 ** int(exponent.item())
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if x.dtype == torch.float32 and bits <= 23:
        # Beside 1.5 * 2**23 steps, and so in the sum, neighbours of float32 are one step apart: adding rounds, and
        # leaves no negative zero, which fixed point does not have. Three passes over memory in the place of five.
        shift = _shift(step)
        return x.clamp(low * step, high * step).add_(shift).sub_(shift)
    return (x / step).round_().clamp_(low, high).add_(0.0).mul_(step)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, exponent, bits = inputs
    ctx.save_for_backward(x, exponent)
    ctx.bits = bits


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Straight-through estimator (Bengio et al. 2013): the rounding passes the gradient, saturation stops it."""
    x, exponent = ctx.saved_tensors
    limit = 2.0 ** (int(exponent.item()) + ctx.bits - 1)
    return gradient * ((x >= -limit) & (x < limit)), None, None


torch.library.register_autograd("micronet::fixed_point", _straight_through, setup_context=_save_for_backward)


class FixedPointQuantizer(ActivationQuantizer):
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

    @property
    def declared(self) -> int:
        return self.bits

    def check(self) -> None:
        FixedPoint(self.bits, int(self.exponent))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, exponent={int(self.exponent)}"


# --- integers with a scale --------------------------------------------------------------------------------------------

SMALLEST_SCALE = 2.0**-40
"""A learned scale stays positive, and what is divided by it finite."""


def _spread(values: Tensor, shape: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The value of each element's block, in a shape that broadcasts to `shape`."""
    if values.numel() == 1:
        return values.reshape(())
    spread = values.reshape([-(-n // b) for n, b in zip(shape, blocks, strict=True)])
    for dim, (n, b) in enumerate(zip(shape, blocks, strict=True)):
        if 1 < b < n:
            spread = spread.repeat_interleave(b, dim).narrow(dim, 0, n)
    return spread


def _sums(values: Tensor, like: Tensor, blocks: Sequence[int]) -> Tensor:
    """The sum over each block, in the shape of `like`."""
    if like.numel() == 1:
        return values.sum().reshape(like.shape)
    where = block_indices(values.shape, blocks).reshape(-1).to(values.device)
    return torch.zeros_like(like).reshape(-1).index_add_(0, where, values.reshape(-1)).view(like.shape)


@_operation
def affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    block_size: list[int],
    scale_gradient: float = 1.0,
) -> Tensor:
    """`x` rounded to (integer - zero point) * scale, the integers saturated to quant_min ... quant_max.

    `scale` and `zero_point` have one element for each block of `block_size` elements, in row-major order. The gradient
    of the scale is multiplied by `scale_gradient`.
    """
    scales = _spread(scale, x.shape, block_size)
    if zero_point is None:  # each pass over memory counts
        return (x / scales).round_().clamp_(quant_min, quant_max).add_(0.0).mul_(scales)
    zeros = _spread(zero_point, x.shape, block_size)
    return ((x / scales).round_() + zeros).clamp_(quant_min, quant_max).sub_(zeros).add_(0.0).mul_(scales)


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.rest = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _learned_step(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through within the range, ends included; LSQ's gradient of the step s (arXiv 1902.08153, eq. 3).

    dq/ds = round(v / s) - v / s within the range, and the saturated code beyond it.
    """
    x, scale, zero_point = ctx.saved_tensors
    low, high, blocks, factor = ctx.rest
    steps = x / _spread(scale, x.shape, blocks)
    if zero_point is not None:
        zeros = _spread(zero_point, x.shape, blocks)
        low, high = low - zeros, high - zeros
    codes = steps.clamp(low, high)
    inside = torch.eq(codes, steps, out=torch.empty_like(codes))  # a product with booleans takes four times as long
    of_scale = None
    if ctx.needs_input_grad[1]:
        of_scale = _sums((codes.round_() - steps * inside).mul_(gradient), scale, blocks) * factor
    return gradient * inside, of_scale, None, None, None, None, None


torch.library.register_autograd("micronet::affine", _learned_step, setup_context=_save_affine)


class AffineQuantizer(ActivationQuantizer):
    """Rounds to integers with scales and zero points: a weight, one for each block of it, or an activation.

    A format without blocks is one of the whole tensor, of whatever shape. `learned` makes the scale a parameter.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, number_format: Affine, learned: bool = False) -> None:
        super().__init__()
        self.range, self.blocks = (number_format.low, number_format.high), number_format.blocks
        self.learned = learned
        if learned:
            self.scale = nn.Parameter(number_format.scales.clone())
        else:
            self.register_buffer("scale", number_format.scales)
        self.register_buffer("zero_point", number_format.zero_points)

    @property
    def bits(self) -> int:
        return bits_of_range(*self.range)

    def forward(self, x: Tensor) -> Tensor:
        if not self.learned:  # tracing puts other tensors in the place of parameters
            fixed: Tensor = affine(x, self.scale, self.zero_point, *self.range, list(self.blocks or x.shape))
            return fixed
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        blocks = list(self.blocks or x.shape)
        quantized: Tensor = affine(x, scale, self.zero_point, *self.range, blocks, self._factor(x))
        return quantized

    def train(self, mode: bool = True) -> AffineQuantizer:
        """Sets the mode. A learned scale that a step took below the smallest is that one: what is packed computes.

        A scale under a parametrization is bounded there.
        """
        if self.learned:
            with torch.no_grad():
                self.scale.clamp_(min=SMALLEST_SCALE)
        return super().train(mode)

    def _factor(self, x: Tensor) -> float:
        """LSQ's gradient scale, 1 / sqrt(N Q): N weights that share the step, or features of one example."""
        shared = x.numel() / self.scale.numel() if self.blocks else x.numel() / max(1, x.shape[0])
        return float((max(1.0, shared) * self.range[1]) ** -0.5)

    @property
    def declared(self) -> str:
        low, high = self.range
        return f"affine:{low}:{high}" + ("" if self.zero_point is None else ":zeros")

    def check(self) -> None:
        Affine(*self.range, self.blocks, self.scale, self.zero_point)

    def extra_repr(self) -> str:
        return self.declared


# --- signs ------------------------------------------------------------------------------------------------------------


@_operation
def signs(x: Tensor, scale: Tensor, threshold: Tensor, block_size: list[int]) -> Tensor:
    """The sign of each element times the scale of its block, and 0 where its magnitude is not above the threshold."""
    kept = x.abs() > _spread(threshold, x.shape, block_size)
    return x.sign() * kept * _spread(scale, x.shape, block_size) + 0.0


def _save_signs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, threshold, ctx.blocks = inputs
    ctx.save_for_backward(x, scale, threshold)


def _through_signs(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through to the weights; the scale's gradient is the sum of its weights' by their signs."""
    x, scale, threshold = ctx.saved_tensors
    kept = x.abs() > _spread(threshold, x.shape, ctx.blocks)
    of_scale = _sums(gradient * x.sign() * kept, scale, ctx.blocks) if ctx.needs_input_grad[1] else None
    return gradient, of_scale, None, None


torch.library.register_autograd("micronet::signs", _through_signs, setup_context=_save_signs)


class SignQuantizer(nn.Module):
    """A parametrization that makes a weight binary or ternary: +scale, -scale, or 0 up to a threshold.

    One scale (learned) and one threshold for each block. At threshold 0 only zeros are 0, so that masks hold.
    """

    threshold: Tensor

    def __init__(self, scales: Tensor, thresholds: Tensor, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self.scale = nn.Parameter(scales)
        self.register_buffer("threshold", thresholds)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = signs(x, self.scale.clamp_min(SMALLEST_SCALE), self.threshold, list(self.blocks))
        return quantized

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


# --- tables -----------------------------------------------------------------------------------------------------------


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """The place in the table of the value nearest to each element."""
    ordered, order = table.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(x.contiguous(), middles)]


@_operation
def codebook(x: Tensor, table: Tensor) -> Tensor:
    """Each element of `x` replaced by the nearest value of `table`, the smaller one of two that are equally near."""
    return table[_nearest(x, table)]


def _save_codebook(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _through_table(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through to the weights; each value gets the sum of its weights' (arXiv 1510.00149), 0 stays 0."""
    x, table = ctx.saved_tensors
    of_table = None
    if ctx.needs_input_grad[1]:
        of_table = torch.zeros_like(table).index_add_(0, _nearest(x, table).reshape(-1), gradient.reshape(-1))
        of_table = of_table * (table != 0)
    return gradient, of_table


torch.library.register_autograd("micronet::codebook", _through_table, setup_context=_save_codebook)


class CodebookQuantizer(nn.Module):
    """A parametrization that replaces each weight by the nearest value of a table; `learned` makes it a parameter."""

    table: Tensor

    def __init__(self, number_format: Codebook, learned: bool = False) -> None:
        super().__init__()
        if learned:
            self.table = nn.Parameter(number_format.table.clone())
        else:
            self.register_buffer("table", number_format.table)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = codebook(x, self.table)
        return quantized

    def right_inverse(self, x: Tensor) -> Tensor:
        return x


# --- accumulators -----------------------------------------------------------------------------------------------------


@_operation
def accumulator(x: Tensor, input_step: Tensor, weight_step: Tensor, bias: Tensor | None, bits: int, dim: int) -> Tensor:
    """What the dot products `x` come to in two's-complement integers of `bits` bits, which wrap around.

    `x` was summed wide, bias included: integers times both steps. Integers modulo 2**bits have one sum, in whatever
    order they are added, so that it follows from the wide one. The bias is added behind it. A step is a scale, or, as
    an integer, the exponent of a power of two; the weight's has one element, or one for each output, which dimension
    `dim` of `x` counts.
    """
    sums, step = integer_sums(x, input_step, weight_step, bias, dim)
    turns = sums.add_(2 ** (bits - 1)).div_(2**bits).floor_()
    wrapped: Tensor = x - turns * (2**bits * step)
    return wrapped


def integer_sums(
    x: Tensor, input_step: Tensor, weight_step: Tensor, bias: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """The integers that `accumulator` sums, without the bias, and the product of the steps, which broadcasts to `x`."""
    shape = [1] * x.dim()
    shape[dim] = -1
    step = (_step(input_step) * _step(weight_step)).reshape(shape)
    sums = x if bias is None else x - bias.reshape(shape)
    return (sums / step).round_(), step


def _step(tensor: Tensor) -> Tensor:
    return tensor.flatten() if tensor.is_floating_point() else torch.exp2(tensor.flatten().float())


def _straight_on(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """A sum that wraps still rises with its terms."""
    return gradient, None, None, None, None, None


torch.library.register_autograd("micronet::accumulator", _straight_on)


# --- from what a file declares ----------------------------------------------------------------------------------------

_AFFINE_OF_ACTIVATIONS = re.compile(r"affine:(-?\d{1,6}):(-?\d{1,6})(:zeros)?")


def of_activations(declared: int | str) -> ActivationQuantizer:
    """The quantizer of activations that is `declared`: an int is the bits of fixed point. Its scale is not yet set.

    Raises OffGrid where there is no such quantizer.
    """
    if isinstance(declared, int):
        return FixedPointQuantizer(declared)
    found = _AFFINE_OF_ACTIVATIONS.fullmatch(declared)
    if found is None:
        raise OffGrid(f"no quantizer of activations {declared!r}; known: BITS, affine:LOW:HIGH, affine:LOW:HIGH:zeros")
    low, high = int(found[1]), int(found[2])
    zeros = torch.tensor([low], dtype=torch.int32) if found[3] else None
    return AffineQuantizer(Affine(low, high, (), torch.ones(1), zeros))


def of_weights(number_format: Format) -> nn.Module | None:
    """The parametrization that keeps a weight in its format while the model runs; None where it needs none.

    Raises OffGrid where there is none that could.
    """
    if isinstance(number_format, Signs):
        number_format = number_format.base
    if isinstance(number_format, FixedPoint):
        return FixedPointQuantizer(number_format.bits, number_format.exponent)
    if isinstance(number_format, Affine):
        return AffineQuantizer(number_format)
    if isinstance(number_format, Codebook):
        return CodebookQuantizer(number_format)
    if not isinstance(number_format, Plain):
        raise OffGrid(f"{number_format.spec} cannot be set into a model")
    return None
