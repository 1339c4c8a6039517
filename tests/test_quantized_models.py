"""Models that torch, PT2E and torchao quantize, against numbers worked out by hand from the rules."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from micronet_eval.costs import FORMULAS
from micronet_eval.evaluation import score
from micronet_eval.precision import bit_widths
from micronet_eval.scoring import account
from micronet_eval.trace import trace


def nonzero(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return model


def count(model, *shape):
    return account(trace(model, torch.zeros(shape)), FORMULAS)


class FakeQuantized(nn.Module):
    """4-bit weights with a scale a channel, 8-bit activations; 4 -> 3 without bias."""

    def __init__(self, activation_scale, zero_point=0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 4), 0.3))
        self.register_buffer("scale", torch.tensor([0.1, 0.15, 0.3]))
        self.register_buffer("zero", torch.zeros(3, dtype=torch.int32))
        self.of_activation = activation_scale, zero_point

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, *self.of_activation, -128, 127)
        return F.linear(x, torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -7, 7))


@pytest.mark.rule("width.scales")
def test_fake_quantized_weights_and_activations():
    counted = count(FakeQuantized(0.125), 2, 4)
    product, scale = counted.layers
    assert (product.input_bits, product.weight_bits, product.mults) == (8, 4, 2 * 12)
    assert (scale.op, scale.mults) == ("micronet.scale", 2 * 3)  # one an output, at 32 bits
    assert counted.math.mult_ops32 == 24 * 8 / 32 + 6
    # 12 codes of 4 bits and 3 scales; the activation's scale is a power of two, an exponent of 8 bits
    assert (counted.storage.value_bits, counted.storage.overhead_bits) == (12 * 4, 3 * 32 + 8)


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("of_weights", "of_input", "of_output", "bits"),
    [
        (0.75, 0.5, 0.5, [16]),
        (0.75, 0.5, 1.5, [32, 32]),  # 0.75 / 1.5: of an activation 32 bits are stored; and back, as it is returned
        (0.75, 1.5, 0.5, [32, 32]),  # to codes; 0.75 * 1.5
        (0.5, 0.5, 0.75, [32]),  # to codes and back: there is no factor behind the product that could take it in
        (0.1, 0.5, 0.5, [32]),
        (1e30, 0.5, 0.5, [32]),
        (float(torch.tensor(1e30).bfloat16()), 0.5, 0.5, [16]),
        (0.5, 0.5, 0.5, []),
    ],
)
def test_a_product_of_scales_is_as_wide_as_all_of_them(of_weights, of_input, of_output, bits):
    """Powers of two are shifts; a scale that a float of 16 bits holds is as wide as that."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[7.0, 1.0], [3.0, -7.0]]) * of_weights)
            self.register_buffer("scale", torch.full((2,), of_weights))
            self.register_buffer("zero", torch.zeros(2, dtype=torch.int32))

        def forward(self, x):
            x = torch.fake_quantize_per_tensor_affine(x, of_input, 0, 0, 15)
            x = F.linear(x, torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -7, 7))
            return torch.fake_quantize_per_tensor_affine(x, of_output, 0, -8, 7)

    layers = count(Layer(), 1, 2).layers
    assert [layer.weight_bits for layer in layers if layer.op == "micronet.scale"] == bits


class Called(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def scalings(function, example):
    """The multiplications by scales in a function that is called with zeros like `example`."""
    layers = account(trace(Called(function), example), FORMULAS).layers
    return sum(layer.mults for layer in layers if layer.op == "micronet.scale")


def rounded(x, *steps):
    for step in steps:
        x = torch.fake_quantize_per_tensor_affine(x, step, 0, -8, 7)
    return x


def product(x, step):
    return rounded(x, step) @ torch.ones(2, 2)


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("read", "factors"),
    [
        (lambda y: product(y, 0.25), 1),
        (lambda y: product(y, 0.37), 1 + 1),  # 0.3 / 0.37, and 0.37 behind the second product
        (lambda y: (product(y, 0.37), product(y.relu(), 0.37)), 1 + 2),
        (lambda y: (product(y, 0.37), product(y, 0.11)), 2 + 2),
        (lambda y: (product(y, 0.37), product(y, 0.25)), 2 + 1),  # 0.3 / 0.37, and 0.3, which is shifted
        (lambda y: (product(y, 0.37), y.sigmoid()), 2 + 1),
        (lambda y: (product(y, 0.37), y.relu()), 2 + 1),
        (lambda y: (product(y, 0.25), y.relu()), 1),
    ],
)
def test_each_factor_of_what_a_dot_product_gives_is_a_multiplication(read, factors):
    """4-bit codes times a 4-bit weight of scale 0.3, 2 -> 2, and what reads that."""
    weight = torch.tensor([[7.0, 1.0], [3.0, -7.0]]) * 0.3
    found = scalings(lambda x: read(rounded(x, 0.5) @ rounded(weight, 0.3)), torch.zeros(1, 2))
    assert found == 2 * factors


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("steps", "mults"),
    [((0.25,), 0), ((0.3,), 2 + 2), ((0.3, 0.3), 2 + 2), ((0.3, 0.25), 2 + 2), ((0.3, 0.37), 2 + 2 + 2)],
)
def test_from_one_scale_to_another_is_a_multiplication(steps, mults):
    """Of two inputs each; and one for each of two outputs where the last step is no power of two."""
    assert scalings(lambda x: rounded(x, *steps) @ torch.ones(2, 2), torch.zeros(1, 2)) == mults


