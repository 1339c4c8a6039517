"""Packing is exact: what is unpacked is the model that was packed, in the bits that were counted."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import packing
from micronet_eval.costs import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.formats import (
    _PLAIN,
    FLOAT8,
    FixedPoint,
    FixedPointQuantizer,
    OffGrid,
    Plain,
    fixed_point,
    format_of,
)
from micronet_eval.merge import merged
from micronet_eval.packing import _BitReader, _BitWriter, from_bytes, to_bytes
from micronet_eval.scoring import account
from micronet_eval.storage import stored_tensors
from micronet_eval.strategy import Context
from micronet_eval.structure import ScaleShift, quantizers_of, replace, set_quantizers, traced, without_weights
from micronet_eval.trace import trace
from micronet_plugins.architectures import wide_resnet
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.low_rank import LowRank
from micronet_plugins.magnitude import Magnitude

few = settings(max_examples=60, deadline=None)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
fixed_points = st.builds(FixedPoint, st.integers(2, 24), st.integers(-126, 100))


# --- formats ----------------------------------------------------------------------------------------------------------


def codes_of(data, bits, shape):
    """Codes of `bits` bits, each as an unsigned number, with zeros among them."""
    code = st.one_of(st.just(0), st.integers(0, 2**bits - 1))
    count = math.prod(shape)
    return np.array(data.draw(st.lists(code, min_size=count, max_size=count)), np.uint64).reshape(shape)


def computable(values):
    """torch has no arithmetic on 8-bit floats."""
    return values.float() if values.dtype in FLOAT8 else values


def is_nan_or_negative_zero(values):
    """Which values have no code of their own, or one that does not compare equal to itself."""
    if not values.is_floating_point():
        return torch.zeros(values.shape, dtype=torch.bool)
    values = computable(values)
    return values.isnan() | ((values == 0) & values.signbit())


@few
@given(st.data(), st.sampled_from(sorted(_PLAIN)), shapes)
def test_plain_formats_are_inverse_both_ways(data, name, shape):
    number_format = Plain(name)
    codes = torch.from_numpy(codes_of(data, number_format.code_bits, shape).astype(np.int64))
    values = number_format.decode(codes)
    codes = torch.where(is_nan_or_negative_zero(values), 0, codes)
    values = number_format.decode(codes)
    assert values.dtype == _PLAIN[name][0]
    assert values.shape == shape
    assert torch.equal(number_format.encode(values), codes)
    again = number_format.decode(number_format.encode(values))
    assert torch.equal(computable(again), computable(values))


@few
@given(st.data(), fixed_points, shapes)
def test_fixed_point_is_inverse_both_ways(data, number_format, shape):
    codes = torch.from_numpy(codes_of(data, number_format.code_bits, shape).astype(np.int64))
    values = number_format.decode(codes)
    assert values.dtype == torch.float32
    assert torch.equal(number_format.encode(values), codes)
    assert torch.equal(number_format.decode(number_format.encode(values)), values)


@few
@given(fixed_points)
def test_fixed_point_codes_are_twos_complement(number_format):
    bits, step = number_format.bits, 2.0**number_format.exponent
    largest, smallest = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    values = torch.tensor([0.0, step, -step, largest * step, smallest * step])
    assert number_format.encode(values).tolist() == [0, 1, 2**bits - 1, largest, 2 ** (bits - 1)]


@few
@given(st.one_of(fixed_points, st.sampled_from(sorted(_PLAIN)).map(Plain)))
def test_spec_and_overhead_describe_a_format(number_format):
    columns = iter(number_format.side)
    again = format_of(number_format.spec, (), lambda count, width: next(columns)[0])
    assert (again, next(columns, None)) == (number_format, None)


@pytest.mark.parametrize("name", sorted(_PLAIN))
def test_zero_is_code_zero_in_every_plain_format(name):
    assert Plain(name).encode(torch.zeros(2, dtype=_PLAIN[name][0])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_negative_zero_is_code_zero(dtype):
    number_format = Plain.of(dtype)
    assert number_format.encode(torch.tensor([-0.0], dtype=dtype)).item() == 0
    assert not number_format.decode(torch.tensor([0])).signbit().item()


def test_booleans_take_one_bit():
    values = torch.tensor([[True, False], [True, True]])
    assert Plain.of(torch.bool).code_bits == 1
    assert Plain.of(torch.bool).encode(values).tolist() == [[1, 0], [1, 1]]
    assert torch.equal(Plain.of(torch.bool).decode(torch.tensor([[1, 0], [1, 1]])), values)


@pytest.mark.parametrize("value", [0.3, 4.0, -4.5, math.nan, math.inf])
def test_a_value_off_the_grid_is_refused(value):
    # Steps of 0.5 from -4 to 3.5.
    with pytest.raises(OffGrid):
        FixedPoint(4, -1).encode(torch.tensor([0.5, value]))


@pytest.mark.parametrize(("bits", "exponent"), [(1, 0), (25, 0), (8, -127), (8, 101)])
def test_fixed_point_has_bounds(bits, exponent):
    with pytest.raises(OffGrid):
        FixedPoint(bits, exponent)


@pytest.mark.parametrize(
    "spec",
    ["fixed-point:1", "fixed-point:25", "fixed-point:x", "fixed-point", "float8", "", "affine:7:-7:1",
     "affine:-7:7:0x1", "affine:-7:7:1x1", "signed:9:int8", "unsigned:3:float32", "codebook:0",
     "codebook:4:int8", "codebook:4:float8_e4m3fn", "signs:float9"],
)  # fmt: skip
def test_a_format_that_does_not_exist_is_refused(spec):
    with pytest.raises(OffGrid):
        format_of(spec, (2,), lambda count, width: torch.zeros(count, dtype=torch.int64))


# --- bits -------------------------------------------------------------------------------------------------------------


@few
@given(st.data(), st.integers(1, 64), st.integers(0, 40))
def test_bits_are_inverse(data, width, count):
    codes = codes_of(data, width, (count,)).astype(np.int64)
    packed = to_bytes(codes, width)
    assert packed.size == -(-count * width // 8)
    assert np.array_equal(from_bytes(packed, codes.size, width), codes)


@pytest.mark.parametrize("count", [1, 600])
@pytest.mark.parametrize("width", [31, 32, 33])
def test_the_highest_bit_of_a_code_is_no_sign(width, count):
    codes = np.full(count, 1 << (width - 1), np.int64)
    assert from_bytes(to_bytes(codes, width), count, width).tolist() == codes.tolist()


def test_bits_start_with_the_least_significant():
    assert to_bytes(np.array([6, 1]), 4).tolist() == [0b0001_0110]


@few
@given(st.data(), st.lists(st.tuples(st.integers(1, 64), st.integers(0, 20)), max_size=6))
def test_a_stream_reads_back_what_was_written(data, parts):
    writer, written = _BitWriter(), []
    for width, count in parts:
        written.append(codes_of(data, width, (count,)).astype(np.int64))
        writer.write(written[-1], width)
    stream = writer.bytes()
    assert stream.size == -(-sum(width * count for width, count in parts) // 8)
    reader = _BitReader(stream)
    for (width, count), codes in zip(parts, written, strict=True):
        assert np.array_equal(reader.read(count, width), codes)
    reader.finish()


@pytest.mark.parametrize("width", [1, 3, 9])
def test_a_stream_longer_than_a_chunk(width):
    codes = np.arange(2 * packing._CHUNK + 5) % 2**width
    writer = _BitWriter()
    writer.write(np.array([1, 0, 1]), 1)  # so that chunks do not start on a byte
    writer.write(codes, width)
    reader = _BitReader(writer.bytes())
    assert reader.read(3, 1).tolist() == [1, 0, 1]
    assert np.array_equal(reader.read(codes.size, width), codes)
    reader.finish()


def test_a_stream_that_is_too_short_or_too_long_is_refused():
    writer = _BitWriter()
    writer.write(np.array([1, 2, 3]), 5)
    with pytest.raises(OffGrid, match="too early"):
        _BitReader(writer.bytes()).read(4, 5)
    with pytest.raises(OffGrid, match="more data"):
        _BitReader(np.append(writer.bytes(), np.uint8(0))).finish()


def test_padding_that_is_not_zero_is_refused():
    reader = _BitReader(np.array([0b1000_0001], np.uint8))
    reader.read(7, 1)
    with pytest.raises(OffGrid, match="more data"):
        reader.finish()


# --- the quantizer ----------------------------------------------------------------------------------------------------


def test_rounding_ties_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 0.51])
    assert FixedPointQuantizer(8)(x).tolist() == [0, 2, 2, 0, -2, -2, 0, 1]


def test_rounding_ties_to_even_at_another_step():
    assert FixedPointQuantizer(8, -2)(torch.tensor([0.125, 0.375, 0.625])).tolist() == [0, 0.5, 0.5]


def test_saturation_is_that_of_twos_complement():
    # 4 bits at steps of 0.5: -4 to 3.5.
    x = torch.tensor([100.0, 3.9, 3.5, -4.0, -4.4, -100, math.inf, -math.inf])
    assert FixedPointQuantizer(4, -1)(x).tolist() == [3.5, 3.5, 3.5, -4, -4, -4, 3.5, -4]


@pytest.mark.parametrize("exponent", [-126, -9, 0, 100])
@pytest.mark.parametrize("bits", [2, 9, 22, 23, 24])  # float32 rounds by one addition up to 23
def test_every_width_rounds_ties_to_even(bits, exponent):
    step, low, high = 2.0**exponent, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    near = [n + part for n in (low, low // 2, -1, 0, 1, high // 2, high) for part in (-0.75, -0.5, -0.25, 0.25, 0.5)]
    values = (torch.tensor(near, dtype=torch.float64) * step).float().tolist()  # what float32 has of them
    rounded = [min(max(round(value / step), low), high) * step for value in values]  # Python rounds ties to even
    assert FixedPointQuantizer(bits, exponent)(torch.tensor(values)).tolist() == rounded


def test_the_quantizer_makes_no_negative_zero():
    assert not FixedPointQuantizer(8)(torch.tensor([-0.2, -0.0])).signbit().any()


@few
@given(fixed_points, st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8), st.integers(-3, 30))
def test_what_is_quantized_is_on_the_grid_and_stays_there(number_format, values, scale):
    x = torch.tensor(values) * 2.0 ** min(max(number_format.exponent + scale, -126), 100)
    quantized = fixed_point(x, torch.tensor(number_format.exponent, dtype=torch.int8), number_format.bits)
    number_format.encode(quantized)  # raises OffGrid otherwise
    again = fixed_point(quantized, torch.tensor(number_format.exponent, dtype=torch.int8), number_format.bits)
    assert torch.equal(again, quantized)
    limit = 2.0 ** (number_format.exponent + number_format.bits - 1)
    inside = x.abs().double() < limit - 2.0**number_format.exponent
    assert ((quantized - x).double().abs() <= 2.0 ** (number_format.exponent - 1))[inside].all()


def test_gradients_pass_the_rounding_and_stop_at_saturation():
    # 4 bits at steps of 0.5: -4 to 3.5.
    x = torch.tensor([0.3, -1.2, 3.5, -4.0, 4.5, 100, -4.6, -100], requires_grad=True)
    (FixedPointQuantizer(4, -1)(x) * torch.arange(1.0, 9)).sum().backward()
    assert x.grad.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_gradients_reach_a_quantized_weight():
    layer = nn.Linear(2, 1, bias=False)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(8, -6))
    layer(torch.tensor([[2.0, 3.0]])).sum().backward()
    assert layer.parametrizations["weight"].original.grad.tolist() == [[2, 3]]


# --- whole models -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions around a functional residual sum, and a linear layer."""

    def __init__(self, width, groups, bias):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=bias)
        self.body = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=bias)
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(F.relu(x))
        return self.head(F.relu(x).mean((2, 3)))


