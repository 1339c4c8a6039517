"""Uniform fixed point with a power-of-two step shared by a tensor, as the WaveComp entry quantized."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from micronet_eval.errors import InputError
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.merge import without_batch_norm
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import StructureError, copied, quantizers_of, traced
from micronet_plugins.calibration import Calibration, Observed, exponent_for, exponent_of, observe, sigma_bound
from micronet_plugins.layerwise import nodes_to_quantize, parameters_of, quantize_each, set_fixed_point


class FixedPointStrategy(Quantizer):
    """Fixed point for all weights, and for every activation that feeds a multiplication.

    value = code x 2^exponent, an 8-bit exponent for each tensor. The steps are shifts, so nothing is multiplied by
    them. Use it first: it is the cheapest format at a bit-width, and all that the official figure needs.
    """

    weight_bits: int = Field(8, ge=2, le=24, description="bits of a weight, a bias, a scale")
    activation_bits: int = Field(8, ge=2, le=24, description="bits of an activation")
    calibration: Calibration = Field(
        "sigma", description="range of weights: sigma, max (of all values) or mse (least squared error)"
    )
    activation_calibration: Calibration = Field("sigma", description="range of activations: sigma, max or mse")
    weight_sigmas: float = Field(
        10, gt=0, description="|mean| + so many standard deviations fit a weight tensor's range"
    )
    activation_sigmas: float = Field(18, gt=0, description="the same for an activation, over calibration data")
    batches: int = Field(4, gt=0, description="batches of training data for calibration")
    weights_only: bool = Field(False, description="leave activations as they are, at their 32 bits")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = without_batch_norm(copied(model))
        if self.weights_only:
            quantize_each(parameters_of(model), self._quantizer)
            return model.eval()
        try:
            graph = traced(model)
            quantize_each(parameters_of(graph), self._quantizer)
            set_fixed_point(graph, nodes_to_quantize(graph, context, self.activation_bits), self.activation_bits)
        except StructureError as error:
            hint = "weights_only = true quantizes the weights and leaves activations as they are"
            raise InputError(f"fixed-point: {error}; {hint}") from error
        for name, seen in observe(graph, context, self.batches).items():
            quantizer = quantizers_of(graph)[name]
            if isinstance(quantizer, FixedPointQuantizer):
                exponent = exponent_of(seen, quantizer.bits, self.activation_calibration, self.activation_sigmas)
                quantizer.exponent.fill_(exponent)
        return graph.eval()

    def _quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        seen = Observed.of(getattr(layer, name))
        if self.calibration != "sigma":
            return FixedPointQuantizer(self.weight_bits, exponent_of(seen, self.weight_bits, self.calibration))
        # More range than the largest value needs is of no use.
        bound = min(sigma_bound(seen.mean, seen.std, self.weight_sigmas), seen.largest)
        return FixedPointQuantizer(self.weight_bits, exponent_for(bound, self.weight_bits))
