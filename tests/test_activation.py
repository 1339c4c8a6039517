"""The peak of the activations, worked out by hand. All shapes are for one example; a float32 value has 32 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from micronet_eval.activation import Activation, activation_peak
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.precision import bit_widths
from micronet_eval.trace import trace


class Call(nn.Module):
    """A module whose forward is one function, with layers that it may use."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def peak(module, *shape, dtype=torch.float32):
    recorded = trace(module, torch.zeros(shape, dtype=dtype))
    return activation_peak(recorded, bit_widths(recorded))


def test_a_chain_holds_what_one_operation_reads_and_writes():
    chain = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 20), nn.Linear(20, 5))
    assert peak(chain, 1, 10) == Activation((30 + 20) * 32, "1: aten.addmm")
    assert peak(chain.bfloat16(), 1, 10, dtype=torch.bfloat16) == Activation((30 + 20) * 16, "1: aten.addmm")
    assert peak(chain, 3, 10, dtype=torch.bfloat16).peak_bits == 3 * (30 + 20) * 16


@pytest.mark.rule("beside.activation")
def test_the_branch_around_a_block_stays_alive():
    # While `wide` runs 8 of the input, 8 of `first` and 24 of `wide` are alive; then 8 + 24 + 8.
    block = Call(lambda m, x: x + m.last(m.wide(m.first(x))),
                 first=nn.Linear(8, 8), wide=nn.Linear(8, 24), last=nn.Linear(24, 8))  # fmt: skip
    assert peak(block, 1, 8) == Activation((8 + 8 + 24) * 32, "wide: aten.addmm")
    # Without the branch the input is gone by then.
    assert peak(nn.Sequential(block.first, block.wide, block.last), 1, 8).peak_bits == (8 + 24) * 32


def test_the_order_of_execution_matters():
    layers = {"long": nn.Linear(16, 64), "short": nn.Linear(64, 2), "other": nn.Linear(16, 4)}

    # other last: input 16 + long 64, then input 16 + long 64 + short 2; then 16 + 2 + 4
    def early(m, x):
        a = m.short(m.long(x))
        return torch.cat([a, m.other(x)], 1)

    # other first: its 4 are alive, too, while long and short run
    def late(m, x):
        b = m.other(x)
        return torch.cat([m.short(m.long(x)), b], 1)

    assert peak(Call(early, **layers), 1, 16) == Activation((16 + 64 + 2) * 32, "short: aten.addmm")
    assert peak(Call(late, **layers), 1, 16) == Activation((16 + 4 + 64) * 32, "long: aten.addmm")


def test_a_concatenation_is_alive_beside_its_parts():
    assert peak(Call(lambda m, x: torch.cat([x, x, x], 1)), 1, 10) == Activation((10 + 30) * 32, "aten.cat")


@pytest.mark.parametrize(("inplace", "elements"), [(False, 20), (True, 10)])
def test_a_result_in_place_takes_no_room(inplace, elements):
    module = nn.Sequential(nn.ReLU(inplace), nn.ReLU(inplace))
    assert peak(module, 1, 10).peak_bits == elements * 32


def test_adding_in_place_writes_into_the_first_operand():
    assert peak(Call(lambda m, x: torch.tanh(x).add_(x)), 1, 10) == Activation((10 + 10) * 32, "aten.tanh")
    assert peak(Call(lambda m, x: torch.tanh(x) + x), 1, 10) == Activation((10 + 10 + 10) * 32, "aten.add")


@pytest.mark.parametrize(
    "view",
    [lambda x: x.view(2, 5), lambda x: x.reshape(5, 2).transpose(0, 1), lambda x: x.unsqueeze(0).detach(),
     lambda x: x.expand(100, 10)],
)  # fmt: skip
def test_a_view_takes_no_room(view):
    assert peak(Call(lambda m, x: view(x)), 1, 10).peak_bits == 10 * 32


