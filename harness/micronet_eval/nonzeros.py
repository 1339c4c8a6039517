"""What values are like, at the speed of reading them: a piece at a time, so that what is made of it stays cached.

torch.count_nonzero alone reads several times slower than memory delivers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIECE = 1 << 17  # elements
_IN_NUMPY = frozenset({torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32,
                       torch.int64})  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """How many elements of a tensor are not zero, and whether all are finite.

    `least` is the least magnitude of those that are not zero, where that was asked for: NaN where one is NaN, infinite
    where there are none.
    """

    nonzeros: int
    finite: bool
    least: float | None = None


def seen(tensor: Tensor) -> Seen:
    """Without the least magnitude, in one pass over the elements."""
    nonzeros, finite = 0, True
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(tensor):
            nonzeros += int(np.count_nonzero(piece != 0))
            # A sum of squares is infinite or NaN where an element is; where it overflows, all are looked at.
            if finite and piece.dtype.kind == "f" and not np.dot(piece, piece) < np.inf:
                finite = bool(np.isfinite(piece).all())
    return Seen(nonzeros, finite)


def seen_closely(tensor: Tensor) -> Seen:
    """With the least magnitude of floating-point numbers, in one pass over the elements, which takes longer."""
    nonzeros, finite, least = 0, True, np.inf
    for piece in _pieces(tensor):
        magnitudes = np.abs(piece)
        smallest, largest = magnitudes.min(), magnitudes.max()
        if smallest > 0:
            nonzeros += piece.size
        else:
            kept = magnitudes != 0
            nonzeros += int(np.count_nonzero(kept))
            smallest = smallest if np.isnan(smallest) else np.where(kept, magnitudes, np.inf).min()
        finite, least = finite and bool(largest < np.inf), np.minimum(least, smallest)
    return Seen(nonzeros, finite, float(least))


def by_output(tensor: Tensor, dim: int) -> NDArray[np.int64]:
    """For each index of dimension `dim` how many elements are not zero."""
    rows = is_nonzero(tensor).movedim(dim, 0).flatten(1) if tensor.numel() else tensor.new_zeros(tensor.shape[dim], 0)
    counts: NDArray[np.int64] = np.count_nonzero(rows.cpu().numpy(), axis=1)
    return counts


def is_nonzero(tensor: Tensor) -> Tensor:
    """Which elements are not zero."""
    return computable(tensor) != 0


def computable(tensor: Tensor) -> Tensor:
    """The same values in a dtype that torch computes with, which it does not with 8-bit floats."""
    return tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 else tensor


def _pieces(tensor: Tensor) -> Iterator[NDArray[Any]]:
    """All elements once, in the order of memory where they lie there without gaps."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True))
    if tensor.dtype in _IN_NUMPY and tensor.device.type == "cpu":  # numpy makes views in a fraction of the time
        elements = flat.numpy().reshape(-1)
        yield from (elements[start : start + _PIECE] for start in range(0, elements.size, _PIECE))
        return
    flat = flat.reshape(-1)
    for piece in (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE)):
        if tensor.dtype not in _IN_NUMPY:
            piece = piece.float() if tensor.dtype.is_floating_point else is_nonzero(piece)
        yield piece.cpu().numpy()