@pytest.mark.rule("width.scales")
def test_a_scale_that_was_multiplied_in_is_not_counted_again():
    """2 values on the grid of 0.1, to codes and to values that are returned; a shift makes other codes of those."""

    def read(x):
        y = rounded(x, 0.1)
        return rounded(y, 0.25) @ torch.ones(2, 2), y

    assert scalings(read, torch.zeros(1, 2)) == 2 + 2


def overwritten(y, x, start):
    y[:, start:] = x[:, start:]
    return y


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("read", "mults"),
    [
        (lambda x: overwritten(x * x, rounded(x, 0.1), 1), 2 + 2),  # to codes and back, as they are returned
        (lambda x: product(overwritten(x * x, rounded(x, 0.1), 1), 0.1), 2 + 2 + 2 + 2),  # and to codes; behind
        (lambda x: product(overwritten(x * x, product(x, 0.1), 1), 0.1), 2 + 2 + 2 + 2),  # to codes and behind, twice
    ],
)
def test_scales_of_values_that_are_written_into_others_are_multiplied_in(read, mults):
    """Of two values each: what is read afterwards is not codes and a scale."""
    assert scalings(read, torch.zeros(1, 2)) == mults


def test_scales_that_are_found_while_running_are_multiplied_apart():
    """A weight's float16 scale at 16 bits, that of each token at 32; one multiplication each for 4 tokens x 2."""
    scale, zero = torch.full((2,), 0.1).half().float(), torch.zeros(2, dtype=torch.int32)

    def tokens(x):
        ops = torch.ops.quantized_decomposed
        limits = (-128, 127, torch.int8)
        scales = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = ops.quantize_per_token(x, *scales, *limits)
        x = ops.dequantize_per_token(codes, *scales, *limits, torch.float32)
        weight = torch.fake_quantize_per_channel_affine(torch.ones(2, 3), scale, zero, 0, -7, 7)
        return x @ weight.T

    layers = account(trace(Called(tokens), torch.zeros(4, 3)), FORMULAS).layers
    behind = [(layer.mults, layer.weight_bits) for layer in layers if layer.op == "micronet.scale"][-2:]
    assert behind == [(4 * 2, 16), (4 * 2, 32)]


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("scale", "widths", "mults"),
    [(0.25, (8, 8), 0), (0.3, (8, 32), 6), ([0.25] * 5, (8, 8), 0), ([0.1, 0.2, 0.3, 0.4, 0.5], (32, 32), 0)],
)
def test_what_is_looked_up_in_a_table_of_codes_has_its_scale(scale, widths, mults):
    """Three words of a table of 5 x 4: the product with a float32 4 -> 2 waits for the table's scale, a sum does not.

    Words of several scales are multiplied by them when the model is loaded, and are as wide as float32.
    """
    table, scales = torch.ones(5, 4), torch.tensor(scale).expand(5)

    def looked_up(words):
        if isinstance(scale, float):
            return F.embedding(words, torch.fake_quantize_per_tensor_affine(table, scale, 0, -127, 127))
        zeros = torch.zeros(5, dtype=torch.int32)
        return F.embedding(words, torch.fake_quantize_per_channel_affine(table, scales, zeros, 0, -127, 127))

    model = Called(lambda words: (looked_up(words) @ torch.ones(4, 2), looked_up(words) + looked_up(words)))
    layers = account(trace(model, torch.zeros(1, 3, dtype=torch.int64)), FORMULAS).layers
    read = {layer.op: layer.input_bits for layer in layers}
    assert (read["aten.mm"], read["aten.add"]) == widths
    assert sum(layer.mults for layer in layers if layer.op == "micronet.scale") == mults


@pytest.mark.rule("width.scales")
def test_a_scale_of_activations_and_its_zero_point():
    at_input, product, behind = count(FakeQuantized(0.1, 3), 2, 4).layers
    assert (at_input.op, at_input.mults) == ("micronet.scale", 2 * 4)  # x / scale
    assert product.input_bits == 8
    assert (behind.mults, behind.adds) == (2 * 3, 2 * 3)  # both scales at once; z * sum(w), for want of a bias


def test_a_zero_point_of_weights_is_stored_once_for_the_tensor():
    class Shifted(FakeQuantized):
        def forward(self, x):
            return F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight, 0.1, 3, -7, 7))

    storage = count(Shifted(0.1), 2, 4).storage
    assert (storage.value_bits, storage.overhead_bits) == (12 * 4, 32 + 4)  # codes; a scale and a code for zero


