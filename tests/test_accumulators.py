"""Exact and 16-bit accumulators: widths worked out by hand, and tried out on integers."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import micronet_eval
from micronet_eval.accumulators import accumulator_bits, exact_widths, range_of, what_if
from micronet_eval.costs import FORMULAS
from micronet_eval.evaluation import costs
from micronet_eval.formats import Affine, AffineQuantizer, FixedPointQuantizer
from micronet_eval.scoring import account
from micronet_eval.structure import copied
from micronet_eval.trace import trace


def quantized(layer, bits, exponent=0, bias_exponent=None):
    """The layer with its weight, and its bias where an exponent is given, in fixed point."""
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(bits, exponent))
    if bias_exponent is not None:
        parametrize.register_parametrization(layer, "bias", FixedPointQuantizer(bits, bias_exponent))
    return layer


def counted(module, *shape):
    return account(trace(module.eval(), torch.zeros(shape)), FORMULAS)


def widths(module, *shape):
    """What is said of the one dot product of a module."""
    (product,) = [p for p in counted(module, *shape).operations if p.cost.macs]
    return exact_widths(product)


def linear(weights, bias=None):
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(0, 0, 1), (0, 1, 2), (-1, 0, 1), (-1, 1, 2), (-2, 1, 2), (-2, 2, 3), (-128, 127, 8), (-128, 128, 9),
     (-129, 127, 9), (0, 255, 9), (-(2**31), 2**31 - 1, 32), (0, 2**31, 33)],
)  # fmt: skip
def test_the_fewest_bits_of_a_range(low, high, bits):
    assert accumulator_bits(low, high) == bits


def test_the_bias_counts_and_may_need_bits_behind_the_point():
    assert accumulator_bits(-8, 7) == 4
    assert accumulator_bits(-8, 7, bias=1.0) == 5
    assert accumulator_bits(-8, 7, bias=4.0, exponent=2) == 5  # 4 is one step of 2**2
    assert accumulator_bits(-8, 7, bias=0.25) == 6  # in quarters: -32 ... 28 + 1
    assert accumulator_bits(-8, 7, bias=-0.25) == 7  # -33


def test_widths_of_many_sums_at_once_are_those_of_integers_of_any_size():
    generator = random.Random(0)
    sums = [
        (-generator.getrandbits(bits) - 1, generator.getrandbits(bits), generator.choice([0.0, m, -m]), exponent)
        for bits in range(1, 60)
        for exponent in (-20, -3, 0, 5)
        for m in (1.0, 0.1, 1e-20, generator.getrandbits(12) * 2.0**-9, 3e38)
    ]

    def by_integers(low, high, bias, exponent):
        added = Fraction(bias) / Fraction(2) ** exponent
        low, high = low + min(added, 0), high + max(added, 0)
        low, high = int(low * added.denominator), int(high * added.denominator)
        return 1 + max(high.bit_length(), (-low - 1).bit_length())

    low, high, bias, exponent = (np.array(column) for column in zip(*sums, strict=True))
    found = accumulator_bits(low.astype(float), high.astype(float), bias, exponent)
    assert found.tolist() == [min(53, by_integers(*each)) for each in sums]
    assert len({*found.tolist()}) > 20 and found.max() == 53


@pytest.mark.rule("beside.accumulators")
def test_each_channel_has_its_own_width():
    # Inputs of 4 bits are -8 ... 7. Channel 0: (1, 1, 1): -24 ... 21, 6 bits. Channel 1: (3, 0, 0): the same range, but
    # a single product, so nothing is added. Channel 2: (-1, 1, 0): -(7 + 8) ... 8 + 7, 5 bits. Channel 3 is dead.
    layer = quantized(linear([[1.0, 1, 1], [3, 0, 0], [-1, 1, 0], [0, 0, 0]]), 4)
    assert widths(nn.Sequential(FixedPointQuantizer(4), layer), 1, 3) == [(6, 2), (5, 1)]
    # With a bias of 1 each: -24 ... 22, -24 ... 22 with one addition, -15 ... 16 needs 6 bits.
    layer = quantized(linear([[1.0, 1, 1], [3, 0, 0], [-1, 1, 0], [0, 0, 0]], [1.0] * 4), 4, 0, 0)
    assert widths(nn.Sequential(FixedPointQuantizer(4), layer), 1, 3) == [(6, 3), (6, 1), (6, 2)]


def test_each_channel_may_have_its_own_step():
    """The channels above, each in its own power of two. A step of 0.3 is no integer's."""
    layer = linear([[0.5, 0.5, 0.5], [6, 0, 0], [-0.25, 0.25, 0], [0, 0, 0]])
    for last, found in ((1.0, [(6, 2), (5, 1)]), (0.3, [])):
        scales = torch.tensor([0.5, 2.0, 0.25, last])
        of_channels = copied(layer)
        parametrize.register_parametrization(of_channels, "weight", AffineQuantizer(Affine(-8, 7, (1, 3), scales)))
        assert widths(nn.Sequential(FixedPointQuantizer(4), of_channels), 1, 3) == found


