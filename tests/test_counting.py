"""Formulas, bit-widths and storage on small modules, against numbers worked out by hand."""

import functools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval.costs import FORMULAS, NoFormula, elementwise
from micronet_eval.errors import InputError
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.precision import number_width
from micronet_eval.scoring import Layer, Module, account, by_module, weighted
from micronet_eval.structure import Mask, traced
from micronet_eval.trace import constant, trace


class Call(nn.Module):
    """A module whose forward is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def count(module, *shape, dtype=torch.float32):
    return account(trace(module, torch.zeros(shape, dtype=dtype)), FORMULAS, freebie=False)


def nonzero(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    return module


@pytest.mark.parametrize(
    ("function", "mults", "adds"),
    [
        (F.relu, 1, 0),
        (F.leaky_relu, 1, 0),
        (F.relu6, 2, 0),
        (F.sigmoid, 2, 1),
        (F.silu, 3, 1),
        (F.hardsigmoid, 2, 1),
        (F.hardswish, 3, 1),
        (F.gelu, 4, 1),
        (torch.tanh, 1, 0),
        (torch.exp, 1, 0),
        (lambda x: x * x, 1, 0),
        (lambda x: x + x, 0, 1),
        (lambda x: x.transpose(1, 2).reshape(2, 64), 0, 0),
    ],
)
def test_elementwise_operations_cost_what_the_table_says(function, mults, adds):
    math = count(Call(function), 2, 4, 4, 4).math
    assert (math.mults, math.adds) == (128 * mults, 128 * adds)


@pytest.mark.rule("math.zero-weights", "width.accumulate")
def test_a_convolution_counts_non_zero_weights_and_live_outputs():
    conv = nonzero(nn.Conv2d(2, 3, 3, padding=1))
    with torch.no_grad():
        conv.weight[0] = 0  # an output without weights: no multiplication, no bias addition
        conv.weight[1, 0] = 0  # 9 weights are left
    math = count(conv, 1, 2, 5, 5).math
    assert math.mults == 25 * (9 + 18)
    assert math.adds == 25 * (9 + 18)  # n - 1 and one for the bias
    assert math.macs == math.mults


def test_a_strided_grouped_convolution():
    math = count(nonzero(nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)), 1, 4, 9, 9).math
    assert (math.mults, math.adds) == (16 * 8 * 18, 16 * 8 * 17)


def test_linear_and_batched_matrix_products():
    assert count(nonzero(nn.Linear(6, 5)), 3, 6).math.adds == 3 * 5 * 6
    math = count(Call(lambda x: x @ x.transpose(1, 2)), 2, 3, 4).math
    assert (math.mults, math.adds) == (2 * 9 * 4, 2 * 9 * 3)


def test_pooling():
    average = count(nn.AvgPool2d(2), 1, 3, 4, 4).math
    assert (average.mults, average.adds) == (12, 36)
    largest = count(nn.MaxPool2d(2), 1, 3, 4, 4).math
    assert (largest.mults, largest.adds) == (0, 36)
    uneven = count(nn.AdaptiveAvgPool2d(2), 1, 1, 3, 3).math  # four windows of 2x2
    assert (uneven.mults, uneven.adds) == (4, 12)


def test_softmax():
    math = count(nn.Softmax(-1), 2, 5).math
    assert (math.mults, math.adds) == (20, 8)


@pytest.mark.parametrize(("number", "bits"), [(0, 1), (1, 1), (0.25, 1), (-8, 1), (3, 32), (0.3, 32)])
def test_a_number_is_as_wide_as_32_bits_unless_it_is_a_shift(number, bits):
    assert number_width(number) == bits


def test_an_unknown_operation_is_an_error_that_names_it_until_a_plugin_prices_it():
    module = nn.Sequential(Call(torch.special.i0))
    with pytest.raises(NoFormula, match=r"aten.i0.*'0'.*micronet_register_costs"):
        count(module, 1, 4)
    priced = account(trace(module, torch.zeros(1, 4)), {**FORMULAS, "aten.i0": elementwise(1)})
    assert priced.math.mults == 4


@pytest.mark.rule("math.one-mode")
def test_the_count_does_not_depend_on_mode_device_or_dtype():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))

    expected = count(nonzero(build()), 1, 3, 3, 3).math
    training = nonzero(build()).train()
    assert count(training, 1, 3, 3, 3).math == expected
    assert all(module.training for module in training.modules())
    half = count(nonzero(build()).bfloat16(), 1, 3, 3, 3, dtype=torch.bfloat16).math
    assert (half.mults, half.adds) == (expected.mults, expected.adds)
    with torch.device("meta"):
        assert count(build(), 1, 3, 3, 3).math == expected


@pytest.mark.rule("math.parameters")
def test_operations_on_parameters_alone_are_not_counted():
    linear = nonzero(nn.Linear(4, 4, bias=False))
    parametrize.register_parametrization(linear, "weight", Mask(torch.eye(4, dtype=torch.bool)))
    counted = count(linear, 1, 4)
    assert (counted.math.mults, counted.math.adds) == (4, 0)
    assert (counted.storage.parameters, counted.storage.nonzeros) == (16, 4)
    assert counted.storage.bits == 4 * 32 + 16


@pytest.mark.rule("storage.smallest", "storage.bitmask")
def test_dense_storage_is_used_where_the_mask_would_not_pay():
    linear = nonzero(nn.Linear(32, 1, bias=False))
    with torch.no_grad():
        linear.weight[0, 0] = 0  # 31 x 32 + 32 bits are no less than 32 x 32
    assert count(linear, 1, 32).storage.mask_bits == 0
    with torch.no_grad():
        linear.weight[0, 1] = 0
    assert count(linear, 1, 32).storage.bits == 30 * 32 + 32


def test_negative_zero_is_zero():
    linear = nonzero(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        linear.weight[0, :3] = -0.0
    counted = count(linear, 1, 4)
    assert (counted.storage.nonzeros, counted.math.mults) == (1, 1)


@pytest.mark.rule("storage.everything")
def test_tied_parameters_are_stored_once():
    first = nonzero(nn.Linear(4, 4, bias=False))
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count(nn.Sequential(first, second), 1, 4).storage.parameters == 16


@pytest.mark.rule("storage.batch-norm")
def test_batch_norm_stores_two_values_a_channel():
    assert count(nonzero(nn.BatchNorm2d(8)), 1, 8, 2, 2).storage.parameters == 16


def quantized_linear(weight_bits, activation_bits):
    linear = nonzero(nn.Linear(4, 4))
    parametrize.register_parametrization(linear, "weight", FixedPointQuantizer(weight_bits, -2))
    return nn.Sequential(FixedPointQuantizer(activation_bits, -4), nn.ReLU(), linear)


@pytest.mark.rule("width.widest", "width.bias")
def test_a_multiplication_counts_its_widest_input_and_no_bias():
    counted = count(quantized_linear(3, 5), 1, 4)
    relu, linear = counted.layers
    assert (relu.input_bits, linear.input_bits, linear.weight_bits) == (5, 5, 3)
    assert counted.math.mult_ops32 == (4 + 16) * 5 / 32
    assert counted.math.add_ops32 == 16
    # 16 weights of 3 bits and 4 biases of 32; an exponent of 8 bits for the weight and one for the activation
    assert (counted.storage.value_bits, counted.storage.overhead_bits) == (16 * 3 + 4 * 32, 16)


@pytest.mark.rule("width.graph")
def test_arithmetic_widens_and_moves_do_not():
    module = nn.Sequential(
        FixedPointQuantizer(6), nn.MaxPool2d(1), Call(lambda x: torch.cat([x, x], 1) + x.sum()), nn.ReLU()
    )
    add, relu = count(module, 1, 2, 2, 2).layers[-2:]
    assert (add.op, add.input_bits, relu.input_bits) == ("aten.add", 32, 32)


@pytest.mark.rule("storage.freebie")
def test_the_freebie_holds_for_all_or_nothing():
    plain = account(trace(nonzero(nn.Linear(4, 4)), torch.zeros(1, 4)), FORMULAS)
    assert plain.freebie
    assert plain.storage.bits == 20 * 16
    assert (plain.math.mult_ops32, plain.math.add_ops32) == (8, 16)
    assert not account(trace(quantized_linear(8, 32 - 8), torch.zeros(1, 4)), FORMULAS).freebie
    assert account(trace(quantized_linear(16, 16), torch.zeros(1, 4)), FORMULAS).freebie


def test_the_worked_examples_of_the_rules():
    from micronet_eval.costs import Cost

    assert weighted(Cost(mults=1), max(3, 5))[0] * 32 == 5
    assert weighted(Cost(mults=1), max(32, 8))[0] == 1
    assert weighted(Cost(mults=1), 64)[0] == 1
    assert [weighted(Cost(adds=1), width)[1] * 32 for width in (5, 32, 64)] == [5, 32, 32]
    assert weighted(Cost(accumulations=1), 5)[1] == 1
    assert weighted(Cost(adds=1), 16, freebie=True)[1] == 1
    assert round(3e6 / 6.9e6 + 500e6 / 1170e6, 3) == 0.862


def test_what_only_stores_is_a_free_layer():
    counted = account(trace(nonzero(nn.Embedding(10, 4)), torch.zeros(1, 5, dtype=torch.int64)), FORMULAS, False)
    assert counted.free_layers == (Layer("", "aten.embedding", 0, 0, 0, 0, 0.0, 40 * 32),)
    assert counted.layers == ()


def test_an_account_shows_its_figures_and_no_tensors():
    shown = repr(count(quantized_linear(3, 5), 1, 4))
    assert not [name for name in ("trace", "operations", "stored", "widths") if f" {name}=" in shown]


def test_modules_in_three_steps():
    linear = nonzero(nn.Linear(64, 2))
    with torch.no_grad():
        linear.weight[:] = 0
        linear.weight[0, ::8] = linear.weight[1, 3::8] = 0.5
    parametrize.register_parametrization(linear, "weight", FixedPointQuantizer(4, -2))
    counted = count(nn.Sequential(nn.ReLU(), nn.Flatten(), linear), 1, 64)
    # 64 ReLUs. Of 2 x 64 weights 16 are left: as many additions as multiplications, with the bias; 2 biases of 32 bits,
    # an exponent of 8. As 32-bit values 16 x 32 and a mask of 128; 4-bit values 16 x 4 and the mask.
    assert by_module(counted, FORMULAS) == (
        Module("0", 64, 64, 64.0, 0, 0, 0),
        Module("2", 256, 32, 32.0, 130 * 32, 16 * 32 + 128 + 64, 16 * 4 + 128 + 64 + 8),
    )
    assert {type(m.dense_ops) for m in by_module(counted, FORMULAS)} == {int}  # 64, not 64.0, in a report
    half = tuple(replace(priced, share=Fraction(1, 2)) for priced in counted.operations)
    modules = by_module(replace(counted, operations=half), FORMULAS)
    assert [(m.dense_ops, m.sparse_ops, m.ops32) for m in modules] == [(32, 32, 32.0), (128, 16, 16.0)]


# --- what the forward makes, and what it keeps outside of its parameters ----------------------------------------------


class Made(nn.Module):
    """Computes with a tensor that `make` makes of a parameter of 2 x 4 values, and of one that is none."""

    def __init__(self, make):
        super().__init__()
        self.weight = nonzero(nn.Linear(4, 2, bias=False)).weight
        self.plain = torch.linspace(1, 2, 8).view(4, 2)
        self.make = make

    def forward(self, x):
        return x @ self.make(self)


def in_place(module):
    weight = torch.zeros(4, 2)
    weight[:, 0] = module.weight[0]
    weight[:, 1] = module.weight[1]
    return weight


def zeroed_after_use(module):
    weight = module.weight.T.clone()
    used = weight * 1
    weight.zero_()
    return used


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda m: m.weight.T, 8),
        (in_place, 8),
        (zeroed_after_use, 8),
        (lambda m: torch.randn(4, 2), 8),  # what is drawn is needed as much as what is trained
        (lambda m: torch.arange(8.0).view(4, 2).cos(), 8),
        (lambda m: m.plain, 8),
        (lambda m: m.plain * 2, 8),
        (lambda m: m.weight.T.repeat(1, 3), 8),  # moves of 8 values
        (lambda m: m.weight.T @ m.weight, 16),  # arithmetic: the result is what inference needs
        (lambda m: torch.full((4, 2), 0.5), 0),  # a fill
        (lambda m: torch.arange(8.0).view(4, 2), 0),  # a counter
    ],
)
@pytest.mark.rule("storage.everything")
def test_what_is_multiplied_with_is_stored(make, values):
    counted = count(Made(make), 1, 4)
    assert (counted.storage.parameters, counted.storage.bits) == (values, values * 32)


def test_a_tensor_that_is_read_twice_is_stored_once():
    module = Made(lambda m: m.plain + m.plain)
    assert count(module, 1, 4).storage.parameters == 8
    assert count(Call(lambda x: x * module.plain[0] + x * module.plain[0]), 1, 2).storage.parameters == 2


def test_parts_of_a_tensor_are_stored_as_parts_or_as_the_whole():
    weight = torch.arange(1.0, 9.0)
    stored = [count(Call(f), 1, 8).storage.parameters for f in (
        lambda x: x[:, :3] * weight[:3] + x[:, 3:6] * weight[5:],  # less than the whole
        lambda x: (x[:, :6] * weight[:6]).sum() + (x[:, 2:] * weight[2:]).sum(),  # they overlap
        lambda x: (x[:, :3] * weight[:3]).sum() + (x * weight).sum(),  # the whole is there anyway
    )]  # fmt: skip
    assert stored == [6, 8, 8]


def test_what_is_given_as_out_is_only_written():
    weight = torch.arange(1.0, 5.0)
    counted = count(Call(lambda x: torch.mul(x, weight, out=torch.full((1, 4), 0.37))), 1, 4)
    assert counted.storage.bits == 4 * 32
    narrow = torch.fake_quantize_per_tensor_affine
    counted = count(Call(lambda x: torch.maximum(narrow(x, 0.5, 0, -8, 7), narrow(x, 0.5, 0, -8, 7), out=x)), 1, 4)
    assert counted.layers[-1].input_bits == 4  # whatever lay there before


def test_constants_that_are_written_over_an_activation_are_an_operation():
    weight = torch.arange(1.0, 5.0)
    counted = count(Call(lambda x: torch.mul(weight, weight[None], out=x * 2) + 1), 1, 4)
    assert [layer.op for layer in counted.layers] == ["aten.mul", "aten.mul", "aten.add"]


def test_what_an_input_is_written_beside_is_stored():
    weight = nonzero(nn.Linear(4, 1, bias=False)).weight

    def beside(x):
        row = torch.zeros(2, 4)
        row[:1] = weight
        row[1:] = x
        return row + row

    counted = count(Call(beside), 1, 4)
    assert (counted.storage.nonzeros, counted.storage.parameters) == (4, 8)


@pytest.mark.rule("storage.code")
def test_numbers_in_the_code_are_stored_once():
    counted = count(Call(lambda x: x * 0.3 + x * 0.3 + x * 0.5 + 1.7 - x / 4), 1, 4)
    assert (counted.storage.parameters, counted.storage.bits, counted.storage.code_bits) == (2, 64, 64)


def test_factors_of_other_operations_are_numbers_in_the_code():
    assert count(Call(lambda x: F.leaky_relu(x, 0.1)), 1, 4).storage.code_bits == 32
    assert count(Call(lambda x: F.leaky_relu(x, 0.25)), 1, 4).storage.code_bits == 0  # a shift
    assert count(Call(lambda x: torch.add(x, x, alpha=0.3)), 1, 4).storage.code_bits == 32
    assert count(Call(lambda x: torch.lerp(x, x.flip(1), 0.3)), 1, 4).storage.code_bits == 32
    assert count(Call(lambda x: torch.addcmul(x, x, x, value=0.3)), 1, 4).storage.code_bits == 32
    plain = count(Call(lambda x: torch.add(x, x)), 1, 4)
    assert plain.storage.code_bits == 0
    assert plain.layers[0].weight_bits == 0


def set_by_item(x):
    copy = x.clone()
    copy[:, 2] = 0.37
    return copy


@pytest.mark.parametrize(
    ("write", "bits"),
    [
        (lambda x: F.pad(x, (0, 1), value=0.37), 32),
        (lambda x: x.masked_fill(x > 0, 0.37), 32),
        (lambda x: x.masked_fill(x > 0, 0.37) + 0.37, 32),
        (lambda x: F.threshold(x, 0.5, 0.37), 32),
        (set_by_item, 32),
        (lambda x: x.index_fill(1, torch.tensor([2, 3]), 0.37), 32 + 2 * 2),  # and two places of 2 bits
        (lambda x: torch.cat([torch.empty_like(x[:, :1]).fill_(i + 0.37) for i in range(9)], 1), 9 * 32),
        (lambda x: torch.addmm(x, x, x, alpha=0.37), 32),
        (lambda x: torch.baddbmm(x[None], x[None], x[None], beta=0.37, alpha=0.3), 2 * 32),
        # Powers of two are shifts, infinity says nothing; bounds are those of ReLU6 and its like.
        (lambda x: F.pad(x, (0, 1), value=0.5).masked_fill_(torch.tensor(True), -torch.inf), 1),
        (lambda x: torch.addmm(x, x, x, beta=0.25), 0),
        (lambda x: x.clamp(-0.37, 0.37), 0),
    ],
)
@pytest.mark.rule("storage.code")
def test_numbers_that_are_written_into_activations_are_stored_once(write, bits):
    assert count(Call(write), 4, 4).storage.bits == bits


def causal(x):
    places = torch.arange(4)
    return x + (places[:, None] < places[None, :]).float() * -1e9


@pytest.mark.parametrize(
    ("constant", "bits"),
    [
        (lambda p: F.pad(p[:0], (0, 4), value=0.37), 32),
        (lambda p: torch.fill(torch.zeros(4), 0.37), 32),
        (lambda p: p.masked_fill(torch.tensor([True, False, True, False]), 0.37), 4 * 32),
        (lambda p: torch.cat([torch.arange(v, v + 1, 10.0) for v in (0.1, 0.2, 0.3, 0.4)]), 4 * 32),
        (lambda p: torch.tril(torch.ones(4, 4)), 32 + 16),  # where, and what
        (lambda p: torch.full_like(p, 0.37), 32),  # only its shape is that of the parameter
        (lambda p: torch.ones_like(p), 0),
        (lambda p: torch.arange(4), 0),
        (lambda p: F.pad(p[:0], (0, 4), value=0.5), 0),
    ],
)
def test_numbers_that_constants_are_made_with_are_stored(constant, bits):
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.full((4,), 0.3))

        def forward(self, x):
            return x * constant(self.p)

    assert count(Times(), 4, 4).storage.bits == bits


@pytest.mark.parametrize("given", ["weight", "bias", "both"])
def test_batch_norm_with_an_activation_as_scale_or_shift_stores_two_values_a_channel_and_a_constant_shift(given):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("mean", "var", "weight", "bias"):
                self.register_buffer(name, torch.rand(4) + 0.5)

        def forward(self, x):
            weight = self.weight if given == "bias" else x[0]
            bias = self.bias if given == "weight" else x[1]
            return F.batch_norm(x, self.mean, self.var, weight, bias, False)

    assert count(Norm(), 2, 4).storage.parameters == (12 if given == "weight" else 8)


def test_a_divisor_of_pooling_is_a_number_in_the_code():
    pool = nn.AvgPool2d(2, divisor_override=5)
    assert count(pool, 1, 1, 4, 4).storage.bits == 32
    assert count(nn.AvgPool2d(2), 1, 1, 4, 4).storage.bits == 0


ENTANGLED = {
    "maximum": lambda x, w: functools.reduce(lambda y, _: torch.maximum(y, y.flip(1)), range(40), x) @ w,
    "where": lambda x, w: functools.reduce(lambda y, _: torch.where(y > 0, y, y.roll(1, 1)), range(40), x) @ w,
    "codes": lambda x, w: functools.reduce(
        lambda y, _: torch.maximum(y, y.flip(1)), range(40), torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7)
    ) @ w,
    "constants": lambda x, w: x @ functools.reduce(lambda y, _: torch.cat([y, y.flip(0)])[:4], range(40), w),
    "relu": lambda x, w: functools.reduce(lambda y, _: y.relu(), range(1500), x) @ w,
    "cat": lambda x, w: functools.reduce(lambda y, _: torch.cat([y, x], 1), range(1200), x)[:, :4] @ w,
    "pad": lambda x, w: x @ functools.reduce(lambda y, _: F.pad(y, (0, 0, 0, 1))[:4], range(300), w),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTANGLED)
def test_graphs_that_part_and_meet_again_and_long_ones_are_no_trouble(name):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, 3) + 0.5)

        def forward(self, x):
            return ENTANGLED[name](x, self.w)

    assert count(Graph(), 2, 4).math.macs == 2 * 4 * 3


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (lambda: torch.arange(5.0), 0),
        (lambda: torch.arange(5.0).repeat(1, 1), 0),
        (lambda: torch.stack([torch.arange(5.0)]), 0),
        (lambda: torch.arange(5.0)[None, None], 0),
        (lambda: torch.full((1, 5), 2.0), 0),
        (lambda: torch.ones(1, 5).triu(1), 32 + 5),  # one number and where it is
        (lambda: torch.eye(1, 5), 32 + 5),
        (lambda: torch.rand(1, 5), 5 * 32),
        (lambda: torch.rand(2, 1, 5), 10 * 32),
        (lambda: torch.full((1,), torch.nan), 32),
    ],
)
def test_a_counter_costs_nothing_whatever_its_dimensions(make, bits):
    recorded = trace(Call(lambda x: x + make()), torch.zeros(4, 5))
    assert account(recorded, FORMULAS, freebie=False).storage.bits == bits


@pytest.mark.parametrize(
    ("values", "counter"),
    [
        (torch.arange(6).view(2, 3), (0, 5, 1)),
        (torch.arange(6).view(1, 2, 1, 3).mT, (0, 5, 1)),
        (torch.tensor([[4.0, 2.0], [2.0, 0.0]]), (0, 4, 2)),
        (torch.tensor([[0, 1], [5, 6]]), None),  # 0, 1, 5, 6
        (torch.tensor(3.5), (3.5, 3.5, 0)),
        (torch.full((3,), -torch.inf), (-torch.inf, -torch.inf, 0)),
        (torch.zeros(0, 3), (0, 0, 0)),
        (torch.tensor([True, False]), (0, 1, 1)),
        (torch.tensor([1.0, 2.0, torch.nan]), None),
        (torch.tensor(torch.nan), None),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), (1, 2, 1)),
        (torch.tensor([2**60, 2**60 + 1]), (2.0**60, 2.0**60, 0)),
        (torch.tensor([1 + 0j, 2 + 0j]), None),
        (torch.arange(100).repeat(2, 1), (0, 99, 1)),
        (torch.cat([torch.arange(100), torch.zeros(1)]), None),
    ],
)
def test_counters(values, counter):
    assert constant(values).counter == counter


@pytest.mark.parametrize(
    ("product", "dense_ops"),
    [
        (lambda w, x: torch.addmm(w, w, x), 2 * 6**3),
        (lambda w, x: torch.baddbmm(w[None], x[None], w[None]), 2 * 6**3),
    ],
)
def test_a_weight_that_is_added_and_multiplied_is_a_factor(product, dense_ops):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6, 6) + 1)
            with torch.no_grad():
                self.weight[:, ::2] = 0

        def forward(self, x):
            return product(self.weight, x)

    counted = count(Twice(), 6, 6)
    assert counted.layers[0].weight_bits == 32
    (module,) = by_module(counted, FORMULAS)
    assert module.dense_ops == dense_ops > module.sparse_ops


def test_a_causal_mask_costs_one_bit_an_element():
    storage = count(Call(causal), 4, 4).storage
    assert (storage.mask_bits, storage.value_bits) == (16, 32)


@pytest.mark.parametrize(
    ("make", "value_bits", "mask_bits"),
    [
        (lambda places: places == 2, 32, 4),
        (lambda places: places >= 0, 32, 0),
        (lambda places: places < 0, 0, 0),
    ],
    ids=["one", "all", "none"],
)
def test_a_pattern_stores_its_one_value_and_where_it_is(make, value_bits, mask_bits):
    storage = count(Call(lambda x: x + make(torch.arange(4)).float() * -1e9), 1, 4).storage
    assert (storage.value_bits, storage.mask_bits) == (value_bits, mask_bits)


def test_bits_that_are_read_as_halves_are_stored_as_halves():
    weight, narrow = torch.full((1, 4), 0.5), FixedPointQuantizer(4, -2)
    # Four float32 of 4 bits each, read as eight float16, of which every other one is zero.
    counted = count(Call(lambda x: x * narrow(weight).view(torch.float16).float()), 1, 8)
    assert counted.storage.bits == 4 * 16 + 8
    assert counted.layers[0].weight_bits == 16  # no longer on the grid of 4 bits


def test_activations_that_are_read_as_another_dtype_are_as_wide_as_that():
    narrow = FixedPointQuantizer(4, -2)
    product = count(Call(lambda x: narrow(x).view(torch.int32) * 3), 1, 8).layers[0]
    assert product.input_bits == 32


def test_weights_that_are_read_as_another_dtype_are_as_wide_as_that():
    weight, narrow = torch.full((1, 4), 0.5), FixedPointQuantizer(4, -2)
    counted = count(Call(lambda x: x * narrow(weight).view(torch.int32)), 1, 4)
    assert (counted.layers[0].weight_bits, counted.storage.bits) == (32, 4 * 32)


def test_a_block_that_saves_a_single_bit_is_taken():
    linear = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(linear.weight)
    assert count(linear, 1, 1).storage.bits == 1  # one block of zeros; two elements would take 2


def test_a_returned_constant_is_stored():
    module = Made(None)
    module.forward = lambda x: module.weight
    assert count(module, 1, 4).storage.parameters == 8


def test_drawn_numbers_are_the_same_every_time():
    module = Made(lambda m: torch.randint(-1, 2, (4, 2)).float())
    state = torch.random.get_rng_state()
    assert count(module, 1, 4) == count(module, 1, 4)
    assert torch.equal(state, torch.random.get_rng_state())


def integers(dtype):
    module = nn.Module()
    module.register_buffer("weight", torch.ones(4, 4).to(dtype))
    module.forward = lambda x: x @ module.weight.float()
    return module


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.int8, 8), (torch.uint8, 8), (torch.float8_e4m3fn, 8), (torch.float16, 16)]
)
def test_a_weight_that_is_converted_exactly_keeps_its_bits(dtype, bits):
    counted = count(nn.Sequential(FixedPointQuantizer(4), integers(dtype)), 1, 4)
    (layer,) = counted.layers
    assert (layer.input_bits, layer.weight_bits) == (4, bits)
    assert counted.storage.value_bits == 16 * bits


def test_a_weight_that_is_rounded_counts_as_rounded():
    linear = nonzero(nn.Linear(4, 4, bias=False))
    counted = count(nn.Sequential(FixedPointQuantizer(4), Call(lambda x: x @ linear.weight.half().float())), 1, 4)
    assert (counted.layers[0].weight_bits, counted.storage.value_bits) == (16, 16 * 16)


def test_scales_that_the_code_makes_are_stored():
    module = integers(torch.int8)
    module.weight = torch.arange(1, 17, dtype=torch.int8).view(4, 4)
    module.forward = lambda x: x @ (module.weight.float() * (torch.arange(4.0) * 0.1 + 0.3))
    storage = count(module, 1, 4).storage
    assert (storage.value_bits, storage.overhead_bits, storage.code_bits) == (16 * 8, 4 * 32, 4 * 32)


def test_integers_count_their_bits():
    (product,) = count(Call(lambda x: x.to(torch.int8) * x.to(torch.int8)), 1, 4).layers
    assert product.input_bits == 8


def test_masks_and_tables_do_not_deny_the_freebie():
    mask, table = torch.tensor([True, False, True, False]), torch.tensor([1, 0, 3, 2])
    module = Call(lambda x: x.masked_fill(mask, 0.0)[:, table] * x)
    assert account(trace(module, torch.zeros(1, 4)), FORMULAS).freebie
    assert not account(trace(integers(torch.int8), torch.zeros(1, 4)), FORMULAS).freebie


@pytest.mark.rule("storage.freebie")
@pytest.mark.parametrize(
    "forward",
    [
        lambda x, w: torch.where(w, x.unsqueeze(2), -x.unsqueeze(2)).sum(1),
        lambda x, w: torch.where(w, x.unsqueeze(2).expand(1, 4, 3), 0.0).mean(1),
        lambda x, w: (x.unsqueeze(2) * w).sum(1),
    ],
    ids=["where", "expand", "mul"],
)
def test_weights_of_one_bit_deny_the_freebie_whatever_multiplies_them(forward):
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    counted = account(trace(Call(lambda x: forward(x * 3.5, weight)), torch.zeros(1, 4)), FORMULAS)
    assert not counted.freebie


def test_a_mask_in_front_of_a_sum_does_not_deny_the_freebie():
    gate = torch.tensor([True, False, True, False])
    module = Call(lambda x: (x * 3.5 * gate.view(1, 4, 1)).mean(2))
    assert account(trace(module, torch.zeros(1, 4, 5)), FORMULAS).freebie


@pytest.mark.rule("storage.freebie")
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.int64, 64), (torch.int32, 32), (torch.float64, 16), (torch.float32, 16)]
)
def test_the_freebie_is_of_floats(dtype, bits):
    held = torch.arange(1, 11).to(dtype)
    counted = account(trace(Call(lambda x: (x.to(dtype) * held).float()), torch.zeros(1, 10)), FORMULAS)
    assert (counted.freebie, counted.storage.bits) == (True, 10 * bits)


MASK = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("use", "freebie"),
    [
        (lambda x, w: (x * MASK) @ w, True),
        (lambda x, w: (x * MASK.float()) @ w, True),
        (lambda x, w: (x * MASK[None, :].expand(2, 4).float() / 0.5) @ w, True),
        (lambda x, w: torch.where((x > 0) & MASK, x, 0.0) @ w, True),
        (lambda x, w: x.masked_fill(MASK, 0.0) @ w, True),
        (lambda x, w: x @ w @ MASK.float(), False),  # weights of 1 bit
        (lambda x, w: (x * MASK) @ w @ MASK.float(), False),
        (lambda x, w: x @ w * (2 * MASK.float() - 1), False),
        (lambda x, w: x @ w * torch.where(MASK, 1.0, -1.0), False),
    ],
)
def test_a_mask_that_multiplies_element_by_element_does_not_deny_the_freebie(use, freebie):
    weight = nonzero(nn.Linear(4, 4)).weight
    counted = account(trace(Call(lambda x: use(x, weight)), torch.zeros(2, 4)), FORMULAS)
    assert counted.freebie == freebie
    if freebie:
        assert counted.storage.bits == 16 * 16 + 4


def test_clamping_costs_as_many_comparisons_as_it_has_bounds():
    assert count(Call(lambda x: x.clamp(min=0)), 1, 4).math.mults == 4
    assert count(Call(lambda x: x.clamp(max=1)), 1, 4).math.mults == 4
    assert count(Call(lambda x: x.clamp(0, 1)), 1, 4).math.mults == 8


def test_a_module_that_runs_twice_has_one_name():
    class Block(nn.Module):
        def forward(self, x):
            return x * 2

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    assert [op.module for op in trace(traced(Twice()), torch.ones(1, 2)).ops] == ["block", "block"]


def test_a_module_that_is_there_twice_keeps_its_weights():
    linear = nn.Linear(4, 4)
    before = linear.weight.clone()
    assert count(nn.Sequential(linear, nn.Sequential(linear)), 1, 4).storage.parameters == 20
    assert torch.equal(linear.weight, before)


def test_a_model_that_keeps_tensors_is_left_as_it_was():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask, self.log, self.calls = None, [], 0
            self.linear = nonzero(nn.Linear(4, 4))

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.ones(4).cumsum(0)
            self.calls += 1
            self.log.append(x)
            return self.linear(x) * self.mask

    module = Keeps()
    first = count(module, 1, 4)
    assert (module.mask, module.log, module.calls) == (None, [], 0)
    assert count(module, 1, 4) == first


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda x: torch.stack([torch.full((), value) for value in (0.3, 0.7, 0.9, 1.1)]), 4),
        (lambda x: torch.full((4,), 0.37), 1),
        (lambda x: torch.randn(4) * torch.randn(4), 4),
        (lambda x: 1.0 - torch.ones(4), 0),
    ],
)
def test_constants_made_of_fills_are_stored(make, values):
    assert count(Call(lambda x: x * make(x)), 1, 4).storage.bits == values * 32


PLACES = [[(3 * column + row) % 16 for column in range(8)] for row in range(16)]


def stacked(pieces):
    """128 pieces of one number each, [16, 8]: which goes where is written nowhere but in the code."""
    return torch.stack([torch.stack([pieces[place].reshape(()) for place in row]) for row in PLACES])


@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (lambda m: stacked(torch.arange(16)).float(), 120 * 32 + 128),  # each of 16 numbers comes 8 times: 8 zeros
        (lambda m: stacked([torch.full((), 1.0 if i % 3 else -1.0) for i in range(16)]), 128 * 32),
        (lambda m: torch.block_diag(torch.ones(8, 4), torch.full((8, 4), 2.0)), 64 * 32 + 8),  # 8 blocks of 4x4
        (lambda m: stacked(m.table), 128 * 32),
        (lambda m: stacked([m.one if i % 3 else m.other for i in range(16)]), 128 * 32),
        (lambda m: torch.stack([m.table[[5, 3][i % 2] :][:8] for i in range(16)]), 128 * 32),
        (lambda m: torch.slice_scatter(torch.ones(16, 8), torch.full((3, 8), 4.0), 0, 5, 8), 128 * 32),
        # What says nothing, or what tensors that are whole and each there once say.
        (lambda m: torch.stack([m.table[:8]] * 16), 8 * 32),
        (lambda m: torch.cat([m.table, m.wide]).view(16, 8), 128 * 32),
        (lambda m: torch.arange(8).flip(0).float().expand(16, 8), 0),
        (lambda m: torch.arange(8.0).expand(16, 8), 0),
        (lambda m: torch.zeros(1, 1).expand(16, 8), 0),
        (lambda m: torch.stack([torch.arange(8.0)] * 16), 0),
        # The place in a counter is a number of the code.
        (lambda m: torch.arange(64.0)[37].expand(16, 8), 32),
        (lambda m: torch.arange(64.0)[::37][:2].repeat_interleave(64).view(16, 8), 32 + 2),  # 37 beside a zero
    ],
)  # fmt: skip
def test_what_the_code_puts_together_of_pieces_is_stored(make, bits):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.wide = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.rand(112) + 0.5)
            self.one, self.other = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return x @ make(self)

    assert count(Product(), 1, 16).storage.bits == bits


def test_two_draws_are_two_weights():
    assert count(Call(lambda x: x * torch.randn(4) + x * torch.randn(4)), 1, 4).storage.bits == 8 * 32


def test_a_permuted_weight_stores_weight_and_table():
    weight, tables = nonzero(nn.Linear(8, 8)).weight, [torch.randperm(8) for _ in range(3)]
    storage = count(Call(lambda x: x @ weight[tables[0]] @ weight[tables[1]] @ weight[tables[2]]), 1, 8).storage
    assert storage.bits >= 64 * 32 + 3 * 8 * 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_an_activation_that_is_quantized_by_its_dtype_denies_the_freebie(dtype):
    linear = nonzero(nn.Linear(4, 4))
    module = Call(lambda x: linear(x.to(dtype).float()))
    assert not account(trace(module, torch.zeros(1, 4)), FORMULAS).freebie


def test_a_long_chain_of_constants_is_no_trouble():
    weight = nonzero(nn.Linear(4, 4, bias=False)).weight

    def chained(x):
        made = weight
        for _ in range(40):
            made = made + made
        return x @ made

    assert count(Call(chained), 1, 4).storage.parameters == 16


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.LazyLinear(3), torch.zeros(1, 4), "lazy parameters"),
        (nn.Linear(4, 4), [0.0], "no tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_traced_is_an_input_error(model, example, message):
    with pytest.raises(InputError, match=message):
        trace(model, example)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.eye(4).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), "quantized by torch"),
    ],
)
def test_tensors_that_are_not_dense_are_input_errors(make, told):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", make())

        def forward(self, x):
            return x @ self.held.to_dense()

    with pytest.raises(InputError, match=f"tensor 'held' is .*{told}.* make it dense"):
        trace(Holds(), torch.zeros(1, 4))


def test_an_input_that_is_not_dense_is_an_input_error():
    with pytest.raises(InputError, match="the example input is sparse or nested"):
        trace(nn.Linear(4, 4), torch.eye(4).to_sparse())


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("around", [lambda layer: layer, nn.Sequential])
def test_a_torchscript_module_is_an_input_error(around):
    with pytest.raises(InputError, match="TorchScript"):
        trace(around(torch.jit.script(nn.Linear(4, 4))), torch.zeros(1, 4))
