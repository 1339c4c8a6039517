"""Bit-widths of values, what they make operations cost, and the bits that tensors are stored in."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval.costs import FORMULAS
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.scoring import account
from micronet_eval.structure import Mask
from micronet_eval.trace import trace


def module(forward, **members):
    """A module with this forward(self, x), parameters, buffers and submodules."""
    made = nn.Module()
    for name, member in members.items():
        if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
            made.register_buffer(name, member)
        else:
            setattr(made, name, member)
    made.forward = MethodType(forward, made)
    return made


def linear(inputs, outputs, bits=None, bias=False):
    """A linear layer without zeros, its weight quantized to `bits`."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    if bits is not None:
        parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(bits))
    return layer


def counted(model, x=None, freebie=False):
    return account(trace(model, torch.ones(1, 4) if x is None else x), FORMULAS, freebie=freebie)


def output_width(model, x=None):
    """The bits of the model's output, as an operation behind it sees them."""
    return counted(nn.Sequential(model, nn.Sigmoid()), x).layers[-1].input_bits


# --- widths -----------------------------------------------------------------------------------------------------------


KEEP = {
    "view": lambda x: x.view(4, 4),
    "transpose": lambda x: x.transpose(2, 3).contiguous(),
    "slice": lambda x: x[:, :, 1:],
    "pad": lambda x: F.pad(x, (1, 1)),
    "upsample": lambda x: F.interpolate(x, scale_factor=2),
    "relu": F.relu,
    "relu in place": F.relu_,
    "max pool": lambda x: F.max_pool2d(x, 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "all of them": lambda x: F.max_pool2d(torch.cat([x.relu(), x], 1), 2).flatten(1),
}


@pytest.mark.parametrize("name", KEEP)
def test_moving_and_selecting_keeps_the_width(name):
    model = module(lambda self, x: KEEP[name](self.quantizer(x)), quantizer=FixedPointQuantizer(6))
    assert output_width(model, torch.ones(1, 1, 4, 4)) == 6


WIDEN = {
    "add": lambda x: x + x,
    "multiply": lambda x: x * x,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "matrix product": lambda x: x @ x,
    "layer norm": lambda x: F.layer_norm(x, (4,)),
}


@pytest.mark.parametrize("name", WIDEN)
def test_arithmetic_widens_to_32_bits(name):
    model = module(lambda self, x: WIDEN[name](self.quantizer(x)), quantizer=FixedPointQuantizer(6))
    assert output_width(model, torch.ones(1, 1, 4, 4)) == 32


def test_an_input_has_32_bits_and_a_quantizer_narrows_it():
    assert output_width(nn.Flatten()) == 32
    assert output_width(nn.Sequential(FixedPointQuantizer(8), FixedPointQuantizer(5))) == 5


def test_concatenation_is_as_wide_as_its_widest_part():
    def forward(self, x):
        return torch.cat([self.narrow(x), self.wide(x)], 1)

    assert output_width(module(forward, narrow=FixedPointQuantizer(5), wide=FixedPointQuantizer(9))) == 9
    assert output_width(module(forward, narrow=FixedPointQuantizer(5), wide=nn.Identity())) == 32


def test_a_value_written_into_another_is_not_narrower_than_what_was_there():
    def forward(self, x):
        y = x * 1
        y[:, :2] = self.quantizer(x)[:, :2]
        return y

    assert output_width(module(forward, quantizer=FixedPointQuantizer(5))) == 32


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)])
def test_a_conversion_narrows_but_never_widens(dtype, bits):
    assert output_width(module(lambda self, x: x.to(dtype))) == bits
    assert output_width(module(lambda self, x: self.q(x).to(dtype), q=FixedPointQuantizer(6))) == 6


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation_bits", "weight_bits", "expected"), [(3, 5, 5), (5, 3, 5), (8, 8, 8), (12, 9, 12), (24, 2, 24)]
)
def test_a_multiplication_counts_its_widest_input(activation_bits, weight_bits, expected):
    model = nn.Sequential(FixedPointQuantizer(activation_bits), linear(4, 2, weight_bits))
    result = counted(model)
    (layer,) = result.layers
    assert (layer.input_bits, layer.weight_bits) == (activation_bits, weight_bits)
    assert result.math.mult_ops32 == 8 * expected / 32
    assert result.math.add_ops32 == 6  # a dot product accumulates at 32 bit


