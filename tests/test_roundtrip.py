"""Packing and unpacking are inverse: for every format, and for whole models."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import packing
from micronet_eval.costs import FORMULAS
from micronet_eval.formats import _PLAIN, FixedPoint, FixedPointQuantizer, OffGrid, Plain, format_of
from micronet_eval.merge import merged
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.structure import ScaleShift, quantizers_of
from micronet_eval.trace import trace
from micronet_plugins.architectures import wide_resnet
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.low_rank import LowRank
from micronet_plugins.magnitude import Magnitude

shapes = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(_PLAIN)), shapes, st.floats(0, 1), st.integers(0, 2**31))
def test_plain_formats_give_every_value_back(name, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype, _, bits = _PLAIN[name]
    tensor = (torch.randn(shape, generator=generator) * 50 * (torch.rand(shape, generator=generator) < density)).to(
        dtype
    )
    codes = Plain(name).encode(tensor)
    assert bits == 64 or bool(((codes >= 0) & (codes < 2**bits)).all())
    assert torch.equal(codes == 0, tensor == 0)
    assert torch.equal(format_of(name, (), None).decode(codes), tensor)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 24), st.integers(-126, 100), shapes, st.integers(0, 2**31))
def test_fixed_point_gives_every_value_back(bits, exponent, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
    tensor = (steps.double() * 2.0**exponent).float()
    number_format = FixedPoint(bits, exponent)
    codes = number_format.encode(tensor).long()  # 2**bits may be out of the range of the codes
    assert bool(((codes >= 0) & (codes < 2**bits)).all())
    assert torch.equal(
        format_of(number_format.spec, (), lambda count, width: number_format.side[0][0]).decode(codes), tensor
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.lists(st.integers(0, 2**64 - 1), max_size=20)), max_size=5))
def test_bit_streams_give_every_code_back(parts):
    writer, expected = packing._BitWriter(), []
    for width, numbers in parts:
        codes = np.array([n % 2**width for n in numbers], np.uint64).astype(np.int64)
        writer.write(codes, width)
        expected.append((codes, width))
    data = writer.bytes()
    assert data.size == -(-sum(width * codes.size for codes, width in expected) // 8)
    reader = packing._BitReader(data)
    for codes, width in expected:
        assert np.array_equal(reader.read(codes.size, width), codes)
    reader.finish()


def test_a_value_off_the_grid_is_refused_and_never_rounded():
    with pytest.raises(OffGrid, match=r"0\.3.*not on the grid"):
        FixedPoint(8, -3).encode(torch.tensor([0.25, 0.3]))
    with pytest.raises(OffGrid):
        FixedPoint(4, 0).encode(torch.tensor([8.0]))


def test_the_quantizer_rounds_to_even_saturates_and_passes_the_gradient_straight_through():
    x = torch.tensor([0.5, 1.5, -0.4, 9.0, -9.0], requires_grad=True)
    y = FixedPointQuantizer(4, 0)(x)
    assert y.tolist() == [0, 2, 0, 7, -8]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0]


def compressed(weight_bits, activation_bits, sparsity, seed):
    """A residual network with everything done to it, its architecture, and an example input."""
    torch.manual_seed(seed)
    architecture = wide_resnet(10, 1, 10, 1)
    for norm in (m for m in architecture.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.bias)
    example = torch.zeros(1, 1, 8, 8)
    data = DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.zeros(16)), 8)
    context = Context(example, data, seed, FORMULAS)
    model = LowRank(parameters=40_000).apply(architecture.eval(), context)
    model = merged(Magnitude(sparsity=sparsity).apply(model, context), example)
    quantizer = FixedPointStrategy(weight_bits=weight_bits, activation_bits=activation_bits, batches=2)
    return quantizer.apply(model, context), architecture, example


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 12), st.integers(4, 16), st.floats(0.05, 0.9), st.integers(0, 99))
def test_a_model_comes_back_the_same_from_the_file(tmp_path_factory, weight_bits, activation_bits, sparsity, seed):
    model, architecture, example = compressed(weight_bits, activation_bits, sparsity, seed)
    counted = account(trace(model, example), FORMULAS)
    packed = packing.pack(model, architecture, example)
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    packing.write(packed, path)
    first = path.read_bytes()
    again = packing.unpack(packing.read(path), copy.deepcopy(architecture).to("meta")).eval()
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))
    assert account(trace(again, example), FORMULAS).storage == counted.storage
    assert account(trace(again, example), FORMULAS).math == counted.math
    storage = counted.storage
    for bits, size in zip(
        (storage.value_bits, storage.mask_bits, storage.overhead_bits), packed.bits.values(), strict=True
    ):
        assert bits <= size < bits + 8
    assert path.stat().st_size <= 1.02 * storage.bits / 8 + 65536
    packing.write(packing.pack(again, architecture, example), path)
    assert path.read_bytes() == first


def test_every_multiplication_of_a_quantized_residual_network_is_narrow():
    model, _, example = compressed(5, 7, 0.5, 0)
    layers = account(trace(model, example), FORMULAS).layers
    multiplying = [layer for layer in layers if layer.mults]
    assert len(multiplying) > 20
    assert all(layer.input_bits <= 7 and layer.weight_bits <= 5 for layer in multiplying)
    assert any(name.startswith("add") for name in quantizers_of(model))  # residual sums are quantized where they arise


def random_norms(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


def test_batch_norm_merges_into_the_convolution_before_it():
    model = random_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.rand(2, 3, 6, 6)
    result = merged(model, x[:1])
    assert isinstance(result[1], nn.Identity)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert torch.allclose(result(x), model(x), atol=1e-5)


def test_batch_norm_that_cannot_be_merged_becomes_a_scale_and_a_shift():
    model = random_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    x = torch.rand(2, 3, 6, 6)
    result = merged(model, x[:1])
    assert isinstance(result[2], ScaleShift)
    assert torch.allclose(result(x), model(x), atol=1e-5)


def test_a_convolution_that_something_else_reads_keeps_its_batch_norm():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    model = random_norms(Both())
    x = torch.rand(1, 3, 6, 6)
    result = merged(model, x)
    assert isinstance(result.norm, ScaleShift)
    assert torch.allclose(result(x), model(x), atol=1e-5)