def test_zero_points_of_codes_take_the_bits_of_a_code():
    import torch.ao.quantization.fx._decomposed  # registers the operations

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.arange(-5, 7, dtype=torch.int8).view(3, 4))
            self.register_buffer("scale", torch.tensor([0.1, 0.15, 0.3]))
            self.register_buffer("zero", torch.tensor([1, 2, 3]))

        def forward(self, x):
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
            return F.linear(x, dequantize(self.codes, self.scale, self.zero, 0, -8, 7, torch.int8))

    # 3 scales, and 3 zero points that are int64 but lie in -8 to 7.
    assert count(Codes(), 2, 4).storage.overhead_bits == 3 * 32 + 3 * 4


def test_zero_points_beyond_the_codes_take_the_bits_of_their_numbers():
    import torch.ao.quantization.fx._decomposed  # registers the operations

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.ones(4, 3, dtype=torch.int8))
            self.register_buffer("zero", torch.arange(-(2**22), 2**22, 2**23 // 12, dtype=torch.int32)[:12].view(4, 3))

        def forward(self, x):
            return x @ ((self.codes.float() - self.zero.float()) * torch.tensor(2.0**-10))

    class Read(FakeQuantized):
        def forward(self, x):
            ops, limits = torch.ops.quantized_decomposed, (0.25, 1000, -8, 7, torch.int8)
            return F.linear(ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *limits), *limits), self.weight)

    product = count(Shifted(), 2, 4)
    assert product.layers[0].weight_bits == 24  # 1 - -2^22 is 2^22 + 1
    # Codes of 8 bits, a scale of 32, and zero points from -2^22 to less than 2^22, which are the weights.
    assert (product.storage.value_bits, product.storage.overhead_bits) == (12 * 8, 32 + 12 * 23)
    assert count(Read(0.25), 2, 4).storage.overhead_bits == 8 + 11  # an exponent, and a number from -8 to 1000


@pytest.mark.rule("width.conversions")
@pytest.mark.parametrize(("low", "high"), [(-(2**20), 2**20 - 1), (-8, 7), (0, 1)])
def test_codes_are_as_wide_as_what_made_them_says_not_what_reads_them(low, high):
    """A dequantize operation does not saturate: the range that it is given changes nothing."""
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops = torch.ops.quantized_decomposed

    class Read(FakeQuantized):
        def forward(self, x):
            codes = ops.quantize_per_tensor(x, 0.125, 0, -(2**20), 2**20 - 1, torch.int32).view(-1, 4)
            return F.linear(ops.dequantize_per_tensor(codes, 0.125, 0, low, high, torch.int32), self.weight)

    assert count(Read(0.125), 2, 4).layers[-1].input_bits == 21


def fixed(x, exponent, bits):
    return torch.ops.micronet.fixed_point(x, torch.tensor(exponent, dtype=torch.int8), bits)


@pytest.mark.rule("width.conversions")
@pytest.mark.parametrize(
    ("first", "second", "bits"),
    [
        ((0.3, 0, -8, 7), (0.07, 0, -128, 127), 8),  # -2.4 to 2.1 are codes -34 to 30
        ((0.3, 0, -8, 7), (0.9, 0, -128, 127), 4),  # -3 to 2
        ((0.3, 0, -8, 7), (0.15, 0, -128, 127), 4),  # twice the codes, one zero behind each
        ((0.5, 0, -8, 7), (0.03125, 0, -128, 127), 4),  # 16 times, -128 to 112
        ((0.5, 0, -8, 7), (0.015625, 0, -128, 127), 8),  # 32 times, which saturates at 127
        ((0.5, 0, -8, 7), (0.125, 0, 0, 255), 8),  # whose codes would begin at -32
        ((0.3, 2, -8, 7), (0.3, 2, -128, 127), 4),
        ((0.3, 2, -8, 7), (0.3, 100, -128, 127), 8),  # 90 to 105
        ((0.5, 0, -8, 7), (0.0, 0, -128, 127), 8),
    ],
)
def test_codes_on_another_grid_are_as_wide_as_before_where_they_are_shifted_or_smaller(first, second, bits):
    class Layer(FakeQuantized):
        def forward(self, x):
            x = torch.fake_quantize_per_tensor_affine(x, *first).relu().view(-1, 4)
            return F.linear(torch.fake_quantize_per_tensor_affine(x, *second), self.weight)

    assert next(layer for layer in count(Layer(0.1), 2, 4).layers if layer.op == "aten.mm").input_bits == bits


@pytest.mark.parametrize(
    ("read", "bits"),
    [
        (lambda x: fixed(fixed(x, -1, 4), -3, 8), 4),
        (lambda x: fixed(fixed(x, -3, 8), -1, 4), 4),
        (lambda x: torch.fake_quantize_per_tensor_affine(fixed(x, -1, 4), 0.07, 0, -128, 127), 8),
        (lambda x: fixed(fixed(x, -1, 4) * 0.75, -3, 8), 8),
    ],
)
def test_fixed_point_on_another_grid(read, bits):
    recorded = trace(Called(read), torch.zeros(2, 4))
    assert bit_widths(recorded)[recorded.outputs[0]] == bits