def test_quantized_weights_alone_do_not_make_multiplications_cheaper():
    assert counted(linear(4, 2, 8)).math.mult_ops32 == 8


def test_quantized_activations_alone_do_not_make_multiplications_cheaper():
    assert counted(nn.Sequential(FixedPointQuantizer(8), linear(4, 2))).math.mult_ops32 == 8


def test_the_width_of_a_bias_does_not_matter():
    model = nn.Sequential(FixedPointQuantizer(8), linear(4, 2, 6, bias=True))
    assert counted(model).math.mult_ops32 == 8 * 8 / 32
    assert counted(model).layers[0].weight_bits == 6


def test_the_width_of_a_convolutions_bias_does_not_matter():
    layer = nn.Conv2d(1, 1, 1)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(6, -6))
    result = counted(nn.Sequential(FixedPointQuantizer(8), layer), torch.ones(1, 1, 2, 2))
    assert result.math.mult_ops32 == 4 * 8 / 32


def test_a_weight_keeps_its_width_on_its_way():
    def forward(self, x):
        return self.quantizer(x) @ self.layer.weight.t().contiguous().view(4, 2)

    model = module(forward, quantizer=FixedPointQuantizer(7), layer=linear(4, 2, 5))
    assert counted(model).layers[0].weight_bits == 5


def test_a_weight_that_is_computed_with_after_quantization_is_wide():
    def forward(self, x):
        return F.linear(self.quantizer(x), self.layer.weight * 0.3)

    model = module(forward, quantizer=FixedPointQuantizer(7), layer=linear(4, 2, 5))
    assert counted(model).layers[0].weight_bits == 32


def test_an_integer_weight_that_is_converted_keeps_its_width():
    """Conversions to and from what a 32-bit float represents exactly are free."""
    weight = torch.ones(2, 4, dtype=torch.int8)
    model = module(lambda self, x: F.linear(self.q(x), self.w.float()), w=weight, q=FixedPointQuantizer(6))
    assert counted(model).layers[0].weight_bits == 8


def test_element_wise_operations_count_at_the_width_of_their_inputs():
    quantizers = {"a": FixedPointQuantizer(8), "b": FixedPointQuantizer(5)}
    assert counted(module(lambda self, x: self.a(x) + self.b(x), **quantizers)).math.ops32 == 4 * 8 / 32
    assert counted(module(lambda self, x: self.a(x) * self.b(x), **quantizers)).math.ops32 == 4 * 8 / 32
    assert counted(module(lambda self, x: self.b(x).relu(), **quantizers)).math.ops32 == 4 * 5 / 32
    assert counted(module(lambda self, x: self.a(x) + x, **quantizers)).math.ops32 == 4


def test_the_sum_in_an_average_counts_at_32_bits():
    model = nn.Sequential(FixedPointQuantizer(8), nn.AvgPool2d(2))
    # 1 multiplication at 8 bits, 3 additions at 32.
    assert counted(model, torch.ones(1, 1, 2, 2)).math.ops32 == 8 / 32 + 3


def test_a_scale_counts_at_its_own_width_unless_it_is_a_power_of_two():
    quantizer = FixedPointQuantizer(8)
    assert counted(module(lambda self, x: self.q(x) * 0.3, q=quantizer)).math.ops32 == 4
    assert counted(module(lambda self, x: self.q(x) * 0.25, q=quantizer)).math.ops32 == 4 * 8 / 32


def test_a_number_that_is_added_counts_at_its_own_width():
    assert counted(module(lambda self, x: self.q(x) + 0.3, q=FixedPointQuantizer(8))).math.ops32 == 4


