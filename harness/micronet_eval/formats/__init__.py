"""Number formats, the quantizers that round to them, and the names of the operations that convert."""

from micronet_eval.formats.conversions import CODEBOOK_OP, CONVERSIONS, FIXED_POINT_OP, QUANTIZE
from micronet_eval.formats.number import (
    _PLAIN,
    FLOAT8,
    Affine,
    Codebook,
    FixedPoint,
    Format,
    Integer,
    OffGrid,
    Plain,
    Signs,
    bits_of_range,
    block_indices,
    format_of,
    index_bits,
)
from micronet_eval.formats.quantizers import AffineQuantizer, CodebookQuantizer, FixedPointQuantizer, fixed_point

__all__ = [
    "CODEBOOK_OP",
    "CONVERSIONS",
    "FIXED_POINT_OP",
    "FLOAT8",
    "QUANTIZE",
    "_PLAIN",
    "Affine",
    "AffineQuantizer",
    "Codebook",
    "CodebookQuantizer",
    "FixedPoint",
    "FixedPointQuantizer",
    "Format",
    "Integer",
    "OffGrid",
    "Plain",
    "Signs",
    "bits_of_range",
    "block_indices",
    "fixed_point",
    "format_of",
    "index_bits",
]