def test_a_slice_keeps_the_whole_alive():
    # The 90 that are not sliced out lie in memory until the last of the slice is read.
    sliced = Call(lambda m, x: m.last(m.wide(x)[:, :10].tanh()), wide=nn.Linear(2, 100), last=nn.Linear(10, 40))
    assert peak(sliced, 1, 2) == Activation((100 + 10) * 32, "aten.tanh")
    two = Call(lambda m, x: sum(t.tanh() for t in x.split(5, 1)))
    # x 10, tanh of the first half 5, plus 0: 5 more; at the second tanh 10 + 5 + 5.
    assert peak(two, 1, 10).peak_bits == (10 + 5 + 5) * 32


def test_a_transpose_that_is_copied_takes_room():
    copied = Call(lambda m, x: x.transpose(1, 2).contiguous())
    assert peak(copied, 1, 4, 5) == Activation((20 + 20) * 32, "aten.clone")


@pytest.mark.rule("beside.activation")
def test_quantized_values_count_their_bits():
    # The linear layer's 30 results are written in 8 bits: the conversion is made on the way. The input stays at 32.
    module = nn.Sequential(nn.Linear(10, 30), FixedPointQuantizer(8), nn.Linear(30, 20), FixedPointQuantizer(4))
    assert peak(module, 1, 10) == Activation(10 * 32 + 30 * 8, "0: aten.addmm")
    input_too = nn.Sequential(FixedPointQuantizer(8), *module)
    assert peak(input_too, 1, 10) == Activation(10 * 8 + 30 * 8, "1: aten.addmm")
    # A ReLU between: the sums wait at 32 bits until it reads them, and go in its place in 8.
    relu = nn.Sequential(FixedPointQuantizer(8), nn.Linear(10, 30), nn.ReLU(), FixedPointQuantizer(8))
    assert peak(relu, 1, 10) == Activation(30 * 32 + 30 * 8, "2: aten.relu")
    relu[2].inplace = True
    assert peak(relu, 1, 10) == Activation(10 * 8 + 30 * 32, "1: aten.addmm")


def test_what_is_read_unquantized_too_is_held_twice():
    both = Call(lambda m, x: m.quantize(x.tanh()), quantize=FixedPointQuantizer(8))
    assert peak(both, 1, 10).peak_bits == 10 * 32 + 10 * 8

    def residual(m, x):
        y = x.tanh()
        return y + m.quantize(y).tanh()

    # tanh 32, quantized 8, the second tanh 32; then without the quantized, 32 + 32 and the sum 32.
    assert peak(Call(residual, quantize=FixedPointQuantizer(8)), 1, 10) == Activation(10 * 96, "aten.add")


def test_a_quantizer_sees_through_views():
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), FixedPointQuantizer(8))
    assert peak(module, 1, 1, 5, 5) == Activation(25 * 32 + 100 * 8, "0: aten.convolution")


def test_what_nobody_reads_is_not_held():
    # The 64-bit indices of the largest elements are written by the operation and used by nobody.
    assert peak(nn.MaxPool2d(2), 1, 1, 4, 4).peak_bits == (16 + 4) * 32
    indices = Call(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1])
    assert peak(indices, 1, 1, 4, 4).peak_bits == 16 * 32 + 4 * 64


def test_constants_are_no_activations():
    module = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 1))
    assert peak(module, 1, 10).peak_bits == (10 + 1000) * 32  # and not the 11,000 parameters


def test_a_buffer_that_is_filled_part_by_part_counts_whole():
    def filled(m, x):
        out = torch.zeros(1, 100)
        out[:, :10] = x
        return out

    assert peak(Call(filled), 1, 10).peak_bits == (10 + 100) * 32


def test_what_is_returned_lives_to_the_end():
    def two(m, x):
        return x.tanh(), m.wide(x).sum()

    # x 10, its tanh 10, wide 30
    assert peak(Call(two, wide=nn.Linear(10, 30)), 1, 10) == Activation((10 + 10 + 30) * 32, "wide: aten.addmm")
    assert peak(nn.Identity(), 1, 10) == Activation(320, "input")
