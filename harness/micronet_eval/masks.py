"""Masks: 1 bit a block for which blocks of a tensor are stored. A block of one element is the usual bitmask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Block = tuple[int, int]
"""Rows and columns of a block of the matrix [first dimension, all others]: output channels by what feeds them."""

Mask = NDArray[np.bool_]
"""Which blocks are stored, or which elements are kept. Arrays of numpy: small ones take a third of the time of torch's,
and the any of long rows a hundredth."""

ELEMENT: Block = (1, 1)
_SQUARES_AND_STRIPES = ((1, 4), (4, 1), (2, 2), (4, 4), (8, 8), (16, 16), (1, 8), (8, 1), (1, 16), (16, 1))


@cache
def candidates(shape: tuple[int, ...]) -> tuple[Block, ...]:
    """The blocks that are tried: squares, stripes, a kernel and its rows, whole rows and columns of the matrix."""
    rows, columns = _matrix(shape)
    kernels = [(1, math.prod(shape[i:])) for i in range(2, len(shape))]
    blocks = [*_SQUARES_AND_STRIPES, *kernels, (1, columns), (rows, 1)]
    return tuple(b for b in dict.fromkeys(blocks) if b != ELEMENT and b[0] <= rows and b[1] <= columns)


def block_mask(kept: Mask, block: Block) -> Mask:
    """Which blocks of the matrix hold an element that is `kept`: [ceil(rows / r), ceil(columns / c)]."""
    matrix = kept.reshape(_matrix(kept.shape))
    if block == ELEMENT:
        return matrix
    return _any_of(_any_of(matrix.T, block[0]).T, block[1])


def _any_of(kept: Mask, size: int) -> Mask:
    """Whether any of every `size` neighbours in a row is `kept`; slice by slice where those are few."""
    if size > 32:
        found: Mask = np.logical_or.reduceat(kept, range(0, kept.shape[1], size), axis=1)
        return found
    first, *others = (kept[:, start::size] for start in range(size))
    found = first.copy(order="K")
    for other in others:
        found[:, : other.shape[1]] |= other
    return found


def elements(mask: Mask, block: Block, shape: Sequence[int]) -> Mask:
    """Which elements of a tensor of `shape` lie in the blocks of `mask`."""
    rows, columns = _matrix(shape)
    if block == ELEMENT:
        return mask.reshape(tuple(shape))
    spread = mask.repeat(block[1], 1).repeat(block[0], 0)
    return spread[:rows, :columns].reshape(tuple(shape))


def kept_elements(kept: Mask, block: Block) -> int:
    """How many elements lie in blocks that hold an element that is `kept`; blocks at the edges are smaller."""
    rows, columns = _matrix(kept.shape)
    mask = block_mask(kept, block)
    (height, width), below, right = block, -rows % block[0], -columns % block[1]  # how far blocks reach over the edges
    over = below * width * np.count_nonzero(mask[-1]) if below else 0
    over += right * (height * np.count_nonzero(mask[:, -1]) - (below * mask[-1, -1] if below else 0)) if right else 0
    return int(height * width * np.count_nonzero(mask) - over)


def mask_shape(shape: Sequence[int], block: Block) -> tuple[int, int]:
    """Rows and columns of blocks, those at the edges included: 512x128 in blocks of 4x4 are 128x32, 4,096 bits."""
    rows, columns = _matrix(shape)
    return -(-rows // block[0]), -(-columns // block[1])


@cache
def mask_bits(shape: tuple[int, ...], block: Block) -> int:
    """The bits of a mask, 1 a block."""
    return math.prod(mask_shape(shape, block))


@cache
def fewest(shape: tuple[int, ...]) -> Block:
    """The blocks of the smallest mask, whatever it keeps."""
    return min((ELEMENT, *candidates(shape)), key=lambda block: mask_bits(shape, block))


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if not shape:
        return 1, 1
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