@pytest.mark.parametrize(("largest", "bits"), [(7, 4), (8, 8)])
def test_codes_that_leave_the_range_they_are_read_with_count_all_of_their_bits(largest, bits):
    import torch.ao.quantization.fx._decomposed  # registers the operations

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.arange(largest - 11, largest + 1, dtype=torch.int8).view(3, 4))

        def forward(self, x):
            dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor
            x = torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -8, 7)
            return F.linear(x, dequantize(self.codes, 0.125, 0, -8, 7, torch.int8))

    found = count(Codes(), 2, 4)
    assert found.layers[-1].weight_bits == bits
    assert found.storage.value_bits == 12 * bits


def test_codes_that_a_model_is_given_count_all_of_their_bits():
    import torch.ao.quantization.fx._decomposed  # registers the operations

    class Given(FakeQuantized):
        def forward(self, x):
            values = torch.ops.quantized_decomposed.dequantize_per_tensor(x, 0.125, 0, -8, 7, torch.int8)
            return F.linear(values, self.weight)

    found = account(trace(Given(0.125), torch.zeros(2, 4, dtype=torch.int8)), FORMULAS)
    assert found.layers[-1].input_bits == 8


def test_an_output_without_weights_is_not_scaled():
    model = FakeQuantized(0.125)
    with torch.no_grad():
        model.weight[1] = 0
    assert count(model, 2, 4).layers[1].mults == 2 * 2


def test_a_column_of_zeros_in_one_matrix_of_a_batch_is_not_scaled():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 4, 5), 0.3))

        def forward(self, x):
            return torch.bmm(x, torch.fake_quantize_per_tensor_affine(self.weight, 0.1, 0, -7, 7))

    model = Batch()
    with torch.no_grad():
        model.weight[0, :, 0] = 0
    assert count(model, 2, 3, 4).layers[1].mults == 3 * (5 + 4)


def test_a_zero_point_alone_is_an_addition_without_a_factor():
    model = FakeQuantized(0.125, 3)
    model.scale.copy_(torch.tensor([0.125, 0.25, 0.5]))
    behind = count(model, 2, 4).layers[1]
    assert (behind.mults, behind.adds, behind.weight_bits) == (0, 2 * 3, 0)


class Twice(FakeQuantized):
    """Activations are quantized with one scale, and again with another; the weights are not."""

    def __init__(self, second):
        super().__init__(0.1)
        self.second = second

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
        return F.linear(torch.fake_quantize_per_tensor_affine(x, self.second, 0, -128, 127), self.weight)


@pytest.mark.parametrize(("second", "scalings"), [(0.3, [8, 8, 6]), (0.1, [8, 6])])
def test_values_that_have_the_scale_already_are_not_scaled_again(second, scalings):
    layers = count(Twice(second), 2, 4).layers
    assert [layer.mults for layer in layers if layer.op == "micronet.scale"] == scalings


def test_scaled_weights_on_the_left_of_a_product_with_bias():
    class Left(FakeQuantized):
        def forward(self, x):
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -7, 7)
            return torch.addmm(torch.ones(3, 5), weight, x)

    assert count(Left(0.1), 4, 5).layers[-1].mults == 3 * 5  # one an output


def test_scales_of_tokens_that_are_found_while_running():
    import torch.ao.quantization.fx._decomposed  # registers the operations

    ops, limits = torch.ops.quantized_decomposed, (-128, 127, torch.int8)

    class Tokens(FakeQuantized):
        def __init__(self, product):
            super().__init__(0.1)
            self.product = product

        def forward(self, x):
            scales = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            codes = ops.quantize_per_token(x, *scales, *limits)
            x = ops.dequantize_per_token(codes, *scales, *limits, torch.float32)
            return self.product(x, self.weight)

    def scalings(product):
        return [
            (layer.mults, layer.adds) for layer in count(Tokens(product), 2, 4).layers if layer.op == "micronet.scale"
        ]

    # To codes one multiplication an element; zero points are subtracted from each. The scale of a token waits until
    # behind the product with a constant, one an output; where tokens are summed it is one an element.
    assert scalings(F.linear) == [(8, 0), (0, 8), (6, 0)]
    assert scalings(lambda x, _: x.t() @ x) == [(8, 0), (8, 8)]


def test_an_element_wise_product_of_scaled_values_is_wide():
    class Square(nn.Module):
        def forward(self, x):
            x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
            return x * x

    scale, product = count(Square(), 2, 4).layers
    assert (scale.mults, product.input_bits) == (2 * 8, 32)  # to codes, and back


def codes(x):
    return (x * 8).round().clamp(-128, 127).to(torch.int8).float()


WEIGHT = nn.Parameter(torch.full((5, 4, 3, 3), 0.25))


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    "values",
    [
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4, dtype=torch.int32), 1, -128, 127
        ),
        lambda x: codes(x) * x.mean((2, 3), keepdim=True),  # of a channel, as squeeze and excitation
        lambda x: codes(x) * x.mean((1, 3), keepdim=True),  # of a row
        lambda x: codes(x) * torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1),
    ],
)
def test_values_with_several_scales_along_the_sum_are_scaled_before_it_and_wide(values):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ops.micronet.fixed_point(WEIGHT, torch.tensor(-6, dtype=torch.int8), 8))

        def forward(self, x):
            weight = torch.ops.micronet.fixed_point(self.weight, torch.tensor(-6, dtype=torch.int8), 8)
            return F.conv2d(values(x), weight)

    layers = count(Layer(), 1, 4, 6, 6).layers
    product = next(layer for layer in layers if layer.op == "aten.convolution")
    assert product.input_bits == 32
    assert any(layer.mults >= 4 * 36 and layer.op in ("micronet.scale", "aten.mul") for layer in layers[-3:])


