"""Accumulators of few bits that really run: wrapping integers, what they count, who may have one, their file."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize

import micronet_eval
from micronet_eval import packing
from micronet_eval.accumulators import exact_widths, what_if
from micronet_eval.costs import FORMULAS, Cost, NoFormula
from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, Codebook, CodebookQuantizer, FixedPointQuantizer, accumulator
from micronet_eval.merge import without_batch_norm
from micronet_eval.report import render
from micronet_eval.scoring import account
from micronet_eval.storage import stored_tensors
from micronet_eval.structure import StructureError, accumulators_of, copied, set_accumulators, set_quantizers, traced
from micronet_eval.testing import NETS, context
from micronet_eval.trace import trace
from micronet_plugins.accumulators import Accumulators, widths_of
from micronet_plugins.affine import AffineStrategy
from micronet_plugins.lsq import LSQ


def network(weights=((1.0, 1, 1), (-1, 1, 0), (0, 3, 0)), bias=(0.5, 0.25, 0.0), shape=(1, 3)):
    """A linear layer of 4-bit weights behind 4-bit inputs (-8 ... 7), and an example."""
    layer = nn.Linear(len(weights[0]), len(weights), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(4))
    graph = traced(nn.Sequential(layer).eval())
    set_quantizers(graph, {"input_1": FixedPointQuantizer(4)})
    return graph, torch.zeros(shape)


def narrow(bits, *args, **options):
    graph, x = network(*args, **options)
    set_accumulators(graph, {"0": bits})
    return graph, x


def replaced(inputs):
    """A context whose training data are those inputs."""
    return dataclasses.replace(context(), training_data=[(inputs, None)], example_input=inputs)


def counted(model, x):
    return account(trace(model, x), FORMULAS)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.int8), (16, np.int16)])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_a_processor_sums_in_integers_of_that_size(bits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 64, (50, 40), generator=generator)
    weights = torch.randint(-16 * bits, 16 * bits, (6, 40), generator=generator)
    scales = torch.rand(6, generator=generator) + 0.01
    bias = torch.randn(6, generator=generator)
    step = torch.tensor([0.37])
    wide = (inputs * step) @ (weights * scales[:, None]).T + bias
    found = accumulator(wide, step, scales, bias, bits, -1)
    order = torch.randperm(40, generator=generator)
    terms = (inputs[:, None, order] * weights[None, :, order]).numpy().astype(dtype)
    with np.errstate(over="ignore"):
        sums = np.add.accumulate(terms, axis=2, dtype=dtype)[..., -1]
    expected = torch.from_numpy(sums.astype(np.float32)) * step * scales + bias
    assert torch.allclose(found, expected, atol=1e-2, rtol=1e-3)
    assert not torch.allclose(wide, expected, atol=1e-2, rtol=1e-3)  # it did wrap


def test_a_sum_that_fits_is_left_bit_for_bit():
    x = torch.randn(4, 5, 3, 3)
    assert torch.equal(accumulator(x, torch.tensor([0.1]), torch.rand(5) + 0.1, torch.randn(5), 20, -3), x)


def test_the_ends_of_the_range():
    sums = torch.tensor([[-9.0, -8, 7, 8, 24]])
    wrapped = accumulator(sums, torch.tensor(0, dtype=torch.int8), torch.tensor([1.0]), None, 4, -1)
    assert wrapped.tolist() == [[7, -8, 7, -8, -8]]


def test_exponents_are_steps_too():
    sums = torch.tensor([[8.0, 2.0]]) / 8
    wrapped = accumulator(sums, torch.tensor(-1, dtype=torch.int8), torch.tensor(-2, dtype=torch.int8), None, 4, -1)
    assert wrapped.tolist() == [[-1.0, 0.25]]


def test_the_bias_comes_behind():
    graph, _ = narrow(4, [[1.0, 1, 1]], [0.5])
    assert graph(torch.tensor([[7.0, 1, 0]])).tolist() == [[-7.5]]  # 8 wraps to -8
    assert graph(torch.tensor([[7.0, 7, -7]])).tolist() == [[7.5]]  # it overflows on the way, and comes back


def test_training_goes_through():
    graph, _ = narrow(4)
    graph.train()(torch.tensor([[7.0, 7, 7]])).sum().backward()
    gradient = graph.get_submodule("0").parametrizations.weight.original.grad
    assert torch.equal(gradient, torch.full((3, 3), 7.0))


# --- what it counts ---------------------------------------------------------------------------------------------------


@pytest.mark.rule("width.accumulator")
def test_additions_count_its_bits_and_those_of_the_bias_32():
    # 3 + 2 + 1 non-zero weights: 6 products at 4 bits, 2 + 1 + 0 additions of products, 3 of the bias.
    (wide, x), (model, _) = network(), narrow(6)
    before, after = counted(wide, x), counted(model, x)
    assert before.math.ops32 == 6 * 4 / 32 + 6
    assert after.math.ops32 == 6 * 4 / 32 + 3 * 6 / 32 + 3
    assert (after.math.adds, after.math.mults) == (before.math.adds, before.math.mults)
    assert after.storage == before.storage
    assert [layer.accumulator_bits for layer in after.layers if layer.macs] == [6]


@pytest.mark.rule("width.accumulator")
def test_without_a_bias_and_at_every_position():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    parametrize.register_parametrization(conv, "weight", AffineQuantizer(Affine(-8, 7, (1, 2, 3, 3), torch.rand(3))))
    graph = traced(nn.Sequential(nn.ReLU(), conv).eval())
    set_quantizers(graph, {"input_1": AffineQuantizer(Affine(0, 15, (), torch.tensor([0.3])))})
    x = torch.zeros(1, 2, 5, 5)
    before = counted(graph, x)
    set_accumulators(graph, {"1": 11})
    after = counted(graph, x)
    terms = (conv.weight != 0).flatten(1).sum(1)
    additions = int((terms - 1).clamp(min=0).sum()) * 25
    assert before.math.ops32 - after.math.ops32 == additions * 21 / 32
    assert after.storage == before.storage  # the scales are those of the weight and of the input


def test_the_figures_beside_it():
    (wide, x), (model, _) = network(), narrow(6)
    official, found = counted(wide, x).math.ops32, what_if(counted(model, x))
    assert found.wide_accumulators.ops32 == official
    assert (found.wide_accumulators.additions, found.wide_accumulators.accumulations) == (3, 6)
    assert found.fp16_accumulators.ops32 == 6 * 4 / 32 + 3 * 6 / 32 + 3 / 2
    assert found.exact_accumulators.additions == 0
    assert what_if(counted(wide, x)).wide_accumulators.additions == 0


def test_with_the_freebie_additions_count_32_bits():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 7).view(2, 3)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(16))
    graph = traced(nn.Sequential(layer).eval())
    set_quantizers(graph, {"input_1": FixedPointQuantizer(16)})
    set_accumulators(graph, {"0": 20})
    found = counted(graph, torch.zeros(1, 3))
    assert found.freebie and found.math.ops32 == 6 / 2 + 4


def test_in_a_sequence_of_vectors():
    (wide, x), (model, _) = network(shape=(1, 7, 3)), narrow(6, shape=(1, 7, 3))
    assert counted(wide, x).math.ops32 - counted(model, x).math.ops32 == 7 * 3 * 26 / 32


class Own(nn.Module):
    """Calls the operation itself, with what it likes."""

    def __init__(
        self, step=1.0, weight_step=1.0, bias=(0.5, 0.25, 0.0), dim=-1, bits=6,
        before=lambda x: x, between=lambda y: y, also=lambda y: 0,
    ):  # fmt: skip
        super().__init__()
        self.layer = network()[0].get_submodule("0")
        self.quantizer = FixedPointQuantizer(4)
        self.register_buffer("step", torch.tensor([step]))
        self.register_buffer("weight_step", torch.tensor([weight_step]))
        self.register_buffer("other", torch.tensor(bias))
        self.dim, self.bits, self.before, self.between, self.also = dim, bits, before, between, also

    def forward(self, x):
        y = self.layer(self.before(self.quantizer(x)))
        summed = accumulator(self.between(y), self.step, self.weight_step, self.other, self.bits, self.dim)
        return summed + self.also(y)


@pytest.mark.rule("width.accumulator")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 2.0}, "its step of the input is not that"),
        ({"weight_step": 0.5}, "its steps of the weight are not those"),
        ({"bias": (0.5, 0.25, 1.0)}, "its bias is not that"),
        ({"dim": 0}, "is no dot product with its outputs in that dimension"),
        ({"bits": 1}, "has 2 to 24 bits, not 1"),
        ({"bits": -1000}, "has 2 to 24 bits"),
        ({"between": torch.t}, "is no dot product with its outputs in that dimension"),
        ({"between": torch.tanh}, "is no dot product with its outputs in that dimension"),
        ({"before": lambda x: torch.cat([x[:, 1:], torch.full((1, 1), 0.3)], 1)}, "is no integer with a step"),
        ({"before": lambda x: nn.functional.pad(x[:, 1:], (0, 1), value=0.3)}, "is no integer with a step"),
        ({"before": lambda x: x.sigmoid()}, "is no integer with a step"),
        ({"before": lambda x: x - 0.5}, "is no integer with a step"),
        ({"before": lambda x: x.view(torch.float16).flip(-1).view(torch.float32)}, "is no integer with a step"),
    ],
)
def test_what_only_looks_like_one_is_told(options, message):
    honest, forged = Own().eval(), Own(**options).eval()
    x = torch.zeros(1, 3)
    assert [p.accumulator.bits for p in counted(honest, x).operations if p.cost.macs] == [6]
    with pytest.raises(NoFormula, match=message):
        counted(forged, x)


@pytest.mark.parametrize("also", [lambda y: y, lambda y: y.view(1, 3) * 0])
def test_where_the_wide_sum_is_read_it_is_summed_wide(also):
    model = Own(also=also).eval()
    assert [p.accumulator.bits for p in counted(model, torch.zeros(1, 3)).operations if p.cost.macs] == [32]


def test_tables_are_no_integers():
    x = torch.zeros(1, 3)
    table = Codebook(torch.tensor([0.0, 0.3, 1.7]))
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", CodebookQuantizer(table))
    own = Own(bias=layer.bias.tolist()).eval()
    own.layer = layer
    with pytest.raises(NoFormula, match="is no integer with a step"):
        counted(own, x)
    own = Own().eval()
    own.quantizer = CodebookQuantizer(table)
    with pytest.raises(NoFormula, match="is no integer with a step"):
        counted(own, x)


def test_weights_that_were_changed_behind_their_quantizer_are_no_integers():
    class Shifted(Own):
        def forward(self, x):
            padded = nn.functional.pad(self.layer.weight[:, :2], (0, 1), value=0.3)
            y = nn.functional.linear(self.quantizer(x), padded, self.layer.bias)
            return accumulator(y, self.step, self.weight_step, self.other, 6, -1)

    with pytest.raises(NoFormula, match="is no integer times its step"):
        counted(Shifted().eval(), torch.zeros(1, 3))


@pytest.mark.parametrize("outputs", [1, 4])
def test_an_output_that_sums_integers_of_several_steps_is_told(outputs):
    model = Own(bias=[0.0] * outputs).eval()
    model.layer = nn.Linear(8, outputs)
    model.layer.weight.data = torch.arange(8.0 * outputs).view(outputs, 8) % 7
    model.layer.bias.data.zero_()
    by_group = AffineQuantizer(Affine(-7, 7, (1, 4), torch.arange(2.0 * outputs) + 1))
    parametrize.register_parametrization(model.layer, "weight", by_group, unsafe=True)
    with pytest.raises(NoFormula, match="its steps of the weight are not those"):
        counted(model, torch.zeros(1, 8))


def test_codes_are_one_step_apart_whatever_their_scale():
    import torch.ao.quantization.fx._decomposed  # registers the operations

    class Coded(nn.Module):
        def __init__(self, step):
            super().__init__()
            self.register_buffer("step", torch.tensor([step]))
            self.register_buffer("weight_step", torch.ones(1))
            self.weight = nn.Parameter(torch.arange(12.0).view(4, 3))

        def forward(self, x):
            quantize = torch.ops.quantized_decomposed.quantize_per_tensor
            weight = quantize(self.weight, 1.0, 0, -128, 127, torch.int32)
            y = quantize(x, 1024.0, 0, -8, 7, torch.int32) @ weight
            return accumulator(y, self.step, self.weight_step, None, 2, -1)

    for step in (1024.0, 1.0):  # nor are they followed where the step is right
        with pytest.raises(NoFormula, match="is no integer with a step"):
            counted(Coded(step), torch.zeros(1, 4))


def test_a_step_of_fixed_point_is_a_power_of_two_also_where_its_exponent_is_no_integer():
    """2**int(0.9) is what runs."""

    class Fraction(Own):
        def forward(self, x):
            y = self.layer(torch.ops.micronet.fixed_point(x, torch.tensor(0.9), 4))
            return accumulator(y, self.step, self.weight_step, self.other, self.bits, -1)

    x = torch.zeros(1, 3)
    assert [p.accumulator.bits for p in counted(Fraction().eval(), x).operations if p.cost.macs] == [6]
    with pytest.raises(NoFormula, match="its step of the input is not that"):
        counted(Fraction(step=2**0.9).eval(), x)


def test_sums_that_float32_does_not_hold_are_told():
    layer = nn.Linear(1024, 2, bias=False)
    layer.weight.data = torch.full((2, 1024), 2.0**11 - 1)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(12))
    graph = traced(nn.Sequential(layer).eval())
    set_quantizers(graph, {"input_1": FixedPointQuantizer(12)})
    set_accumulators(graph, {"0": 16})
    with pytest.raises(NoFormula, match="sums may reach 2\\^24 steps"):
        counted(graph, torch.zeros(1, 1024))


@pytest.mark.parametrize(("dim", "shape"), [(1, (1, 3)), (0, (3,)), (2, (1, 1, 3))])
def test_the_dimension_of_the_outputs_may_be_counted_from_the_first(dim, shape):
    model, x = Own(dim=dim).eval(), torch.zeros(shape)
    assert [p.accumulator.bits for p in counted(model, x).operations if p.cost.macs] == [6]


class Left(nn.Module):
    """A weight [3, 2] from the left, in one matrix or a batch of them: outputs are rows."""

    def __init__(self, batch=False, bits=0):
        super().__init__()
        weight = torch.tensor([[1.0, 2.0], [0.0, 3.0], [-1.0, 1.0]])
        self.weight, self.bits = nn.Parameter(weight[None] if batch else weight), bits
        parametrize.register_parametrization(self, "weight", FixedPointQuantizer(4))
        self.quantizer = FixedPointQuantizer(4)

    def forward(self, x):
        y = self.weight @ self.quantizer(x)
        step = self.parametrizations.weight[0].exponent
        return accumulator(y, self.quantizer.exponent, step, None, self.bits, -2) if self.bits else y


@pytest.mark.parametrize("batch", [False, True])
def test_weights_from_the_left(batch):
    x = torch.zeros((1, 2, 5) if batch else (2, 5))
    (product,) = [p for p in counted(Left(batch).eval(), x).operations if p.cost.macs]
    # Of inputs -8 ... 7: 1 and 2 sum to -24 ... 21, -1 and 1 to -15 ... 15; each at 5 positions.
    assert exact_widths(product) == [(6, 5), (5, 5)]
    wide, narrow = counted(Left(batch).eval(), x), counted(Left(batch, bits=7).eval(), x)
    assert wide.math.ops32 - narrow.math.ops32 == 10 * 25 / 32


def test_steps_and_bias_are_stored_once():
    names = [s.name for s in stored_tensors(trace(Own().eval(), torch.zeros(1, 3)))]
    assert not {"step", "weight_step", "other"} & set(names)


def test_without_values_additions_count_32_bits():
    (wide, x), (model, _) = network(), narrow(6)
    assert counted(model.to("meta"), x).math.add_ops32 == counted(wide.to("meta"), x).math.add_ops32


def test_another_formula_keeps_32_bits():
    model, x = narrow(6)
    ours = FORMULAS["aten.addmm"]
    more = {**FORMULAS, "aten.addmm": lambda op: ours(op) + Cost(accumulations=1)}
    assert account(trace(model, x), more).math.add_ops32 == 7


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
        (nn.Conv3d(4, 6, 3, stride=2), (2, 4, 5, 5, 5)),
        (nn.Conv2d(4, 6, 3), (4, 6, 6)),
        (nn.Linear(4, 6), (4,)),
        (nn.Linear(4, 6), (2, 3, 5, 4)),
        (nn.Linear(4, 6, bias=False), (2, 4)),
    ],
)
def test_every_layer_and_every_shape(layer, shape):
    model = AffineStrategy(weight_bits=5, activation_bits=5, granularity="channel").apply(
        nn.Sequential(layer, nn.ReLU()), replaced(torch.randn(shape))
    )
    x, wide = torch.randn(shape), counted(model, torch.zeros(shape))
    before = model(x)
    set_accumulators(model, {"0": 20})
    assert torch.equal(model(x), before)
    found = counted(model, torch.zeros(shape))
    assert [p.accumulator.bits for p in found.operations if p.cost.macs] == [20]
    assert found.storage == wide.storage
    # In few bits each output wraps on its own: what it loses is a whole number of turns of its own step.
    layer, quantizer = model.get_submodule("0"), model.get_submodule("quantizers.input_1")
    step, dim = layer.parametrizations.weight[0].scale, -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
    wide = layer(quantizer(x))
    wrapped = accumulator(wide, quantizer.scale, step, layer.bias, 4, dim)
    turns = (wide - wrapped).movedim(dim, -1) / (16 * step * quantizer.scale)
    assert torch.allclose(turns, turns.round(), atol=1e-3)
    assert turns.abs().max() >= 1


def test_a_layer_that_is_used_twice_has_one_for_both_uses(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.layer(input=self.layer(x).relu())

    torch.manual_seed(0)
    architecture, example = Twice(), torch.randn(1, 2, 6, 6)
    model = Accumulators().apply(AffineStrategy(rest_bits=8).apply(architecture, replaced(example)), replaced(example))
    assert [p.accumulator.bits < 32 for p in counted(model, example).operations if p.cost.macs] == [True, True]
    file = tmp_path / "weights.safetensors"
    packing.write(packing.pack(model, architecture, example), file)
    again = packing.unpack(packing.read(file), Twice())
    assert torch.equal(again(example), model(example))


# --- who may have one -------------------------------------------------------------------------------------------------


def test_who_cannot_have_one():
    graph, _ = network()
    with pytest.raises(StructureError, match="no layer 'nobody' is there"):
        set_accumulators(graph, {"nobody": 8})
    with pytest.raises(StructureError, match="is no convolution or linear layer"):
        set_accumulators(traced(nn.Sequential(quantized_transposed()).eval()), {"0": 8})
    with pytest.raises(StructureError, match="weights of '0' are no integers"):
        set_accumulators(traced(nn.Sequential(nn.Linear(3, 3))), {"0": 8})
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", CodebookQuantizer(Codebook(torch.tensor([0.0, 1.0]))))
    with pytest.raises(StructureError, match="weights of '0' are no integers"):
        set_accumulators(traced(nn.Sequential(layer)), {"0": 8})
    alone, _ = network()
    with pytest.raises(StructureError, match="what '0' multiplies is not quantized"):
        set_accumulators(traced(nn.Sequential(alone.get_submodule("0"))), {"0": 8})
    with pytest.raises(StructureError, match="what '1' multiplies is not quantized"):
        set_accumulators(traced(nn.Sequential(nn.Sigmoid(), alone.get_submodule("0"))), {"1": 8})


def test_weights_of_several_steps_in_an_output_cannot_have_one():
    model = AffineStrategy(granularity="group", group_size=2).apply(NETS["linear"](), context())
    with pytest.raises(InputError, match="sum integers of several steps"):
        Accumulators().apply(model, context())


def quantized_transposed():
    layer = nn.ConvTranspose2d(2, 2, 2)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(4))
    return layer


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_the_fewest_bits_of_what_was_seen():
    rows = torch.tensor([[7.0, 7, 7], [-8, 0, 0], [1, 1, 1]])
    graph, x = network()
    seen = dataclasses.replace(context(), training_data=[(rows, None)], example_input=x)
    # Sums 21, -8, 3; 0, 8, 0; 21, 0, 3: -8 ... 21 in 6 bits.
    assert accumulators_of(Accumulators(headroom=0).apply(graph, seen)) == {"0": 6}
    assert accumulators_of(Accumulators(headroom=3).apply(graph, seen)) == {"0": 9}
    assert accumulators_of(graph) == {}  # left alone


def test_a_share_of_the_sums_need_not_fit():
    rows = torch.tensor([[7.0, 7, 7], [-8, 0, 0], [1, 1, 1]])
    graph, x = network()
    seen = dataclasses.replace(context(), training_data=[(rows, None)] * 2, example_input=x)
    # Of 18 sums 4 are 21, in 6 bits; 2 are 8, in 5; 2 are -8, in 4; 4 are 3, in 3.
    for overflow, bits in ((0.2, 6), (4 / 18, 5), (0.33, 5), (6 / 18, 4), (0.44, 4), (8 / 18, 3)):
        assert accumulators_of(Accumulators(headroom=0, overflow=overflow).apply(graph, seen)) == {"0": bits}
    assert accumulators_of(Accumulators(headroom=2, overflow=0.25).apply(graph, seen)) == {"0": 7}


def test_widths_are_those_of_twos_complement():
    """n bits hold -2^(n-1) ... 2^(n-1) - 1."""
    sums = torch.tensor([0, -1, 1, -2, 2, 3, -4, 4, 7, -8, 2**24 - 1, -(2**24), 2**24], dtype=torch.float64)
    found = widths_of(sums)
    assert {bits: int(n) for bits, n in enumerate(found) if n} == {1: 2, 2: 2, 3: 3, 4: 3, 25: 2, 26: 1}


def test_sums_that_fit_change_nothing():
    model = AffineStrategy(weight_bits=4, activation_bits=6).apply(NETS["plain"](), context())
    narrowed = Accumulators().apply(model, context())
    assert set(accumulators_of(narrowed)) == {"0", "3", "8"}
    for x in context().calibration(4):
        assert torch.equal(narrowed(x), model(x))


def test_behind_learned_steps_it_can_be_trained_and_copied():
    narrowed = Accumulators().apply(LSQ().apply(NETS["plain"](), context()), context())
    again = copied(narrowed)
    assert accumulators_of(again) == accumulators_of(narrowed)
    x = context().example_input
    assert torch.equal(again(x), narrowed(x))
    assert counted(again, x).math == counted(narrowed, x).math


def test_who_quantizes_weights_only_is_told():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="fixed-point"):
        Accumulators().apply(Weights(), context())


def test_who_is_refused():
    weights = LSQ(activation_bits=0).apply(NETS["plain"](), context())
    with pytest.raises(InputError, match="weights are quantized, but activations are not"):
        Accumulators().apply(weights, context())
    model = AffineStrategy().apply(NETS["plain"](), context())
    with pytest.raises(InputError, match="there is no training data"):
        Accumulators().apply(model, dataclasses.replace(context(), training_data=[]))
    nan = [(torch.full((1, *context().example_input.shape[1:]), torch.nan), None)]
    with pytest.raises(InputError, match="are not finite"):
        Accumulators().apply(model, dataclasses.replace(context(), training_data=nan))


def test_layers_that_cannot_have_one_stay_as_they_are(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
            self.third = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = nn.functional.interpolate(self.first(x), scale_factor=2)
            return self.third(self.second(x))

    torch.manual_seed(0)
    example = torch.randn(1, 2, 8, 8)
    model = AffineStrategy(rest_bits=8).apply(Mixed(), replaced(example))
    narrowed = Accumulators().apply(model, replaced(example))
    assert set(accumulators_of(narrowed)) == {"first", "third"}
    packing.pack(narrowed, Mixed(), example)


def test_a_second_time_it_chooses_anew():
    once = Accumulators(headroom=4).apply(NETS["plain"](), context())
    again = Accumulators(headroom=1).apply(once, context())
    assert {path: bits - 3 for path, bits in accumulators_of(once).items()} == accumulators_of(again)
    assert again.code.count("accumulator") == once.code.count("accumulator")


# --- the file ---------------------------------------------------------------------------------------------------------


def packed():
    model = AffineStrategy(weight_bits=4, activation_bits=6, rest_bits=8).apply(
        without_batch_norm(NETS["plain"]()), context()
    )
    return Accumulators(headroom=0).apply(model, context())


def test_they_survive_packing(tmp_path):
    model, x = packed(), context().example_input
    file = tmp_path / "weights.safetensors"
    packing.write(packing.pack(model, NETS["plain"](), x), file)
    again = packing.unpack(packing.read(file), NETS["plain"]())
    assert accumulators_of(again) == accumulators_of(model) != {}
    assert torch.equal(again(x), model(x))
    assert counted(again, x).math == counted(model, x).math
    assert packing.file_bytes(packing.pack(again, NETS["plain"](), x)) == file.read_bytes()


def test_a_file_without_them_has_no_such_field():
    model = AffineStrategy().apply(without_batch_norm(NETS["plain"]()), context())
    structure = packing.pack(model, NETS["plain"](), context().example_input).structure
    assert set(json.loads(structure.model_dump_json())) == {"layers", "activations", "tensors"}


@pytest.mark.parametrize(
    ("accumulators", "message"),
    [
        ({"0": 1}, "greater than or equal to 2"),
        ({"0": 25}, "less than or equal to 24"),
        ({"nobody": 8}, "no layer 'nobody'"),
        ({"7": 8}, "is no convolution or linear layer|are no integers"),
    ],
)
def test_a_file_that_asks_for_others(accumulators, message):
    found = packing.pack(packed(), NETS["plain"](), context().example_input)
    with pytest.raises((InputError, ValueError), match=message):
        structure = packing.Structure.model_validate(
            {**json.loads(found.structure.model_dump_json()), "accumulators": accumulators}
        )
        packing.unpack(packing.Packed(structure, found.streams, found.plain), NETS["plain"]())


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_report_and_the_explanation_tell_them():
    model, x = narrow(6)
    report = micronet_eval.score(model, x)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(report, width=120))
    shown = " ".join(console.export_text().split())
    assert "4·4 Σ6" in shown
    assert "32-bit accumulators: ops32 7; 3 of 6 accumulating additions wider" in shown
    (product,) = [e for e in report.explain("0") if e.mults]
    lines = dict(product.lines)
    assert "an addition in the accumulator counts 6/32, an accumulating addition counts 32/32" in lines["bits"]
    assert lines["ops32"] == "6 x 4/32 + 3 x 6/32 + 3 = 4.3125"