def test_an_operation_never_counts_more_than_one():
    assert counted(linear(4, 2).double(), torch.ones(1, 4, dtype=torch.float64)).math.ops32 == 8 + 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_modules(dtype):
    result = counted(nn.Sequential(linear(4, 2, bias=True), nn.ReLU()).to(dtype), torch.ones(1, 4, dtype=dtype))
    assert result.math.mult_ops32 == (8 + 2) * 16 / 32
    assert result.math.add_ops32 == 8  # accumulated at 32 bit
    assert result.storage.bits == 10 * 16


# --- the freebie ------------------------------------------------------------------------------------------------------


def test_the_freebie_counts_parameters_and_multiplications_as_16_bit_and_additions_as_32():
    result = counted(module(lambda self, x: self.layer(x) + x, layer=linear(4, 4, bias=True)), freebie=True)
    assert result.freebie
    assert result.storage.bits == 20 * 16
    assert result.math.mult_ops32 == 16 / 2
    assert result.math.add_ops32 == 16 + 4


def test_the_freebie_applies_where_quantization_is_no_narrower_than_16_bits():
    result = counted(nn.Sequential(FixedPointQuantizer(16), linear(4, 2, 18)), freebie=True)
    assert result.freebie
    assert result.storage.value_bits == 8 * 16
    assert result.math.mult_ops32 == 8 / 2


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(linear(4, 4), linear(4, 4, 15)),
        nn.Sequential(linear(4, 4), FixedPointQuantizer(15), linear(4, 4)),
        nn.Sequential(FixedPointQuantizer(8), linear(4, 4, 8), linear(4, 4)),
    ],
    ids=["weight", "activation", "both"],
)
def test_one_narrow_part_takes_the_freebie_from_all_parts(model):
    result = counted(model, freebie=True)
    assert not result.freebie
    assert result == counted(model, freebie=False)


def test_the_freebie_can_be_declined():
    result = counted(linear(4, 2), freebie=False)
    assert not result.freebie
    assert result.storage.bits == 8 * 32
    assert result.math.mult_ops32 == 8


def test_the_freebie_is_reckoned_with_where_dense_and_sparse_are_compared():
    layer = linear(8, 8)
    layer.weight.data.view(-1)[:3] = 0
    # 61 of 64: at 16 bits 61 * 16 + 64 is more than 64 * 16; at 32 bits 61 * 32 + 64 is less than 64 * 32.
    assert counted(layer, torch.ones(1, 8), freebie=True).storage.bits == 64 * 16
    assert counted(layer, torch.ones(1, 8), freebie=False).storage.bits == 61 * 32 + 64


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "nonzeros", "value_bits", "mask_bits"),
    [
        (None, 64, 64 * 32, 0),
        (None, 62, 64 * 32, 0),  # 62 * 32 + 64 is just as much
        (None, 61, 61 * 32, 64),
        (None, 0, 0, 64),
        (4, 48, 64 * 4, 0),  # 48 * 4 + 64 is just as much
        (4, 47, 47 * 4, 64),
    ],
)
def test_dense_or_a_bitmask_whichever_is_smaller(bits, nonzeros, value_bits, mask_bits):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = (torch.arange(64) < nonzeros).float().view(8, 8)
    if bits is not None:
        parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(bits))
    storage = counted(layer, torch.ones(1, 8)).storage
    assert (storage.value_bits, storage.mask_bits) == (value_bits, mask_bits)
    assert storage.overhead_bits == (0 if bits is None else 8)
    assert storage.bits == value_bits + mask_bits + storage.overhead_bits
    assert storage.params32 == storage.bits / 32
    assert (storage.parameters, storage.nonzeros) == (64, nonzeros)


def test_negative_zero_is_zero():
    layer = linear(8, 8)
    layer.weight.data[1:] = -0.0
    storage = counted(layer, torch.ones(1, 8)).storage
    assert (storage.nonzeros, storage.value_bits, storage.mask_bits) == (8, 8 * 32, 64)


