"""What quantizers are calibrated on: the values of a weight, or those that reach an activation quantizer.

Three ways to choose a range. `sigma`: |mean| + so many standard deviations, as WaveComp did. `max`: all that was seen.
`mse`: the range whose rounding and saturation together have the smallest squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, block_indices, fixed_point
from micronet_eval.strategy import Context
from micronet_eval.structure import quantizers_of

Calibration = Literal["sigma", "max", "mse"]

_SAMPLE = 1 << 14  # values of each batch that are kept


@dataclass(frozen=True)
class Observed:
    """Mean and standard deviation (averages over batches), smallest and largest value, and a sample, evenly spaced."""

    mean: float
    std: float
    low: float
    high: float
    sample: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Observed:
        values = values.detach().double().reshape(-1)
        std, mean = torch.std_mean(values, correction=0)
        sample = values[:: -(-values.numel() // _SAMPLE)].clone()
        return cls(mean.item(), std.item(), values.min().item(), values.max().item(), sample)

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))


def observe(model: nn.Module, context: Context, batches: int) -> dict[str, Observed]:
    """What reaches each activation quantizer of `model` while none of them rounds, over batches of training data.

    Raises InputError where there is no training data.
    """
    quantizers = quantizers_of(model)
    seen: dict[str, list[Observed]] = {name: [] for name in quantizers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            seen[name].append(Observed.of(args[0]))
            return args[0]

        return hook

    hooks = [quantizer.register_forward_hook(watch(name)) for name, quantizer in quantizers.items()]
    try:
        with torch.no_grad(), parametrize.cached():
            for inputs in context.calibration(batches):
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(seen.values()):
        raise InputError("calibration: there is no training data")
    return {name: _together(parts) for name, parts in seen.items()}


def _together(parts: list[Observed]) -> Observed:
    count = len(parts)
    return Observed(
        sum(p.mean for p in parts) / count,
        sum(p.std for p in parts) / count,
        min(p.low for p in parts),
        max(p.high for p in parts),
        torch.cat([p.sample for p in parts]),
    )


# --- fixed point ------------------------------------------------------------------------------------------------------


def exponent_for(bound: float, bits: int) -> int:
    """The smallest exponent with which `bound` fits into `bits` bits of two's complement."""
    if bound <= 0 or not math.isfinite(bound):
        return 0
    return min(max(math.ceil(math.log2(bound / (2 ** (bits - 1) - 1))), -126), 100)


def sigma_bound(mean: float, std: float, sigmas: float) -> float:
    """|mean| + s std, the range that WaveComp makes fit."""
    return abs(mean) + sigmas * std


def exponent_of(seen: Observed, bits: int, calibration: Calibration, sigmas: float = math.inf) -> int:
    """The exponent of fixed point for what was seen. `mse` tries the one that `max` gives and the 8 below it."""
    if calibration == "sigma":
        return exponent_for(sigma_bound(seen.mean, seen.std, sigmas), bits)
    largest = exponent_for(seen.largest, bits)
    if calibration == "max":
        return largest
    errors = {}
    for exponent in range(largest, max(largest - 9, -127), -1):
        rounded = fixed_point(seen.sample, torch.tensor(exponent), bits)
        errors[exponent] = (rounded - seen.sample).square().sum().item()
    return min(errors, key=errors.__getitem__)


# --- integers with a scale --------------------------------------------------------------------------------------------

_SHRINK = torch.linspace(1, 0.2, 41)  # shares of the whole range that `mse` tries