IMAGE = torch.linspace(-2, 2, 2 * 5 * 5).view(1, 2, 5, 5)


def counted(model, x=IMAGE):
    return account(trace(model, x), FORMULAS, freebie=False)


def context(x):
    loader = DataLoader(TensorDataset(x.repeat(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)), batch_size=4)
    return Context(x, loader, 0, FORMULAS)


def round_trip(model, architecture, x, folder):
    """Packs, writes, reads and unpacks; checks all that has to hold for every model. Returns what was unpacked."""
    architecture = architecture.eval()
    packed = packing.pack(model, architecture, x)
    path = folder / "weights.safetensors"
    packing.write(packed, path)
    first = path.read_bytes()
    packing.write(packing.pack(model, architecture, x), path)
    assert path.read_bytes() == first
    unpacked = packing.unpack(packing.read(path), copy.deepcopy(architecture)).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), model(x))

    before, after = (stored_tensors(trace(m, x)) for m in (model, unpacked))
    assert [(s.name, s.format) for s in after] == [(s.name, s.format) for s in before]
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(after, before, strict=True))
    result, expected = counted(unpacked, x), counted(model, x)
    assert (result.storage, result.math, result.layers) == (expected.storage, expected.math, expected.layers)

    storage = expected.storage
    for stream, bits in (("values", storage.value_bits), ("masks", storage.mask_bits)):
        assert bits <= packed.bits[stream] < bits + 8
    assert storage.overhead_bits <= packed.bits["overhead"] < storage.overhead_bits + 8
    assert path.stat().st_size <= storage.bits / 8 * 1.02 + 65536
    return unpacked


