"""Number formats: how many bits a value takes, what a tensor needs beside its values, and the exact code of each value.

A format turns a tensor into integer codes and back without any loss: `encode` refuses values that the format does
not hold, it never rounds. Rounding is what quantizers do.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

Side = tuple[tuple[Tensor, int], ...]
"""What a tensor needs beside its codes: columns of codes, each with the width of one code."""


class OffGrid(ValueError):
    """A tensor holds a value that its declared format cannot represent."""


class Format(ABC):
    """How the values of one tensor are written. `code_bits` is the width of one code, from 1 to 64.

    `side` is what the tensor needs beside its codes: an exponent, scales, zero points, a table. Where `holds_zero` is
    False no code means zero: zeros are what a mask leaves out. Formats of the same spec and side are equal.
    """

    code_bits: int
    holds_zero: bool = True

    @property
    @abstractmethod
    def spec(self) -> str:
        """The format without its side, as packed files write it, for example `fixed-point:9`."""

    @property
    def side(self) -> Side:
        return ()

    @property
    def side_bits(self) -> int:
        return sum(codes.numel() * width for codes, width in self.side)

    @abstractmethod
    def encode(self, tensor: Tensor) -> Tensor:
        """The codes of `tensor`, integers of the same shape, each non-negative below 2**code_bits (64-bit codes wrap).

        Zero is code 0 where it has one, and negative zero is zero: nothing can be hidden in it, and a masked weight is
        one. Raises OffGrid where a value has no code.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`: the same values, in a tensor of the format's dtype."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Format)
            and self.spec == other.spec
            and all(torch.equal(a, b) for (a, _), (b, _) in zip(self.side, other.side, strict=True))
        )

    def __hash__(self) -> int:
        return hash(self.spec)


_LEAST_EXPONENT = -126  # of a normal float32
_PIECE = 1 << 16  # elements at a time, so that what is made of them stays cached

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


@dataclass(frozen=True, eq=False)
class Plain(Format):
    """A tensor stored just as its dtype says: IEEE floating point, bfloat16, or an integer."""

    name: str

    @classmethod
    @cache
    def of(cls, dtype: torch.dtype) -> Plain:
        """The format of a dtype. Raises OffGrid where there is none."""
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


@dataclass(frozen=True, eq=False)
class FixedPoint(Format):
    """Two's-complement fixed point: value = code * 2**exponent, with one 8-bit exponent shared by the tensor.

    Holds -2**(bits-1) ... 2**(bits-1)-1 steps. Bounds keep every value a normal or subnormal float32, so that the
    model, which computes in float32, holds each value exactly.
    """

    bits: int
    exponent: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 24:
            raise OffGrid(f"fixed point of {self.bits} bits: 2 to 24 bits are possible")
        if not _LEAST_EXPONENT <= self.exponent <= 100:
            raise OffGrid(f"fixed-point exponent {self.exponent}: -126 to 100 are possible")

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def spec(self) -> str:
        return f"fixed-point:{self.bits}"

    @property
    def side(self) -> Side:
        return ((torch.tensor([self.exponent & 0xFF], device="cpu"), 8),)

    def encode(self, tensor: Tensor) -> Tensor:
        step, low, high = 2.0**self.exponent, -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        dtype = torch.int16 if self.bits < 16 else torch.int32  # the smaller, the less goes through memory
        codes = torch.empty(tensor.numel(), dtype=dtype, device=tensor.device)
        for piece, values in zip(torch.split(codes, _PIECE), torch.split(tensor.reshape(-1), _PIECE), strict=True):
            exact = values if values.dtype == torch.float64 else values.float()
            piece.copy_((exact / step).clamp_(low, high))  # cut off after the point
            if not torch.equal(back := piece.to(exact.dtype).mul_(step), exact):
                raise OffGrid(
                    f"value {values[back != exact][0].item()!r} is not on the grid of {self.spec} with exponent "
                    f"{self.exponent} (multiples of {step!r} from {low * step!r} to {high * step!r})"
                )
            piece &= (1 << self.bits) - 1
        return codes.view(tensor.shape)

    def decode(self, codes: Tensor) -> Tensor:
        return _sign_extend(codes, self.bits).to(torch.float32).mul_(2.0**self.exponent)


@dataclass(frozen=True, eq=False)
class Integer(Format):
    """Integers of fewer bits than their dtype has: two's complement, or without a sign."""

    bits: int
    signed: bool
    dtype: str

    def __post_init__(self) -> None:
        known = _PLAIN.get(self.dtype)
        if known is None or known[0].is_floating_point or not 1 <= self.bits <= known[2]:
            raise OffGrid(f"no integers of {self.bits} bits in {self.dtype}")

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def spec(self) -> str:
        return f"{'signed' if self.signed else 'unsigned'}:{self.bits}:{self.dtype}"

    def encode(self, tensor: Tensor) -> Tensor:
        values = tensor.to(torch.int64)
        codes = values & _ones(self.bits)
        if not torch.equal(self._integers(codes), values):
            raise OffGrid(f"integers from {values.min()} to {values.max()} do not fit {self.spec}")
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        return self._integers(codes).to(_PLAIN[self.dtype][0])

    def _integers(self, codes: Tensor) -> Tensor:
        return _sign_extend(codes, self.bits) if self.signed else codes


@dataclass(frozen=True, eq=False)
class Affine(Format):
    """value = (integer - zero point) * scale, the integers from `low` to `high`, computed in float32.

    `blocks` is how many elements share a scale and a zero point, dimension by dimension: the whole shape for one of
    the tensor, 1 in the dimension of the channels for one a channel. A code is integer - zero point, modulo
    2**code_bits. Zero points that are all 0 take nothing. Scales are stored in the fewest bits that hold all of them:
    powers of two as exponents of 8 bits, as those of fixed point are, others as float16, bfloat16 or float32.
    """

    low: int
    high: int
    blocks: tuple[int, ...]
    scales: Tensor
    zero_points: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or not 1 <= self.code_bits <= 16 or any(b < 1 for b in self.blocks):
            raise OffGrid(f"affine integers from {self.low} to {self.high}: 1 to 16 bits are possible")
        if any(t is not None and t.dtype in FLOAT8 for t in (self.scales, self.zero_points)):
            raise OffGrid("a scale or a zero point is a float of 8 bits, which torch does not compute with")
        zeros = self.zero_points
        if zeros is not None and not bool(((zeros >= self.low) & (zeros <= self.high)).all()):
            raise OffGrid(f"a zero point is not from {self.low} to {self.high}")
        if zeros is not None and zeros.is_floating_point() and not bool((zeros == zeros.round()).all()):
            raise OffGrid("a zero point is no whole number, but it is the code of zero")
        if not bool((torch.isfinite(self.scales) & (self.scales > 0)).all()):
            raise OffGrid("a scale is not a positive number")

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return bits_of_range(self.low, self.high)

    @property
    def spec(self) -> str:
        blocks = "x".join(map(str, self.blocks))
        scales = "shifts" if self._exponents is not None else self._floats
        zeros = "" if self.zero_points is None else ":zeros"
        return f"affine:{self.low}:{self.high}:{blocks}{'' if scales == 'float32' else f':{scales}'}{zeros}"

    @property
    def side(self) -> Side:
        if self._exponents is not None:
            scales = self._exponents & _ones(8), 8
        else:
            plain = Plain(self._floats)
            scales = plain.encode(self.scales.to(_PLAIN[plain.name][0])), plain.code_bits
        if self.zero_points is None:
            return (scales,)
        return scales, (self.zero_points.to(torch.int64) & _ones(self.code_bits), self.code_bits)

    def encode(self, tensor: Tensor) -> Tensor:
        scales, zeros = self._spread(tensor.shape)
        steps = (tensor.to(torch.float64) / scales.to(torch.float64)).round()
        off = steps.to(torch.float32) * scales != tensor
        off |= (steps + zeros < self.low) | (steps + zeros > self.high)
        if bool(off.any()):
            raise OffGrid(f"value {tensor[off].flatten()[0].item()!r} is not on the grid of {self.spec}")
        return steps.to(torch.int64) & _ones(self.code_bits)

    def decode(self, codes: Tensor) -> Tensor:
        scales, zeros = self._spread(codes.shape)
        steps = ((codes + zeros - self.low) & _ones(self.code_bits)) + self.low - zeros
        if bool((steps + zeros > self.high).any()):
            raise OffGrid(f"a code of {self.spec} is above {self.high}")
        return steps.to(torch.float32) * scales

    @cached_property
    def _exponents(self) -> Tensor | None:
        """Of scales that are all powers of two and normal float32; None where one is not."""
        if self.scales.dtype != torch.float32:
            return None
        fractions, exponents = torch.frexp(self.scales)
        exponents = exponents.to(torch.int64) - 1  # torch's fractions begin at 1/2
        return exponents if bool(((fractions == 0.5) & (exponents >= _LEAST_EXPONENT)).all()) else None

    @cached_property
    def _floats(self) -> str:
        return narrowest_floats(self.scales)

    def _spread(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every element."""
        where = block_indices(shape, self.blocks)
        zeros = torch.zeros_like(self.scales, dtype=torch.int64) if self.zero_points is None else self.zero_points
        return self.scales[where], zeros.to(torch.int64)[where]


@dataclass(frozen=True, eq=False)
class Signs(Format):
    """Binary and ternary: of a format's codes only +1 and -1. One bit a value, 1 for -1; zeros are left to a mask."""

    base: Format
    holds_zero = False
    code_bits = 1

    @property
    def spec(self) -> str:
        return f"signs:{self.base.spec}"

    @property
    def side(self) -> Side:
        return self.base.side

    def encode(self, tensor: Tensor) -> Tensor:
        codes = self.base.encode(tensor)
        minus = _ones(self.base.code_bits)
        if not bool(((codes == 0) | (codes == 1) | (codes == minus)).all()):
            raise OffGrid(f"{self.spec} holds other codes than -1, 0 and +1")
        return (codes == minus).to(torch.int64)

    def decode(self, codes: Tensor) -> Tensor:
        return self.base.decode(torch.where(codes == 1, _ones(self.base.code_bits), 1))


@dataclass(frozen=True, eq=False)
class Codebook(Format):
    """One of K values of a table, as after clustering by k-means: ceil(log2 K) bits a value, and the table."""

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.dim() != 1 or not self.table.numel() or not self.table.is_floating_point():
            raise OffGrid("a codebook is a row of at least one number")

    @property
    def holds_zero(self) -> bool:  # type: ignore[override]
        return bool((self.table == 0).any())

    @property
    def code_bits(self) -> int:  # type: ignore[override]
        return index_bits(self.table.numel())

    @property
    def spec(self) -> str:
        dtype = Plain.of(self.table.dtype).name
        return f"codebook:{self.table.numel()}" + ("" if dtype == "float32" else f":{dtype}")

    @property
    def side(self) -> Side:
        plain = Plain.of(self.table.dtype)
        return ((plain.encode(self.table), plain.code_bits),)

    def encode(self, tensor: Tensor) -> Tensor:
        ordered, order = self.table.sort(stable=True)
        found = torch.searchsorted(ordered, tensor.contiguous()).clamp_(max=ordered.numel() - 1)
        if bool((ordered[found] != tensor).any()):
            raise OffGrid(f"value {tensor[ordered[found] != tensor].flatten()[0].item()!r} is not in its codebook")
        return (order[found] - self._first()) % self.table.numel()

    def decode(self, codes: Tensor) -> Tensor:
        if bool((codes >= self.table.numel()).any()):
            raise OffGrid(f"a code of {self.spec} is beyond its table")
        return self.table[(codes.to(torch.int64) + self._first()) % self.table.numel()] + 0  # no negative zero

    def _first(self) -> int:
        """The place in the table that is code 0: that of zero, where it is there."""
        where = (self.table == 0).nonzero()
        return int(where[0]) if where.numel() else 0


Reader = Callable[[int, int], Tensor]
"""Gives the next so many codes of so many bits of a format's side."""


def format_of(spec: str, shape: Sequence[int], read: Reader) -> Format:
    """The format that `spec` names, for a tensor of `shape`, with the side that `read` reads.

    Raises OffGrid where there is no such format.
    """
    kind, _, rest = spec.partition(":")
    fields = rest.split(":")
    if len(spec) > LONGEST_SPEC or not spec.isascii():
        raise OffGrid(f"no number format {spec[:LONGEST_SPEC]!a}; known: {', '.join((*_SPECS, *_PLAIN))}")
    if spec in _PLAIN:
        return Plain(spec)
    if kind == "signs" and not rest.startswith("signs:"):
        return Signs(format_of(rest, shape, read))
    if kind == "fixed-point" and rest.isdecimal():
        FixedPoint(int(rest), 0)  # checks the bits
        return FixedPoint(int(rest), int(_sign_extend(read(1, 8), 8)))
    if kind in ("signed", "unsigned") and len(fields) == 2 and fields[0].isdecimal():
        return Integer(int(fields[0]), kind == "signed", fields[1])
    if kind == "codebook" and fields[0].isdecimal() and fields[1:] in ([], *([name] for name in _OF_TABLES)):
        plain = Plain(*fields[1:] or ("float32",))
        return Codebook(plain.decode(read(int(fields[0]), plain.code_bits)))
    if kind == "affine" and _AFFINE.fullmatch(rest):
        low, high, blocks = int(fields[0]), int(fields[1]), tuple(map(int, fields[2].split("x")))
        count = block_count(shape, blocks)
        if "shifts" in fields:
            exponents = _sign_extend(read(count, 8), 8)
            if bool((exponents < _LEAST_EXPONENT).any()):
                raise OffGrid(f"scales of {spec}: exponents from {_LEAST_EXPONENT} to 127 are possible")
            scales = torch.exp2(exponents.float())
        else:
            plain = Plain(next((name for name in _HALVES if name in fields), "float32"))
            scales = plain.decode(read(count, plain.code_bits)).float()
        if "zeros" not in fields:
            return Affine(low, high, blocks, scales)
        width = Affine(low, high, blocks, scales).code_bits  # checks the bits
        zeros = read(count, width)
        return Affine(low, high, blocks, scales, _sign_extend(zeros, width) if low < 0 else zeros)
    raise OffGrid(f"no number format {spec!r}; known: {', '.join((*_SPECS, *_PLAIN))}")


_OF_TABLES = tuple(name for name, (dtype, *_) in _PLAIN.items() if dtype not in FLOAT8)  # torch sorts those not
LONGEST_SPEC = 200
_AFFINE = re.compile(r"-?\d{1,6}:-?\d{1,6}:\d{1,12}(x\d{1,12})*(:shifts|:float16|:bfloat16)?(:zeros)?")
_SPECS = (
    "fixed-point:BITS", "signed:BITS:DTYPE", "unsigned:BITS:DTYPE",
    "affine:LOW:HIGH:BLOCKS[:shifts|:float16|:bfloat16][:zeros]", "signs:FORMAT", "codebook:K",
)  # fmt: skip


_HALVES = ("float16", "bfloat16")


def narrowest_floats(values: Tensor) -> str:
    """The name of the first of float16, bfloat16 and float32 that holds every value just as it is."""

    def holds(name: str, values: Tensor) -> bool:
        return torch.equal(values.to(_PLAIN[name][0]).to(values.dtype), values)

    values = values.reshape(-1)  # most show in the first few that they are not held
    return next((name for name in _HALVES if holds(name, values[:16]) and holds(name, values)), "float32")


def bits_of_range(low: int, high: int) -> int:
    """The bits of integers from `low` to `high`, two's complement where some are negative: -7 to 7 take 4."""
    if low >= 0:
        return max(1, high.bit_length())
    return max((-low - 1).bit_length(), high.bit_length() if high > 0 else 0) + 1


def index_bits(count: int) -> int:
    """The bits that tell `count` things apart, ceil(log2 count), and at least 1."""
    return max(1, (count - 1).bit_length())


def block_count(shape: Sequence[int], blocks: Sequence[int]) -> int:
    """How many blocks of `blocks` elements, dimension by dimension, a tensor of `shape` has. Raises OffGrid."""
    if len(shape) != len(blocks) or any(b < 1 for b in blocks):
        raise OffGrid(f"blocks of {'x'.join(map(str, blocks))} do not fit the shape {'x'.join(map(str, shape))}")
    return math.prod(-(-n // b) for n, b in zip(shape, blocks, strict=True))


def block_indices(shape: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The number of the block that each element lies in, blocks counted in row-major order.

    A view that takes no memory along dimensions that a block spans.
    """
    block_count(shape, blocks)
    where = torch.zeros([1] * len(shape), dtype=torch.int64, device="cpu")
    for dim, (n, b) in enumerate(zip(shape, blocks, strict=True)):
        if b < n:
            place = torch.arange(n, device="cpu") // b
            where = where * -(-n // b) + place.view(-1, *[1] * (len(shape) - dim - 1))
    return where.expand(tuple(shape))


def _ones(bits: int) -> int:
    """A number of that many bits, all 1, as a signed 64-bit integer."""
    return -1 if bits == 64 else (1 << bits) - 1


def _sign_extend(codes: Tensor, bits: int) -> Tensor:
    if bits == 64:
        return codes
    sign = 1 << (bits - 1)
    return (codes ^ sign) - sign