@pytest.mark.parametrize(("summed", "bits"), [("features", 8), ("tokens", 32)])
def test_the_scale_of_a_token_waits_where_its_features_are_summed(summed, bits):
    class Layer(FakeQuantized):
        def forward(self, x):
            x = codes(x) * x.abs().amax(1, keepdim=True)
            weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.125, 0, -7, 7)
            return F.linear(x, weight) if summed == "features" else weight @ x

    product = next(layer for layer in count(Layer(0.1), 4, 4).layers if layer.op == "aten.mm")
    assert product.input_bits == bits


def of_channels(x):
    return codes(x) * x.mean((2, 3), keepdim=True)


def of_tokens(x):
    return codes(x) * x.abs().amax(-1, keepdim=True)


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (lambda x: of_channels(x).permute(0, 2, 3, 1), 32),  # to channels last, as in ConvNeXt
        (lambda x: of_channels(x).transpose(1, 3), 32),
        (lambda x: of_channels(x).view(-1, 4), 8),
        (lambda x: of_channels(x).relu().flatten(0, 2).unsqueeze(0)[:, 1:], 8),
        (lambda x: of_channels(x).view(1, 8, 2, 4).transpose(1, 3).flatten(2).view(-1, 4), 32),
        (lambda x: of_channels(x).amax(1), 32),
        (lambda x: of_channels(x).amax(3), 32),
        (lambda x: F.max_pool2d(of_channels(x), 3, 1, 1), 32),
        (lambda x: F.pad(of_channels(x)[..., :2], (1, 1)), 32),
        (lambda x: of_tokens(x), 8),
        (lambda x: of_tokens(x).mT, 32),
        (lambda x: of_tokens(x.flatten(2)).mT, 32),
        (lambda x: of_tokens(x.flatten(2).mT), 8),
    ],
)
def test_scales_of_rows_wait_as_long_as_the_rows_stay_rows(values, bits):
    """8-bit codes and a 4-bit weight without a scale, 4 -> 3: other rows are multiplied first, one a code of 64."""

    class Layer(FakeQuantized):
        def forward(self, x):
            return F.linear(values(x), torch.fake_quantize_per_tensor_affine(self.weight, 0.125, 0, -7, 7))

    layers = count(Layer(0.1), 1, 4, 4, 4).layers
    assert next(layer for layer in layers if layer.op in ("aten.mm", "aten.bmm")).input_bits == bits
    gated = [layer.mults for layer in layers if layer.op == "aten.mul"]  # the first makes codes
    assert gated == ([4 * 16, 4 * 16] if bits == 32 else [4 * 16])
    moved = [layer for layer in layers if layer.op in ("aten.max_pool2d_with_indices", "aten.amax")]
    assert all(layer.input_bits == 32 for layer in moved)


@pytest.mark.rule("width.scales")
@pytest.mark.parametrize(
    ("zero", "bits"),
    [
        (lambda x: torch.tensor(3, dtype=torch.int64), 8),
        (lambda x: torch.tensor(-128.0), 8),
        (lambda x: x.amin(1, keepdim=True).to(torch.int8), 9),  # of each token, subtracted while running
        (lambda x: x.amin().to(torch.int8).float(), 9),
        (lambda x: torch.tensor(112.37), 32),
        (lambda x: torch.tensor(128), 32),
        (lambda x: x, 32),
        (lambda x: x.to(torch.int8), 32),
        (lambda x: x.amin(1, keepdim=True), 32),
        (lambda x: x.amin().to(torch.int32), 32),
        (lambda x: x.amin().to(torch.uint8), 32),
    ],
)
def test_codes_less_what_is_no_zero_point_of_theirs_are_wide(zero, bits):
    """(code - zero point) * scale: what is subtracted is a code itself, one for the tensor or for a token."""

    class Layer(FakeQuantized):
        def forward(self, x):
            weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.125, 0, -7, 7)
            return F.linear((codes(x) - zero(x)) * torch.tensor(0.37), weight)

    layers = count(Layer(0.1), 2, 4).layers
    product = next(layer for layer in layers if layer.op == "aten.mm")
    assert (product.input_bits, product.ops32) == (bits, 2 * 12 * bits / 32 + 2 * 9)
    assert sum(layer.mults for layer in layers if layer.op == "aten.mul") == 2 * 4 * (2 if bits == 32 else 1)


def test_a_zero_point_that_is_subtracted_several_times_is_none():
    class Layer(FakeQuantized):
        def forward(self, x):
            shifted = torch.sub(codes(x), x.amin().to(torch.int8), alpha=1000)
            return F.linear(shifted * torch.tensor(0.37), self.weight)

    assert count(Layer(0.1), 2, 4).layers[-1].input_bits == 32