def test_a_batch_of_constant_matrices():
    """Two matrices [3, 4] of ones, fixed point: 3 products of -8 ... 7 for each of the 8 outputs."""

    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer, self.weight = FixedPointQuantizer(4), nn.Parameter(torch.ones(2, 3, 4))

        def forward(self, x):
            return torch.bmm(self.quantizer(x), self.weight)

    model = Batch()
    parametrize.register_parametrization(model, "weight", FixedPointQuantizer(4))
    assert widths(model, 2, 1, 3) == [(6, 2)] * 8


@pytest.mark.parametrize("first", [1, 2])
def test_steps_move_with_the_channels(first):
    """Of 4 channels with steps of their own the first ones of one weight, and then those of another, or none."""

    class Parts(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.quantizer, self.a = FixedPointQuantizer(4), nn.Parameter(torch.ones(4, 3))
            self.b, self.bias = nn.Parameter(torch.full((4, 3), 1.75)), nn.Parameter(torch.zeros(first + other))
            for name, steps in (("a", [0.5, 0.5, 1.0, 1.0]), ("b", [0.25] * 4)):
                number_format = Affine(-8, 7, (1, 3), torch.tensor(steps))
                parametrize.register_parametrization(self, name, AffineQuantizer(number_format))

        def forward(self, x):
            both = torch.cat([self.a[:first], self.b[: len(self.bias) - first]])
            return nn.functional.linear(self.quantizer(x), both, self.bias)

    # In halves a 1 is 2: -48 ... 42 in 7 bits. In quarters 1.75 is 7: -168 ... 147 in 9.
    assert widths(Parts(0), 1, 3) == [(7, 3)] * first
    assert widths(Parts(2), 1, 3) == [(7, 3)] * first + [(9, 3)] * 2


def test_exponents_do_not_matter_but_to_the_bias():
    weights, bias = [[0.25, 0.25, 0.25]], [0.25]
    scaled = quantized(linear(weights, bias), 4, -2, -2)
    # A step of the sum is 2**-2 * 2**3 = 2: in steps -24 ... 21, the bias an eighth: times 8, -192 ... 169 in 9 bits.
    assert widths(nn.Sequential(FixedPointQuantizer(4, 3), scaled), 1, 3) == [(9, 3)]
    assert widths(nn.Sequential(FixedPointQuantizer(4, 3), quantized(linear(weights), 4, -2)), 1, 3) == [(6, 2)]


def test_a_convolution_after_relu_and_padding():
    conv = nn.Conv2d(2, 1, 2, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    model = nn.Sequential(FixedPointQuantizer(8), nn.ReLU(), quantized(conv, 2))
    # 8 terms of 0 ... 127: 0 ... 1016 in 11 bits; 7 additions at each of the 4 x 4 positions.
    assert widths(model, 1, 2, 3, 3) == [(11, 7 * 16)]


def test_inputs_of_two_formats_share_the_finer_step():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = FixedPointQuantizer(4, -1), FixedPointQuantizer(4, 1)

        def forward(self, x):
            return torch.cat([self.fine(x), self.coarse(x)], 1)

    recorded = trace(Cat(), torch.zeros(1, 2))
    steps = range_of(recorded.outputs[0])
    assert (steps.exponent, steps.low, steps.high) == (-1, -32, 28)  # -8 ... 7 steps of 2, in halves


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(quantized(linear([[1.0, 1.0]]), 4)),  # the input is no fixed point
        nn.Sequential(FixedPointQuantizer(4), linear([[1.0, 1.0]])),  # the weight is none
        nn.Sequential(FixedPointQuantizer(4), nn.Tanh(), quantized(linear([[1.0, 1.0]]), 4)),
        nn.Sequential(FixedPointQuantizer(4), nn.ConstantPad1d((0, 1), 0.3), quantized(linear([[1.0, 1.0, 1.0]]), 4)),
    ],
)
def test_where_it_does_not_apply(model):
    assert widths(model, 1, 2) == []
    figure = what_if(counted(model, 1, 2)).exact_accumulators
    assert (figure.additions, figure.ops32) == (0, counted(model, 1, 2).math.ops32)


def test_a_wider_sum_than_32_bits_counts_as_it_is():
    layer = quantized(linear([[2.0**15] * 4, [1.0] * 4]), 17)
    model = nn.Sequential(FixedPointQuantizer(17), layer)
    assert widths(model, 1, 4) == [(34, 3), (19, 3)]  # the least are 4 x 2**15 x -2**16 = -2**33, and -2**18
    figure = what_if(counted(model, 1, 4)).exact_accumulators
    assert (figure.additions, figure.accumulations) == (3, 6)


