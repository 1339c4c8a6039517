"""Quantizers of Brevitas (https://github.com/Xilinx/brevitas): it chooses integers and scales, stored as ours are."""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, FixedPointQuantizer
from micronet_eval.strategy import Context
from micronet_eval.structure import describe
from micronet_plugins.layerwise import ActivationBits, ToolkitQuantizer
from micronet_plugins.weights import DOT_PRODUCTS


class Brevitas(ToolkitQuantizer):
    """Weights of convolutions and linear layers quantized by Brevitas (to be installed), by one of its quantizers.

    The values are Brevitas' own, bit for bit; they are held as integers with scales, so that they pack and train.
    Other weights are rounded to nearest at 8 bits per channel. Use it to see what a network quantized by Brevitas would
    score; `affine` gives the same kind of grid.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = DOT_PRODUCTS
    scheme: Literal[
        "Int8WeightPerTensorFloat",
        "Int8WeightPerTensorFloatMSE",
        "Int8WeightPerTensorFixedPoint",
        "Int8WeightPerTensorFixedPointMSE",
        "Int8WeightPerChannelFloat",
        "Int8WeightPerChannelFloatMSE",
        "ShiftedUint8WeightPerTensorFloat",
        "ShiftedUint8WeightPerChannelFloat",
    ] = Field("Int8WeightPerChannelFloat", description="class of brevitas.quant that quantizes; it says the scales")
    weight_bits: int = Field(8, ge=2, le=8, description="bits of a weight, in the place of the class's 8")
    activation_bits: ActivationBits = Field(
        8, ge=0, le=16, description="bits of an activation that is multiplied, in fixed point; 0 leaves it as it is"
    )

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        _brevitas()
        return super().apply(model, context)

    def quantized(self, layer: nn.Module) -> tuple[nn.Module, Tensor]:
        layers, schemes = _brevitas()
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        options = {**(describe(layer) or {}), "bias": False}
        kind = options.pop("type")
        scheme = getattr(schemes, self.scheme)
        theirs = getattr(layers, f"Quant{kind}")(**options, weight_quant=scheme, weight_bit_width=self.weight_bits)
        theirs.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            quantized = theirs.eval().quant_weight()
        except RuntimeError as error:
            raise InputError(f"brevitas: {self.scheme} cannot quantize {layer}: {error}") from error
        values: Tensor = quantized.value.detach()
        if "FixedPoint" in self.scheme:
            return FixedPointQuantizer(self.weight_bits, round(math.log2(quantized.scale.item()))), values
        half = 2 ** (self.weight_bits - 1)
        low, high = (0, 2 * half - 1)
        if bool(quantized.signed):
            low, high = -half + bool(theirs.weight_quant.is_narrow_range), half - 1
        scales: Tensor = quantized.scale.detach().float()
        blocks = tuple(
            size if scales.dim() == 0 or scales.shape[dim] == 1 else 1 for dim, size in enumerate(weight.shape)
        )
        zeros = quantized.zero_point.detach().to(torch.int32).expand(scales.shape).reshape(-1)
        number_format = Affine(low, high, blocks, scales.reshape(-1), zeros if bool(zeros.any()) else None)
        return AffineQuantizer(number_format), values


def _brevitas() -> tuple[Any, Any]:
    """Its layers, and its quantizers."""
    try:
        return importlib.import_module("brevitas.nn"), importlib.import_module("brevitas.quant")
    except ImportError as error:
        raise InputError("brevitas: the package is not installed; run `pip install brevitas`") from error
