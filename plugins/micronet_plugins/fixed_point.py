"""Uniform fixed point with a power-of-two step shared by a tensor, as the WaveComp entry quantized."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.merge import without_batch_norm
from micronet_eval.placement import multiplied_nodes
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import StructureError, copied, quantizers_of, set_quantizers, traced


class FixedPointStrategy(Quantizer):
    """Fixed point for all weights, and for every activation that feeds a multiplication."""

    weight_bits: int = Field(8, ge=2, le=24, description="bits of a weight, a bias, a scale")
    activation_bits: int = Field(8, ge=2, le=24, description="bits of an activation")
    weight_sigmas: float = Field(
        10, gt=0, description="|mean| + so many standard deviations fit a weight tensor's range"
    )
    activation_sigmas: float = Field(18, gt=0, description="the same for an activation, over calibration data")
    batches: int = Field(4, gt=0, description="batches of training data for calibration")
    weights_only: bool = Field(False, description="leave activations as they are, at their 32 bits")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = without_batch_norm(copied(model))
        if self.weights_only:
            quantize_parameters(model, self.weight_bits, self.weight_sigmas)
            return model.eval()
        try:
            graph = traced(model)
            quantize_parameters(graph, self.weight_bits, self.weight_sigmas)
            nodes = multiplied_nodes(graph, context.example_input, self.activation_bits, context.formulas)
            set_quantizers(graph, {name: FixedPointQuantizer(self.activation_bits) for name in nodes})
        except StructureError as error:
            hint = "weights_only = true quantizes the weights and leaves activations as they are"
            raise InputError(f"fixed-point: {error}; {hint}") from error
        calibrate(graph, context, self.batches, self.activation_sigmas)
        return graph.eval()


def exponent_for(bound: float, bits: int) -> int:
    """The smallest exponent with which `bound` fits into `bits` bits of two's complement."""
    if bound <= 0 or not math.isfinite(bound):
        return 0
    return min(max(math.ceil(math.log2(bound / (2 ** (bits - 1) - 1))), -126), 100)


def sigma_bound(mean: float, std: float, sigmas: float) -> float:
    """|mean| + s std, the range that WaveComp makes fit."""
    return abs(mean) + sigmas * std


def quantize_parameters(model: nn.Module, bits: int, sigmas: float) -> None:
    """Quantizes every parameter of a model from here on."""
    for module, name in parameters_of(model):
        quantize_parameter(module, name, bits, sigmas)


def quantize_parameter(layer: nn.Module, name: str, bits: int, sigmas: float) -> None:
    """Quantizes one parameter of a layer from here on; masks stay in force."""
    values: Tensor = getattr(layer, name).detach().double()
    bound = sigma_bound(values.mean().item(), values.std(correction=0).item(), sigmas)
    # More range than the largest value needs is of no use.
    bound = min(bound, values.abs().max().item())
    parametrize.register_parametrization(layer, name, FixedPointQuantizer(bits, exponent_for(bound, bits)))


def parameters_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter as its module and name there, those under parametrizations by the name that they go by."""
    found: list[tuple[nn.Module, str]] = []
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        found += [(module, name) for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            found += [(module, name) for name in module.parametrizations]
    return found


def calibrate(model: nn.Module, context: Context, batches: int, sigmas: float) -> None:
    """Sets the exponents of all activation quantizers from the mean and deviation of what reaches them unquantized."""
    quantizers = quantizers_of(model)
    sums: dict[str, Tensor] = {name: torch.zeros(2, dtype=torch.float64) for name in quantizers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            std, mean = torch.std_mean(args[0].double(), correction=0)
            sums[name] += torch.stack([mean, std])
            return args[0]

        return hook

    hooks = [quantizer.register_forward_hook(watch(name)) for name, quantizer in quantizers.items()]
    count = 0
    try:
        with torch.no_grad(), parametrize.cached():
            for inputs in context.calibration(batches):
                model(inputs)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    for name, quantizer in quantizers.items():
        mean, std = (sums[name] / count).tolist()
        quantizer.exponent.fill_(exponent_for(sigma_bound(mean, std, sigmas), quantizer.bits))