def test_the_figures():
    # 3 and 2 products at 4 bits are 5 * 4 / 32; 3 additions: two at 6 bits, one at 5.
    model = nn.Sequential(FixedPointQuantizer(4), quantized(linear([[1.0, 1, 1], [-1, 1, 0]]), 4))
    found = counted(model, 1, 3)
    assert found.math.ops32 == 5 * 4 / 32 + 3
    both = what_if(found, baseline_math=100.0, storage_share=0.5)
    assert both.exact_accumulators.ops32 == 5 * 4 / 32 + (2 * 6 + 5) / 32
    assert both.fp16_accumulators.ops32 == 5 * 4 / 32 + 3 * 16 / 32
    assert both.fp16_accumulators.score == 0.5 + both.fp16_accumulators.math
    assert both.fp16_accumulators.math == (5 * 4 / 32 + 1.5) / 100
    assert (both.exact_accumulators.additions, both.fp16_accumulators.additions) == (3, 3)


def test_the_figures_stand_beside_the_official_ones():
    report = costs("submissions/digits")
    exact, half = report.what_if.exact_accumulators, report.what_if.fp16_accumulators
    assert report.score.math == report.math.ops32 / 12_630_528
    assert exact.ops32 < report.math.ops32
    assert {c.name: c.measured for c in report.claims}["math"] == report.math.ops32
    # All accumulating additions, the 384 of the mean among them, count half; it has no weights, so no exact width.
    assert report.math.ops32 - half.ops32 == half.accumulations / 2
    assert half.accumulations - exact.additions == 384


def test_a_model_without_fixed_point_has_one_figure():
    report = micronet_eval.score(linear([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 2))
    assert report.what_if.exact_accumulators.additions == 0
    assert report.what_if.exact_accumulators.ops32 == report.math.ops32 == 4 / 2 + 2  # freebie
    assert report.what_if.fp16_accumulators.ops32 == 4 / 2 + 2 / 2


# --- by trial ---------------------------------------------------------------------------------------------------------


def fits(total, bits):
    return -(1 << (bits - 1)) <= total < 1 << (bits - 1)


def partial_sums(terms, bias):
    return itertools.accumulate(terms, initial=bias)


@pytest.mark.parametrize("seed", range(40))
def test_an_accumulator_of_that_width_never_overflows_and_a_narrower_one_does(seed):
    rng = random.Random(seed)
    input_bits, weight_bits, terms = rng.randint(2, 8), rng.randint(2, 8), rng.randint(2, 40)
    relu, has_bias = rng.random() < 0.5, rng.random() < 0.5
    least, most = -(1 << (weight_bits - 1)), (1 << (weight_bits - 1)) - 1
    weights = [rng.randint(least, most) if rng.random() < 0.7 else 0 for _ in range(terms)]
    weights[:2] = [most, least]
    bias = rng.randint(least, most) if has_bias else 0
    layer = linear([list(map(float, weights))], [float(bias)] if has_bias else None)
    layer = quantized(layer, weight_bits, 0, 0 if has_bias else None)
    model = nn.Sequential(FixedPointQuantizer(input_bits), *[nn.ReLU()] * relu, layer)
    ((bits, additions),) = widths(model, 1, terms)
    assert additions == sum(w != 0 for w in weights) - (not has_bias)

    low, high = (0 if relu else -(1 << (input_bits - 1))), (1 << (input_bits - 1)) - 1
    smallest = [low if w > 0 else high for w in weights]
    largest = [high if w > 0 else low for w in weights]
    random_inputs = [[rng.randint(low, high) for _ in weights] for _ in range(50)]
    for inputs in (smallest, largest, *random_inputs):
        products = [x * w for x, w in zip(inputs, weights, strict=True)]
        rng.shuffle(products)
        assert all(fits(total, bits) for total in partial_sums(products, bias))
        assert all(fits(total, bits) for total in partial_sums(products, 0))
    extremes = [sum(x * w for x, w in zip(inputs, weights, strict=True)) for inputs in (smallest, largest)]
    sums = [*extremes, *(total + bias for total in extremes)]  # the bias may come last
    assert not all(fits(total, bits - 1) for total in sums)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.rule("beside.accumulators")
def test_a_convolution_in_wrapping_integers_gives_the_same_bit_for_bit(seed):
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-8, 8, conv.weight.shape, generator=generator).float() / 4)
    model = nn.Sequential(FixedPointQuantizer(5, -3), quantized(conv, 4, -2))
    found = widths(model, 1, 4, 5, 5)
    x = torch.randint(-16, 16, (20, 4, 5, 5), generator=generator)
    exact = model(x.float() / 8).double() * 2**5
    for channel, (bits, _) in enumerate(found):
        half = 1 << (bits - 1)
        wrapped = (exact[:, channel].long() + half) % (2 * half) - half
        assert torch.equal(wrapped.double(), exact[:, channel])