def affine_format(
    values: Tensor,
    bits: int,
    blocks: tuple[int, ...],
    symmetric: bool = True,
    calibration: Calibration = "max",
    sigmas: float = math.inf,
) -> Affine:
    """Integers of `bits` bits with a scale for each block of `values`, and a zero point unless `symmetric`.

    Symmetric are -(2**(bits-1) - 1) ... 2**(bits-1) - 1, or 0 ... 2**bits - 1 where nothing is negative. The range of
    a block always holds 0, so that zeros stay zero: scale = (high - low) / (2**bits - 1), zero point = -low / scale.
    """
    values = values.detach().double()
    low, high = _ranges(values, blocks, calibration, sigmas)
    if calibration != "mse":
        return _affine_of_range(low, high, bits, blocks, symmetric)
    where = block_indices(values.shape, blocks)
    best = torch.full_like(low, math.inf)
    share = torch.ones_like(low)
    for shrink in _SHRINK.double():
        tried = _affine_of_range(low * shrink, high * shrink, bits, blocks, symmetric)
        error = _errors(values, tried, where)
        share = torch.where(error < best, shrink, share)
        best = torch.minimum(error, best)
    return _affine_of_range(low * share, high * share, bits, blocks, symmetric)


def with_least_error(number_format: Affine, values: Tensor, power_of_two: bool) -> Affine:
    """The same with the scales that have the least squared error, block by block: where steps that are learned begin.

    Tried are the one with which the largest magnitude fits above zero and those below it, an eighth of an octave apart,
    to 1 / 256 of it; with `power_of_two` the powers of two among them, from the next above. 1 where all values are 0.
    """
    values = values.detach().double()
    blocks = number_format.blocks or tuple(values.shape)
    where, (low, high) = block_indices(values.shape, blocks), _ranges(values, blocks, "max", math.inf)
    largest = torch.maximum(-low, high)
    above_zero = max(number_format.high, 1)  # 1 bit with a sign has no code there
    octaves = torch.where(largest > 0, (largest / above_zero).log2(), 0.0)
    octaves = (octaves.ceil() if power_of_two else octaves).clamp(-118, 127)
    scales = [torch.exp2(octaves - less).float() for less in torch.arange(0, 8.1, 1 if power_of_two else 1 / 8)]
    errors = [_errors(values, replace(number_format, scales=tried), where) for tried in scales]
    best = torch.stack(errors).argmin(0)
    return replace(number_format, scales=torch.stack(scales)[best, torch.arange(len(best))])


def _ranges(values: Tensor, blocks: tuple[int, ...], calibration: Calibration, sigmas: float) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each block, 0 among them; within mean -+ sigmas x deviation for `sigma`."""
    where, flat = block_indices(values.shape, blocks).flatten(), values.flatten()
    zeros = torch.zeros(int(where.max()) + 1, dtype=torch.float64)
    low, high = zeros.scatter_reduce(0, where, flat, "amin"), zeros.scatter_reduce(0, where, flat, "amax")
    if calibration == "sigma":
        count = torch.bincount(where)
        mean = zeros.index_add(0, where, flat) / count
        spread = sigmas * (zeros.index_add(0, where, (flat - mean[where]).square()) / count).sqrt()
        low, high = torch.maximum(low, (mean - spread).clamp(max=0)), torch.minimum(high, (mean + spread).clamp(min=0))
    return low, high


def _affine_of_range(low: Tensor, high: Tensor, bits: int, blocks: tuple[int, ...], symmetric: bool) -> Affine:
    unsigned = not symmetric or not bool((low < 0).any())
    first, last = (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    span = torch.maximum(-low, high) if symmetric else high - low
    scales = (span / last).float()
    scales = torch.where(scales > 0, scales, 1.0)
    zeros = None if symmetric else (-low / scales).round().clamp(first, last).to(torch.int32)
    return Affine(first, last, blocks, scales, zeros if zeros is not None and bool(zeros.any()) else None)


def _errors(values: Tensor, tried: Affine, where: Tensor) -> Tensor:
    """The squared error of each block, summed."""
    scales = tried.scales.double()[where]
    zeros = 0 if tried.zero_points is None else tried.zero_points[where]
    rounded = ((values / scales).round() + zeros).clamp(tried.low, tried.high).sub(zeros) * scales
    errors = torch.zeros(len(tried.scales), dtype=torch.float64)
    return errors.index_add_(0, where.flatten(), (rounded - values).square().flatten())