@st.composite
def nets(draw):
    """An architecture, and a model of it with random weights, sparsity, and widths of parameters and activations."""
    groups = draw(st.sampled_from([1, 2]))
    architecture = Net(groups * draw(st.integers(1, 4)), groups, draw(st.booleans())).eval()
    model = copy.deepcopy(architecture)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    for layer in (model.stem, model.body, model.head):
        for name in [name for name, _ in layer.named_parameters()]:
            parameter = getattr(layer, name)
            kept = torch.rand(parameter.shape, generator=generator) < draw(st.sampled_from([0, 0.1, 0.5, 0.95, 1]))
            parameter.data = torch.randn(parameter.shape, generator=generator) * kept
            if bits := draw(st.one_of(st.none(), st.integers(2, 24))):
                quantizer = FixedPointQuantizer(bits, draw(st.integers(-20, 2)))
                parametrize.register_parametrization(layer, name, quantizer)
    if draw(st.booleans()):
        model = traced(model)
        for name in ("x", "stem", "add", "mean"):
            set_quantizers(model, {name: FixedPointQuantizer(draw(st.integers(2, 24)), draw(st.integers(-10, 2)))})
    return architecture, model


@few
@given(nets())
def test_every_model_survives_packing(tmp_path_factory, net):
    architecture, model = net
    round_trip(model, architecture, IMAGE, tmp_path_factory.mktemp("packed"))