@pytest.mark.rule("width.signs")
def test_codes_times_a_scale_have_no_sign_bit():
    class Layer(FakeQuantized):
        def forward(self, x):
            signs = (self.weight * torch.tensor([1.0, -1, 1, -1])).sign()
            return F.linear(codes(x) * torch.tensor(0.37), signs * torch.tensor([[0.1], [0.2], [0.3]]))

    product = next(layer for layer in count(Layer(0.1), 2, 4).layers if layer.op == "aten.mm")
    assert product.input_bits == 8


@pytest.mark.parametrize(
    "narrow",
    [
        lambda x: x.to(torch.int32).to(torch.int8).float(),
        lambda x: torch.zeros(2, 4, dtype=torch.int8).copy_(x).float(),
    ],
)
def test_narrowing_in_two_steps_denies_the_freebie(narrow):
    class Layer(FakeQuantized):
        def forward(self, x):
            return F.linear(narrow(x), self.weight)

    found = count(Layer(0.1), 2, 4)
    assert (found.freebie, found.layers[-1].input_bits) == (False, 8)


def test_a_mask_made_of_an_input_does_not_deny_the_freebie():
    class Masked(FakeQuantized):
        def forward(self, x):
            return F.linear(x.masked_fill(x.to(torch.int64).to(torch.bool), 0.0), self.weight)

    assert count(Masked(0.1), 2, 4).freebie


def written(into, x):
    into[:, : x.shape[1]] = x
    return into


@pytest.mark.parametrize(
    ("move", "bits"),
    [
        (lambda x: F.pad(x, (1, 1)), 4),
        (lambda x: F.pad(x, (1, 1), value=0.3712), 32),
        (lambda x: x.masked_fill(x > 0, 0.3712), 32),
        (lambda x: F.threshold(x, 0.1, 0.3712), 32),
        (lambda x: F.threshold(x, 0.1, 0.0), 4),
        (lambda x: torch.cat([x, torch.zeros(2, 4)], 1), 4),  # the shortcut of ResNet's option A
        (lambda x: torch.cat([x, torch.full((2, 4), 0.3712)], 1), 32),
        (lambda x: torch.where(torch.eye(2, 4).bool(), x, 0.0), 4),
        (lambda x: torch.where(torch.eye(2, 4).bool(), x, 0.3712), 32),
        (lambda x: torch.maximum(x, torch.zeros(4)), 4),
        (lambda x: written(torch.zeros(2, 6), x), 4),
        (lambda x: written(torch.full((2, 6), 0.3712), x), 32),
        (lambda x: x.max(1, keepdim=True).values, 4),
        (lambda x: x.max(1, keepdim=True).indices, 64),
        (lambda x: x.topk(2)[1], 64),
    ],
)
def test_moves_keep_the_width_but_of_places_and_of_numbers_that_they_write(move, bits):
    class Moved(nn.Module):
        def forward(self, x):
            return move(torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -8, 7))

    recorded = trace(Moved(), torch.zeros(2, 4))
    assert bit_widths(recorded)[recorded.outputs[0]] == bits


def test_a_table_of_integers_denies_the_freebie_and_its_index_does_not():
    class Rows(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("table", torch.arange(-60, 60).view(30, 4).to(dtype))
            self.register_buffer("order", torch.tensor([3, 1, 2]))

        def forward(self, x):
            return F.embedding(x[:, 0].long(), self.table).float() + F.pad(x[:, self.order], (0, 1))

    assert count(Rows(torch.float32), 2, 4).freebie
    assert not count(Rows(torch.int8), 2, 4).freebie


class Signs(nn.Module):
    def __init__(self, scale, narrow=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.7, -0.2, 0.1, -3.0], [-1.0, -2.0, 3.0, 0.0]]))
        self.register_buffer("scale", torch.as_tensor(scale))
        self.narrow = narrow

    def forward(self, x):
        if self.narrow:
            x = torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7)
        return F.linear(x, self.weight.sign() * self.scale)


@pytest.mark.parametrize(("scale", "scalings"), [([[0.5], [0.25]], 0), ([[0.3], [0.7]], 2)])
@pytest.mark.rule("width.signs")
def test_ternary_weights_count_a_32nd_of_what_has_a_sign_bit(scale, scalings):
    counted = count(Signs(scale), 1, 4)
    assert counted.math.mult_ops32 == 7 / 32 + scalings
    assert (counted.storage.value_bits, counted.storage.mask_bits) == (7, 8)  # a sign each, and a bitmask


@pytest.mark.rule("width.signs")
def test_fixed_point_has_no_sign_bit():
    assert count(Signs([[0.5], [0.25]], narrow=True), 1, 4).layers[0].ops32 == 7 * 4 / 32 + 5


@pytest.mark.rule("width.signs")
@pytest.mark.parametrize(
    ("activation", "bits"),
    [
        (lambda x: x[:, :3], 1),
        (lambda x: overwritten(torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7), x, 3), 32),
        (lambda x: overwritten(torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7), x, 2), 32),
        (lambda x: overwritten(x, torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -8, 7), 2), 32),
    ],
)
def test_what_is_written_in_part_has_no_sign_bit_of_its_own(activation, bits):
    """3 ternary weights behind one output: 1/32 each only where all of the activation has a sign bit."""
    product = count(Called(lambda x: activation(x) @ torch.tensor([[0.7], [-0.2], [0.1]]).sign()), 1, 3).layers[-1]
    assert (product.input_bits, product.ops32) == (bits, 3 * bits / 32 + 2)


