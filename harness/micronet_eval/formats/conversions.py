"""The operations that convert between floating point and quantized values, by name: ours, torch's, PT2E's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FIXED_POINT_OP, CODEBOOK_OP, SIGNS_OP = "micronet.fixed_point", "micronet.codebook", "micronet.signs"

ACCUMULATOR_OP = "micronet.accumulator"
"""No conversion, but what makes a dot product run in integers of few bits."""

_GRAINS = ("per_tensor", "per_channel", "per_token", "per_channel_group")

QUANTIZE = frozenset(f"quantized_decomposed.quantize_{grain}" for grain in _GRAINS)
"""Values to codes; all other conversions give values."""

DEQUANTIZE = frozenset(f"quantized_decomposed.dequantize_{grain}" for grain in _GRAINS)
"""Codes to values, whatever the codes are: only what makes codes saturates them."""

_FAKE_QUANTIZE = frozenset(
    (
        "micronet.affine",
        SIGNS_OP,
        "aten.fake_quantize_per_tensor_affine",
        "aten.fake_quantize_per_tensor_affine_cachemask",
        "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "aten.fake_quantize_per_channel_affine",
        "aten.fake_quantize_per_channel_affine_cachemask",
        "aten._fake_quantize_learnable_per_tensor_affine",
        "aten._fake_quantize_learnable_per_channel_affine",
        "quantized_decomposed.fake_quant_per_channel",
    )
)

CONVERSIONS: Mapping[str, str] = MappingProxyType(
    {
        FIXED_POINT_OP: "a conversion to fixed point",
        CODEBOOK_OP: "a conversion to the values of a table",
        **dict.fromkeys(
            sorted(QUANTIZE | DEQUANTIZE | _FAKE_QUANTIZE),
            "a conversion; a scale that is no power of two is counted by itself",
        ),
    }
)
"""Why each is free. They read the data from their first argument; scale, zero point and range have names."""
