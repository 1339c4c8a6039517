"""Number formats: how many bits a value takes, what a tensor needs beside its values, and the exact code of each value.

A format turns a tensor into integer codes and back without any loss: `encode` refuses values that the format does
not hold, it never rounds. Rounding is what quantizers do, by the operation `micronet::fixed_point` defined here, which
is part of the model and therefore visible to the tracer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FIXED_POINT_OP = "micronet.fixed_point"


class OffGrid(ValueError):
    """A tensor holds a value that its declared format cannot represent."""


class Format(ABC):
    """How the values of one tensor are written. `code_bits` is the width of one code, from 1 to 64.

    `overhead` are the bytes that one tensor needs beside its codes (an exponent, a scale), `overhead_bytes` of them.
    """

    code_bits: int
    overhead_bytes: ClassVar[int] = 0

    @property
    @abstractmethod
    def spec(self) -> str:
        """The format without its overhead, as packed files write it, for example `fixed-point:9`."""

    @property
    def overhead(self) -> bytes:
        return b""

    @abstractmethod
    def encode(self, tensor: Tensor) -> Tensor:
        """The codes of `tensor`, int64 of the same shape, each non-negative below 2**code_bits (64-bit codes wrap).

        Zero is always code 0, and negative zero is zero: nothing can be hidden in it, and a masked weight is one.
        Raises OffGrid where a value has no code.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`: the same values, in a tensor of the format's dtype."""


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_PLAIN: dict[str, tuple[torch.dtype, torch.dtype, int]] = {
    "float64": (torch.float64, torch.int64, 64),
    "float32": (torch.float32, torch.int32, 32),
    "float16": (torch.float16, torch.int16, 16),
    "bfloat16": (torch.bfloat16, torch.int16, 16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.int8, 8),
    "float8_e5m2": (torch.float8_e5m2, torch.int8, 8),
    "int64": (torch.int64, torch.int64, 64),
    "int32": (torch.int32, torch.int32, 32),
    "int16": (torch.int16, torch.int16, 16),
    "int8": (torch.int8, torch.int8, 8),
    "uint8": (torch.uint8, torch.uint8, 8),
    "bool": (torch.bool, torch.uint8, 1),
}


@dataclass(frozen=True)
class Plain(Format):
    """A tensor stored just as its dtype says: IEEE floating point, bfloat16, or an integer."""

    name: str

    @classmethod
    def of(cls, dtype: torch.dtype) -> Plain:
        for name, (known, _, _) in _PLAIN.items():
            if known == dtype:
                return cls(name)
        raise OffGrid(f"tensors of {dtype} have no number format here; known: {', '.join(_PLAIN)}")

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return _PLAIN[self.name][2]

    @property
    def spec(self) -> str:
        return self.name

    def encode(self, tensor: Tensor) -> Tensor:
        dtype, integer, bits = _PLAIN[self.name]
        if tensor.dtype != dtype:
            raise OffGrid(f"a tensor of {tensor.dtype} is not {self.name}")
        is_zero = (tensor.float() if dtype in FLOAT8 else tensor) == 0
        codes = torch.where(is_zero, 0, tensor.view(integer).to(torch.int64))
        return codes if bits == 64 else codes & ((1 << bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        dtype, integer, bits = _PLAIN[self.name]
        signed = codes if integer == torch.uint8 else _sign_extend(codes, bits)
        return signed.to(integer).view(dtype)


@dataclass(frozen=True)
class FixedPoint(Format):
    """Two's-complement fixed point: value = code * 2**exponent, with one 8-bit exponent shared by the tensor.

    Holds -2**(bits-1) ... 2**(bits-1)-1 steps. Bounds keep every value a normal or subnormal float32, so that the
    model, which computes in float32, holds each value exactly.
    """

    bits: int
    exponent: int
    overhead_bytes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24:
            raise OffGrid(f"fixed point of {self.bits} bits: 2 to 24 bits are possible")
        if not -126 <= self.exponent <= 100:
            raise OffGrid(f"fixed-point exponent {self.exponent}: -126 to 100 are possible")

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def spec(self) -> str:
        return f"fixed-point:{self.bits}"

    @property
    def overhead(self) -> bytes:
        return self.exponent.to_bytes(1, "little", signed=True)

    def encode(self, tensor: Tensor) -> Tensor:
        steps = tensor.to(torch.float64) * 2.0**-self.exponent
        low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        bad = (steps != steps.round()) | (steps < low) | (steps > high)
        if bad.any():
            value, step = tensor[bad].flatten()[0].item(), 2.0**self.exponent
            raise OffGrid(
                f"value {value!r} is not on the grid of {self.spec} with exponent {self.exponent} "
                f"(multiples of {step!r} from {low * step!r} to {high * step!r})"
            )
        return steps.to(torch.int64) & ((1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        return (_sign_extend(codes, self.bits).to(torch.float64) * 2.0**self.exponent).to(torch.float32)


def format_of(spec: str, overhead: bytes = b"") -> Format:
    """The format that `spec` and its overhead bytes describe. Raises OffGrid where there is no such format."""
    kind, _, bits = spec.partition(":")
    if kind == "fixed-point" and bits.isdecimal() and len(overhead) == 1:
        return FixedPoint(int(bits), int.from_bytes(overhead, "little", signed=True))
    if spec in _PLAIN and not overhead:
        return Plain(spec)
    raise OffGrid(f"no number format {spec!r}; known: fixed-point:BITS, {', '.join(_PLAIN)}")


def overhead_bytes(spec: str) -> int:
    """How many bytes a tensor of this format needs beside its codes."""
    return FixedPoint.overhead_bytes if spec.startswith("fixed-point:") else Plain.overhead_bytes


def _sign_extend(codes: Tensor, bits: int) -> Tensor:
    if bits == 64:
        return codes
    sign = 1 << (bits - 1)
    return (codes ^ sign) - sign


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
