"""Every number format and mask is exact: counted bits are written bits, and values come back bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval import packing
from micronet_eval.formats import (
    Affine,
    AffineQuantizer,
    Codebook,
    CodebookQuantizer,
    FixedPointQuantizer,
    Integer,
    OffGrid,
    Signs,
    bits_of_range,
    block_indices,
)
from micronet_eval.formats.number import block_count
from micronet_eval.masks import block_mask, candidates, elements, mask_shape
from micronet_eval.storage import stored_tensors
from micronet_eval.trace import trace

few = settings(max_examples=50, deadline=None)


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(-7, 7, 4), (-8, 7, 4), (-1, 1, 2), (0, 255, 8), (-128, 127, 8), (-127, 128, 9), (0, 1, 1), (0, 15, 4)],
)
def test_bits_of_a_range(low, high, bits):
    assert bits_of_range(low, high) == bits


def test_blocks_are_counted_row_by_row():
    assert block_indices((2, 4), (1, 2)).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert block_count((3, 5), (2, 2)) == 6


@st.composite
def layers(draw):
    """A linear layer on a grid: affine, ternary, codebook or fixed point, dense or sparse, in elements or blocks."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layer = nn.Linear(columns, rows, bias=False)
    weight = torch.randn(rows, columns, generator=generator)
    block = draw(st.sampled_from([(1, 1), (4, 4), (1, 4), (2, 2)]))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    kept = torch.rand(mask_shape(weight.shape, block), generator=generator) < density
    layer.weight = nn.Parameter(weight * torch.from_numpy(elements(kept.numpy(), block, weight.shape)))
    kind = draw(st.sampled_from(["affine", "zeros", "ternary", "codebook", "fixed", "fixed2"]))
    if kind == "codebook":
        table = torch.randn(draw(st.integers(1, 20)), generator=generator)
        table[0] = draw(st.sampled_from([0.0, 0.5]))
        quantizer = CodebookQuantizer(Codebook(table))
    elif kind.startswith("fixed"):
        quantizer = FixedPointQuantizer(2 if kind == "fixed2" else 5, -1)
    else:
        bits = draw(st.integers(2, 8))
        low, high = (-1, 1) if kind == "ternary" else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
        blocks = draw(st.sampled_from([(rows, columns), (1, columns), (1, 3)]))
        count = block_count(weight.shape, blocks)
        scales = torch.rand(count, generator=generator) + 0.01
        zeros = torch.randint(low, high + 1, (count,), generator=generator) if kind == "zeros" else None
        zeros = None if zeros is None or not zeros.any() else zeros
        quantizer = AffineQuantizer(Affine(low, high, blocks, scales, zeros))
    parametrize.register_parametrization(layer, "weight", quantizer)
    return layer


@few
@given(layers())
@pytest.mark.rule("storage.bits")
def test_every_format_packs_to_the_bits_that_are_counted(layer):
    x = torch.randn(2, layer.in_features)
    packed = packing.pack(layer, nn.Linear(layer.in_features, layer.out_features, bias=False), x)
    unpacked = packing.unpack(packed, nn.Linear(layer.in_features, layer.out_features, bias=False))
    assert np.array_equal((unpacked.weight + 0.0).detach().numpy(), (layer.weight + 0.0).detach().numpy())
    (stored,) = stored_tensors(trace(layer, x))
    (again,) = stored_tensors(trace(unpacked, x))
    assert again.format == stored.format
    bits = stored.bits()
    for stream, counted in (("values", bits.values), ("masks", bits.mask), ("overhead", bits.overhead)):
        assert counted <= packed.bits[stream] < counted + 8
    # whatever it chose, plain dense codes are never smaller
    if stored.format.holds_zero:
        assert bits.values + bits.mask <= stored.elements * stored.format.code_bits


@few
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), st.integers(0, 2**31))
def test_a_block_mask_covers_what_is_kept(shape, seed):
    kept = np.random.default_rng(seed).random(shape) < 0.2
    for block in candidates(shape):
        mask = block_mask(kept, block)
        assert mask.shape == mask_shape(shape, block)
        assert elements(mask, block, shape)[kept].all()
        assert np.array_equal(block_mask(elements(mask, block, shape), block), mask)


def test_kernels_and_their_rows_are_blocks():
    assert {(1, 3), (1, 6)} <= set(candidates((8, 4, 2, 3)))
    assert {(1, 2), (1, 6), (1, 30)} <= set(candidates((8, 4, 5, 3, 2)))
    weight = torch.zeros(8, 4, 3, 3)
    weight[::2, 1, 1] = 1.0
    weight[3, 2, 2, 0] = 1.0
    layer = nn.Conv2d(4, 8, 3, bias=False)
    layer.weight.data = weight * torch.linspace(1, 2, 288).view_as(weight)
    (stored,) = stored_tensors(trace(layer.eval(), torch.zeros(1, 4, 5, 5)))
    assert (stored.bits().values, stored.bits().mask) == (32 * 5 * 3, 288 // 3)  # 13 x 32 + 288 with 1 bit an element


@pytest.mark.rule("storage.block-mask")
def test_the_mask_of_the_rules_example():
    assert mask_shape((512, 128), (4, 4)) == (128, 32)


def test_a_ternary_tensor_is_a_mask_and_a_sign_each():
    ternary = Signs(Affine(-1, 1, (2, 2), torch.tensor([0.3])))
    assert ternary.encode(torch.tensor([[0.3, -0.3], [0.0, 0.3]])).tolist() == [[0, 1], [0, 0]]
    with pytest.raises(OffGrid):
        ternary.encode(torch.tensor([[0.6, 0.3], [0.0, 0.3]]))


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        (torch.tensor([0.5]), torch.tensor([0.5]), "no whole number"),
        (torch.tensor([0.5]), torch.tensor([1.0]).to(torch.float8_e5m2), "a float of 8 bits"),
        (torch.tensor([0.5]).to(torch.float8_e4m3fn), None, "a float of 8 bits"),
    ],
)
def test_scales_and_zero_points_that_cannot_be(scale, zero, message):
    with pytest.raises(OffGrid, match=message):
        Affine(0, 1, (2,), scale, zero)
    Affine(0, 1, (2,), torch.tensor([0.5]), torch.tensor([1.0]))


def test_values_off_the_grid_are_refused():
    with pytest.raises(OffGrid):
        Affine(-7, 7, (2,), torch.tensor([0.1])).encode(torch.tensor([0.1, 0.15]))
    with pytest.raises(OffGrid):
        Affine(-7, 7, (2,), torch.tensor([0.5])).encode(torch.tensor([0.5, 4.0]))
    with pytest.raises(OffGrid):
        Codebook(torch.tensor([0.5, 1.0])).encode(torch.tensor([0.5, 0.75]))
    with pytest.raises(OffGrid):
        Integer(4, True, "int8").encode(torch.tensor([8], dtype=torch.int8))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=4))
def test_blocks_of_any_dimensions_are_counted_row_by_row(dims):
    shape, blocks = tuple(n for n, _ in dims), tuple(b for _, b in dims)
    counts = [max(-(-n // b), 1) for n, b in dims]
    where = block_indices(shape, blocks)
    assert where.shape == shape
    for place in itertools.product(*map(range, shape)):
        number = 0
        for i, b, count in zip(place, blocks, counts, strict=True):
            number = number * count + i // b
        assert int(where[place]) == number


def test_where_the_blocks_of_channels_are_takes_no_memory_an_element():
    assert block_indices((512, 512, 3, 3), (1, 512, 3, 3)).untyped_storage().nbytes() == 512 * 8