def test_an_exponent_is_8_bits_for_each_quantized_weight_and_each_activation_quantizer():
    model = nn.Sequential(FixedPointQuantizer(8), linear(4, 4, 6), FixedPointQuantizer(8), linear(4, 4, 6))
    storage = counted(model).storage
    assert storage.overhead_bits == 4 * 8
    assert storage.value_bits == 32 * 6
    assert storage.parameters == 32  # exponents are none


def test_an_activation_quantizer_that_is_used_twice_has_one_exponent():
    quantizer = FixedPointQuantizer(8)
    assert counted(nn.Sequential(quantizer, nn.ReLU(), quantizer)).storage.overhead_bits == 8


def test_a_masked_weight_stores_its_values_and_no_second_mask():
    layer = linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Mask(torch.arange(64).view(8, 8) < 16))
    storage = counted(layer, torch.ones(1, 8)).storage
    assert (storage.value_bits, storage.mask_bits, storage.overhead_bits) == (16 * 32, 64, 0)


def test_a_tied_parameter_is_stored_once():
    embedding, layer = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    layer.weight = embedding.weight
    assert counted(nn.Sequential(embedding, layer), torch.zeros(1, 5, dtype=torch.int64)).storage.bits == 40 * 32


def test_a_parameter_that_is_also_used_transposed_is_stored_once():
    model = module(lambda self, x: x @ self.w @ self.w.t(), w=nn.Parameter(torch.ones(4, 2)))
    assert counted(model).storage.bits == 8 * 32


@pytest.mark.parametrize("kind", ["plain", "masked", "quantized"])
def test_a_layer_that_is_used_twice_is_stored_once(kind):
    layer = linear(8, 8, 6 if kind == "quantized" else None)
    if kind == "masked":
        parametrize.register_parametrization(layer, "weight", Mask(torch.arange(64).view(8, 8) < 16))
    once, twice = (counted(model, torch.ones(1, 8)) for model in (layer, nn.Sequential(layer, nn.ReLU(), layer)))
    assert twice.storage == once.storage


def test_a_tensor_that_is_no_parameter_is_stored_once():
    model = module(lambda self, x: x * self.table * self.table)
    model.table = torch.ones(4)
    assert counted(model).storage.bits == 4 * 32


def test_batch_norm_stores_two_values_a_channel():
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.ones_(tensor)
    assert counted(norm, torch.ones(1, 4, 2, 2)).storage.bits == 2 * 4 * 32


def test_batch_norm_without_weight_and_bias_stores_two_values_a_channel():
    norm = nn.BatchNorm2d(4, affine=False)
    for tensor in (norm.running_mean, norm.running_var):
        nn.init.ones_(tensor)
    assert counted(norm, torch.ones(1, 4, 2, 2)).storage.bits == 2 * 4 * 32


def test_a_parameter_that_is_not_used_is_not_stored():
    assert counted(module(lambda self, x: self.used(x), used=linear(4, 4), unused=linear(4, 4))).storage.bits == 16 * 32


def test_what_is_computed_from_smaller_parameters_is_stored_as_them():
    # A product of 8 x 1 and 1 x 8: 16 values instead of 64.
    column, row = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(1, 8))
    model = module(lambda self, x: F.linear(x, self.a @ self.b), a=column, b=row)
    assert counted(model, torch.ones(1, 8)).storage.bits == 16 * 32


def test_zeros_to_pad_with_are_not_stored():
    assert counted(module(lambda self, x: torch.cat([x, torch.zeros(1, 4)], 1))).storage.bits == 0


def test_a_weight_that_is_put_together_by_writing_is_stored():
    def forward(self, x):
        weight = torch.zeros(4, 4)
        weight[:2] = self.upper
        weight[2:] = self.lower
        return F.linear(x, weight)

    model = module(forward, upper=nn.Parameter(torch.ones(2, 4)), lower=nn.Parameter(torch.ones(2, 4)))
    assert counted(model).storage.bits == 16 * 32


def test_layers_say_what_they_are_the_first_to_store():
    layer = linear(4, 4)
    result = counted(nn.Sequential(layer, nn.ReLU(), layer))
    assert [entry.storage_bits for entry in result.layers] == [16 * 32, 0, 0]