@pytest.mark.rule("width.codebook", "storage.overhead")
def test_a_codebook_stores_indices_and_its_table():
    class Clustered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.tensor([-1.5, -0.25, 0.5, 1.0, 2.0]))
            self.register_buffer("indices", torch.arange(40).view(5, 8) % 5)

        def forward(self, x):
            return F.linear(x, self.table[self.indices])

    counted = count(Clustered(), 1, 8)
    # 40 indices of 3 bits, 32 of them not 0: with a mask 32 * 3 + 40 would be more; the table has 5 values
    assert counted.storage.bits == 40 * 3 + 5 * 32
    assert not counted.freebie
    assert counted.layers[0].weight_bits == 32


class LookedUp(nn.Module):
    """Values that a constant index takes from a table of 20, between two products with a weight of 16 x 16."""

    def __init__(self, use):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 16) + 0.5)
        self.table = nn.Parameter(torch.arange(1.0, 21.0) / 7)
        self.register_buffer("places", torch.arange(256).view(16, 16) * 7 % 20)
        self.use = use

    def forward(self, x):
        return self.use(self, x @ self.weight)


@pytest.mark.parametrize(
    ("use", "freebie"),
    [
        (lambda m, x: x + m.table[m.places], True),  # a bias of the relative position
        (lambda m, x: (x + m.table[m.places].t().unsqueeze(0)).softmax(-1) @ x, True),
        (lambda m, x: x - F.embedding(m.places, m.table[:, None]).permute(2, 0, 1), True),
        (lambda m, x: torch.addmm(m.table[m.places], x, m.weight), True),
        (lambda m, x: x @ m.table[m.places], False),  # weights by a codebook
        (lambda m, x: F.linear(x, m.table[m.places].t().contiguous()), False),
        (lambda m, x: x * m.table[m.places], False),
        (lambda m, x: (x + m.table[m.places]) @ m.table[m.places], False),
        (lambda m, x: x @ m.table[m.places] + m.table[m.places], False),
        (lambda m, x: torch.addmm(m.table[m.places], x, m.table[m.places]), False),
    ],
)
@pytest.mark.rule("storage.freebie")
def test_what_is_looked_up_by_an_index_is_quantized_where_it_is_a_factor(use, freebie):
    counted = count(LookedUp(use), 16, 16)
    assert counted.freebie == freebie
    assert counted.storage.bits == 256 * 5 + (256 + 20) * (16 if freebie else 32)  # places from 0 to 19 take 5 bits


def test_pruned_weights_are_stored_as_masked():
    model = nonzero(nn.Linear(64, 64, bias=False))
    prune.random_unstructured(model, "weight", 0.5)
    counted = account(trace(model, torch.zeros(1, 64)), FORMULAS, freebie=False)
    assert counted.math.mults == 2048
    assert counted.storage.bits == 2048 * 32 + 4096


@pytest.mark.rule("storage.block-mask")
def test_blocks_of_the_rules_example():
    model = nonzero(nn.Linear(128, 512, bias=False))
    with torch.no_grad():  # a chequered half of the 4x4 blocks
        rows, columns = torch.arange(512)[:, None] // 4, torch.arange(128) // 4
        model.weight[(rows + columns) % 2 == 0] = 0
    storage = account(trace(model, torch.zeros(1, 128)), FORMULAS, freebie=False).storage
    assert storage.mask_bits == 4096
    assert storage.bits == 512 * 128 // 2 * 32 + 4096


@pytest.mark.rule("width.declared")
def test_a_multiplication_that_stays_wide_is_told():
    told = score(nn.Sequential(FakeQuantized(0.125), nn.Linear(3, 2), nn.Linear(2, 2)), torch.zeros(1, 4)).warnings
    assert told == ("2 operations multiply at 32 bit although activations are quantized, the first is addmm in '1'",)
    assert score(FakeQuantized(0.125), torch.zeros(1, 4)).warnings == ()
    assert score(nn.Linear(4, 4), torch.zeros(1, 4)).warnings == ()


@pytest.mark.parametrize("field", ["data", "calibration"])
@pytest.mark.rule("score.test-data")
def test_calibration_on_the_test_set_is_refused(submission, run, field):
    manifest = submission / "submission.toml"
    text = re.sub(r'(?m)^(data|calibration) = "[^"]*"\n', "", manifest.read_text())
    manifest.write_text(text.replace("[provenance]", f'[provenance]\n{field} = "test"'))
    status, _, error = run(submission)
    assert status == 2
    assert f"provenance.{field}" in error
    assert "training data" in error


# --- PT2E and torchao -------------------------------------------------------------------------------------------------

torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)


def quantized(config):
    model = nonzero(nn.Sequential(nn.Linear(64, 32)))
    torchao.quantize_(model, config)
    return model


