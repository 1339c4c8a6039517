"""Quantizers of torchao (https://github.com/pytorch/ao): it chooses codes and scales, which are stored as ours are."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer
from micronet_eval.strategy import Context
from micronet_plugins.layerwise import ActivationBits, ToolkitQuantizer


class TorchAO(ToolkitQuantizer):
    """Linear layers quantized by torchao (to be installed), weights only: int8 per channel or int4 per group.

    The values are torchao's own, bit for bit; they are held as integers with scales, so that they pack and train.
    Other layers are rounded to nearest at 8 bits per channel. Use it to see what a deployment through torchao would
    score; `affine` gives the same kind of grid for all layers.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    config: Literal["int8", "int4"] = Field("int8", description="int8 (a scale a channel) or int4 (a scale a group)")
    group_size: int = Field(32, gt=0, description="for int4: inputs of one output that share a scale")
    activation_bits: ActivationBits = Field(
        0, ge=0, le=16, description="bits of an activation that is multiplied, in fixed point; 0 leaves it as it is"
    )

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        _torchao()
        return super().apply(model, context)

    def quantized(self, layer: nn.Module) -> tuple[nn.Module, Tensor]:
        ao = _torchao()
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        if self.config == "int8":
            config = ao.Int8WeightOnlyConfig(version=2)
        elif weight.shape[1] % self.group_size:
            raise InputError(
                f"torchao: field 'group_size': {self.group_size} does not divide the {weight.shape[1]} inputs of a "
                "linear layer; choose a divisor of all"
            )
        else:
            granularity = ao.PerGroup(self.group_size)
            config = ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                granularity=granularity,
            )
        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        model[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
        ao.quantize_(model, config)
        quantized: Any = model[0].weight
        half = 128 if self.config == "int8" else 8
        zeros = quantized.zero_point.reshape(-1).to(torch.int32)
        number_format = Affine(
            -half,
            half - 1,
            tuple(quantized.block_size),
            quantized.scale.reshape(-1).float(),
            zeros if bool(zeros.any()) else None,
        )
        return AffineQuantizer(number_format), quantized.dequantize()


def _torchao() -> Any:
    try:
        from torchao import quantization  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError("torchao: the package is not installed; run `pip install torchao`") from error
    return quantization