@few
@given(nets())
def test_an_unpacked_model_packs_to_the_same_bytes(tmp_path_factory, net):
    architecture, model = net
    folder = tmp_path_factory.mktemp("packed")
    first = packing.pack(model, architecture, IMAGE)
    unpacked = packing.unpack(first, copy.deepcopy(architecture))
    packing.write(first, folder / "first")
    packing.write(packing.pack(unpacked, architecture, IMAGE), folder / "second")
    assert (folder / "first").read_bytes() == (folder / "second").read_bytes()


def test_a_layer_that_is_used_twice_survives_packing(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(F.relu(self.layer(x)))

    model = Twice()
    round_trip(model, Twice(), torch.ones(1, 4), tmp_path)
    parametrize.register_parametrization(model.layer, "weight", FixedPointQuantizer(8, -7))
    round_trip(model, Twice(), torch.ones(1, 4), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_survive_packing(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    architecture = copy.deepcopy(model)
    unpacked = round_trip(model, architecture, torch.ones(1, 4, dtype=dtype), tmp_path)
    assert unpacked[0].weight.dtype == dtype


def test_masked_weights_survive_packing(tmp_path):
    architecture = Net(4, 1, True)
    model = Magnitude(sparsity=0.7).apply(Net(4, 1, True).eval(), context(IMAGE))
    unpacked = round_trip(model, architecture, IMAGE, tmp_path)
    assert torch.equal(unpacked.body.weight, model.body.weight)
    assert not parametrize.is_parametrized(unpacked.body)


def test_weights_on_the_meta_device_are_enough_to_unpack_into(tmp_path):
    model = Net(4, 1, True).eval()
    with torch.device("meta"):
        architecture = Net(4, 1, True)
    unpacked = packing.unpack(packing.pack(model, model, IMAGE), architecture)
    with torch.no_grad():
        assert torch.equal(unpacked(IMAGE), model(IMAGE))


# --- structural edits -------------------------------------------------------------------------------------------------


SMALL = torch.linspace(0, 1, 64).view(1, 1, 8, 8)


def architecture():
    return wide_resnet(10, 1, 10, 1)


def trained():
    """Batch norms that do something, as after training."""
    torch.manual_seed(0)
    model = architecture()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def test_merged_batch_norm_survives_packing(tmp_path):
    model = merged(trained(), SMALL)
    unpacked = round_trip(model, architecture(), SMALL, tmp_path)
    kinds = [type(m) for m in unpacked.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.Identity) == [type(m) for m in model.modules()].count(nn.Identity) > 0
    assert kinds.count(ScaleShift) == [type(m) for m in model.modules()].count(ScaleShift) > 0


def test_batch_norm_that_is_neither_merged_nor_a_scale_and_shift(tmp_path):
    """Its statistics are no weights; either they survive or packing says what to do."""
    try:
        round_trip(trained(), architecture(), SMALL, tmp_path)
    except InputError as error:
        assert "batch norm" in str(error)


def test_low_rank_layers_survive_packing(tmp_path):
    model = merged(LowRank(parameters=20_000).apply(trained(), context(SMALL)), SMALL)
    assert any(type(m) is nn.Sequential and len(m) == 3 and type(m[1]) is nn.Conv2d for m in model[1:4].modules())
    round_trip(model, architecture(), SMALL, tmp_path)


def test_layers_in_a_module_dict_survive_packing(tmp_path):
    class ByKey(nn.Module):
        def __init__(self):
            super().__init__()
            layers = {"in": nn.Conv2d(1, 8, 3), "mid": nn.Conv2d(8, 8, 3), "out": nn.Linear(8, 10)}
            self.layers = nn.ModuleDict(layers)

        def forward(self, x):
            return self.layers["out"](self.layers["mid"](self.layers["in"](x).relu()).mean((2, 3)))

    model = LowRank(parameters=400).apply(ByKey(), context(SMALL))
    assert isinstance(model.layers["mid"], nn.Sequential)
    round_trip(model.eval(), ByKey(), SMALL, tmp_path)


def test_activation_quantizers_at_functional_sums_survive_packing(tmp_path):
    model = FixedPointStrategy(weight_bits=7, activation_bits=9).apply(merged(trained(), SMALL), context(SMALL))
    assert any(name.startswith("add") for name in quantizers_of(model))
    unpacked = round_trip(model, architecture(), SMALL, tmp_path)
    quantizers = {name: (q.bits, int(q.exponent)) for name, q in quantizers_of(model).items()}
    assert {name: (q.bits, int(q.exponent)) for name, q in quantizers_of(unpacked).items()} == quantizers


def test_all_of_it_together_survives_packing(tmp_path):
    model = LowRank(parameters=20_000).apply(trained(), context(SMALL))
    model = Magnitude(sparsity=0.6).apply(merged(model, SMALL), context(SMALL))
    model = FixedPointStrategy(weight_bits=5, activation_bits=8).apply(model, context(SMALL))
    unpacked = round_trip(model, architecture(), SMALL, tmp_path)
    assert counted(unpacked, SMALL).storage.mask_bits > 0


def test_a_layer_of_another_kind_is_refused():
    class Mine(nn.Module):
        def forward(self, x):
            return x * 2

    model = trained()
    replace(model, "1.0.relu", Mine())
    with pytest.raises(InputError, match=r"1\.0\.relu.*Mine"):
        packing.pack(merged(model, SMALL), architecture(), SMALL)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    model = Net(4, 1, True)
    model.body.bias.data[0] = value
    with pytest.raises(InputError, match=r"body\.bias.*NaN or infinity"):
        packing.pack(model, model, IMAGE)


class Computed(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.second = nn.Parameter(torch.randn(4, 4))
        self.compute = compute

    def forward(self, x):
        return x @ self.compute(self.first, self.second)


def put_together(first, second):
    weight = torch.zeros(4, 4)
    weight[:2] = first[:2]
    weight[2:] = second[2:]
    return weight


@pytest.mark.parametrize(
    "compute", [lambda a, b: a @ b, lambda a, b: a + b, lambda a, b: a.half().float(), put_together]
)
def test_a_weight_that_is_computed_of_parameters_is_refused(compute):
    with pytest.raises(InputError, match="cannot pack 'first'"):
        packing.pack(Computed(compute), Computed(compute), torch.zeros(1, 4))


def test_bits_that_are_read_as_another_dtype_are_refused():
    def build():
        model = Computed(lambda first, second: first.view(torch.float16).float())
        model.first = nn.Parameter(torch.full((4, 4), 0.5).half().view(torch.int16), requires_grad=False)
        return model

    with pytest.raises(InputError, match="cannot pack 'first'"):
        packing.pack(build(), build(), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "compute",
    [lambda a, b: torch.cat([a[:2], b[:2]]), lambda a, b: torch.cat([a, b])[::2], lambda a, b: a.flip(0)],
    ids=["parts", "every other", "flip"],
)
def test_parts_that_are_put_together_are_refused_or_survive(compute, tmp_path):
    model = Computed(compute)
    try:
        round_trip(model, Computed(compute), torch.ones(1, 4), tmp_path)
    except InputError as error:
        assert "cannot pack" in str(error)


@pytest.mark.parametrize("compute", [lambda a, b: torch.cat([a, b]), lambda a, b: torch.cat([a, b]).flip(0)])
def test_parameters_that_are_moved_whole_survive_packing(compute, tmp_path):
    round_trip(Computed(compute), Computed(compute), torch.ones(1, 8), tmp_path)


def test_a_parameter_that_is_called_like_one_that_is_pruned_survives_packing(tmp_path):
    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_orig = nn.Parameter(torch.rand(4, 4) + 0.5)

        def forward(self, x):
            return x @ self.weight_orig

    round_trip(Original(), Original(), torch.ones(1, 4), tmp_path)


def test_a_tensor_of_as_many_elements_as_are_read(monkeypatch):
    model = nn.Linear(3, 2, bias=False)
    packed = packing.pack(model, model, torch.zeros(1, 3))
    monkeypatch.setattr(packing, "_MOST_ELEMENTS", 6)
    assert torch.equal(packing.unpack(packed, nn.Linear(3, 2, bias=False)).weight, model.weight)
    monkeypatch.setattr(packing, "_MOST_ELEMENTS", 5)
    with pytest.raises(InputError, match="has 6 elements; at most 5 are read"):
        packing.unpack(packed, nn.Linear(3, 2, bias=False))


def test_tied_weights_survive_packing(tmp_path):
    def build():
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        return nn.Sequential(first, second)

    model = build()
    parametrize.register_parametrization(model[0], "weight", quantizer := FixedPointQuantizer(6, -4))
    parametrize.register_parametrization(model[1], "weight", quantizer)
    packed = packing.pack(model, build(), torch.zeros(1, 4))
    assert [name for name, *_ in packed.structure.tensors].count("0.weight") == 1
    packing.write(packed, tmp_path / "weights.safetensors")
    with without_weights():
        architecture = build()
    unpacked = packing.unpack(packing.read(tmp_path / "weights.safetensors"), architecture)
    x = torch.randn(3, 4)
    assert torch.equal(unpacked(x), model(x))


def test_a_file_of_another_architecture_is_refused(tmp_path):
    packed = packing.pack(Net(4, 1, True), Net(4, 1, True), IMAGE)
    for other in (Net(6, 1, True), Net(3, 1, True), Net(4, 1, False), nn.Linear(2, 2)):
        with pytest.raises(InputError):
            packing.unpack(packed, other)


@pytest.mark.parametrize("change", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "weights.safetensors"
    packing.write(packing.pack(Net(4, 1, True), Net(4, 1, True), IMAGE), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"flip": data, "truncate": data[:-9], "empty": b""}[change])
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        packing.read(path)


def test_a_single_value_with_a_strange_stride_survives_packing(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(1, 1))

    model = net()
    model[0].weight = nn.Parameter(torch.rand(65).as_strided((1, 1), (1, 65)))
    x = torch.rand(3, 1)
    packing.write(packing.pack(model, net(), x), tmp_path / "weights.safetensors")
    unpacked = packing.unpack(packing.read(tmp_path / "weights.safetensors"), net())
    assert torch.equal(unpacked(x), model(x))


def test_a_quantizer_whose_exponent_is_missing():
    """It is not taken as that of a new quantizer, 0."""
    layer = nn.Sequential(nn.Linear(4, 2))
    model = traced(copy.deepcopy(layer))
    set_quantizers(model, {"_0": FixedPointQuantizer(8, -3)})
    packed = packing.pack(model, layer, torch.zeros(1, 4))
    without = packed.structure.model_copy(update={"tensors": packed.structure.tensors[:-1]})
    streams = {**packed.streams, "overhead": packed.streams["overhead"][:-1]}
    with pytest.raises(InputError, match=r"tensor 'quantizers\._0\.exponent' is missing; a quantizer needs it"):
        packing.unpack(packing.Packed(without, streams, {}), layer)


class Keeps(nn.Module):
    """Quantizers of its own, one of which nothing reads."""

    def __init__(self):
        super().__init__()
        self.layer, self.used, self.unused = nn.Linear(4, 2), FixedPointQuantizer(8, -3), FixedPointQuantizer(8, -2)

    def forward(self, x):
        return self.layer(self.used(x))


def test_a_quantizer_of_the_architecture_that_nothing_reads():
    """Its exponent is that of the architecture's code, and not in the file."""
    model = Keeps()
    packed = packing.pack(model, Keeps(), torch.zeros(1, 4))
    assert "unused.exponent" not in [name for name, *_ in packed.structure.tensors]
    x = torch.randn(3, 4)
    assert torch.equal(packing.unpack(packed, Keeps())(x), model(x))


def test_a_quantizer_of_a_constant_is_not_packed():
    class Adds(Keeps):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.layer(x) + (self.c + 0)

    model = traced(Adds())
    set_quantizers(model, {"add": FixedPointQuantizer(8, -3)})
    with pytest.raises(InputError, match=r"no operation on an activation reads 'quantizers\.add\.exponent'"):
        packing.pack(model, Adds(), torch.zeros(1, 4))