def test_torchao_int8_weights_and_dynamic_activations():
    weights = count(quantized(torchao.Int8WeightOnlyConfig(version=2)), 2, 64)
    assert (weights.layers[0].input_bits, weights.layers[0].weight_bits) == (32, 8)
    assert weights.storage.bits == 32 * 64 * 8 + 32 * 32 + 32 * 32  # codes, scales, biases


@pytest.mark.rule("storage.overhead")
def test_torchao_4_bit_weights_by_groups():
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    model = quantized(config)
    assert model[0].weight.dtype == torch.float32 and model[0].weight.qdata.dtype == torch.int8
    product, scale = count(model, 2, 64).layers
    assert (product.weight_bits, scale.mults) == (4, 2 * 32 * 2)  # two groups an output
    storage = count(model, 2, 64).storage
    assert storage.overhead_bits == 64 * 32  # scales; the zero points are 0
    assert storage.bits <= 2048 * 4 + 64 * 32 + 32 * 32


def test_torchao_4_bit_codes_without_a_scale():
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    layer = quantized(config)[0]
    layer.forward = lambda x: x @ layer.weight.qdata.float().t()
    codes = layer.weight.qdata
    assert codes.dtype == torch.int8 and bool((codes != 0).all())
    assert count(layer, 2, 64).storage.bits == 32 * 64 * 4


class Claimed(torch.Tensor):
    """A tensor subclass that holds integers and says of how many bits they are, as those of torchao do."""

    @staticmethod
    def __new__(cls, codes, target):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, target):
        self.codes, self.target = codes, target

    def __tensor_flatten__(self):
        return ["codes"], {"target_dtype": self.target}

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], context["target_dtype"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Claimed(args[0].codes, args[0].target)
        convert = torch.ops.aten._to_copy.default
        return func(*(convert(a.codes, dtype=a.dtype) if isinstance(a, Claimed) else a for a in args))


@pytest.mark.parametrize(
    ("low", "dtype", "target", "bits"),
    [
        (-6, torch.int8, torch.int4, 4),  # -6 to 5
        (-8, torch.int8, torch.int4, 4),
        (-9, torch.int8, torch.int4, 8),
        (-100, torch.int8, torch.int1, 8),
        (-3, torch.int8, torch.int4, 8),  # -3 to 8
        (-3, torch.int8, "torch.int0", 8),
        (-3, torch.int8, "torch.int99", 8),
        (4, torch.uint8, torch.uint4, 4),  # 4 to 15
        (5, torch.uint8, torch.uint4, 8),
    ],
)
def test_bits_that_a_tensor_says_it_has_count_if_its_values_fit_them(low, dtype, target, bits):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            codes = torch.arange(low, low + 12).to(dtype).view(4, 3)
            self.weight = nn.Parameter(Claimed(codes, target), requires_grad=False)

        def forward(self, x):
            return torch.mm(x, self.weight)

    found = account(trace(Layer(), torch.zeros(2, 4)), FORMULAS)
    assert found.layers[0].weight_bits == bits
    assert found.storage.bits == 12 * bits  # one zero does not pay for a mask


def test_torchao_float8_weights():
    product, scale, _ = count(quantized(torchao.Float8WeightOnlyConfig()), 2, 64).layers
    assert (product.weight_bits, scale.op, scale.mults) == (8, "micronet.scale", 64)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.rule("width.conversions")
def test_pt2e_static_quantization():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    model = nonzero(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))).eval()
    x = torch.linspace(-1, 2, 192).view(1, 3, 8, 8)
    config = quantizers.get_symmetric_quantization_config(is_per_channel=True)
    prepared = pt2e.prepare_pt2e(
        torch.export.export(model, (x,)).module(), quantizers.XNNPACKQuantizer().set_global(config)
    )
    prepared(x)
    counted = count(pt2e.convert_pt2e(prepared), *x.shape)
    at_input, convolution, rescale, relu, linear, last, back = counted.layers
    assert (at_input.mults, rescale.mults, last.mults, back.mults) == (192, 512, 4, 4)
    for layer in (convolution, linear):
        assert (layer.input_bits, layer.weight_bits) == (8, 8)
    assert (convolution.mults, linear.mults, relu.mults) == (64 * 8 * 27, 2048, 512)
    assert counted.storage.value_bits == (216 + 2048) * 8 + (8 + 4) * 32


@pytest.mark.rule("storage.overhead")
@pytest.mark.parametrize(("scale", "zero", "overhead"), [(0.3, 0, 32), (0.25, 0, 8), (0.3, 1, 32 + 8)])
def test_scales_of_weights_that_are_numbers_in_the_code_are_stored(scale, zero, overhead):
    """As PT2E exports them: codes of int8, and the numbers of their conversion; each number once."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor

    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.arange(2, 14, dtype=torch.int8).view(3, 4))
            self.register_buffer("others", torch.arange(3, 15, dtype=torch.int8).view(4, 3))

        def forward(self, x):
            first, second = (dequantize(w, scale, zero, -127, 127, torch.int8) for w in (self.codes, self.others))
            return x @ first.t() @ second.t()

    storage = count(Exported().eval(), 1, 4).storage
    assert (storage.value_bits, storage.overhead_bits) == (2 * 12 * 8, overhead)
