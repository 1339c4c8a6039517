"""Accumulators of few bits that really run: wrapping integers, what they count, who may have one, their file."""

import copy
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
from micronet_eval.accumulators import what_if
from micronet_eval.costs import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, Codebook, CodebookQuantizer, FixedPointQuantizer, accumulator
from micronet_eval.merge import without_batch_norm
from micronet_eval.report import render
from micronet_eval.scoring import account
from micronet_eval.storage import stored_tensors
from micronet_eval.structure import StructureError, accumulators_of, copied, set_accumulators, set_quantizers, traced
from micronet_eval.testing import NETS, context
from micronet_eval.trace import trace
from micronet_plugins.accumulators import Accumulators
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

    def __init__(self, step=1.0, weight_step=1.0, bias=(0.5, 0.25, 0.0), dim=-1, also=lambda y: 0):
        super().__init__()
        self.layer = network()[0].get_submodule("0")
        self.quantizer = FixedPointQuantizer(4)
        self.register_buffer("step", torch.tensor([step]))
        self.register_buffer("weight_step", torch.tensor([weight_step]))
        self.register_buffer("other", torch.tensor(bias))
        self.dim, self.also = dim, also

    def forward(self, x):
        y = self.layer(self.quantizer(x))
        return accumulator(y, self.step, self.weight_step, self.other, 6, self.dim) + self.also(y)


@pytest.mark.rule("width.accumulator")
@pytest.mark.parametrize(
    "options",
    [
        {"step": 2.0},  # integers of another step
        {"weight_step": 0.5},
        {"bias": (0.5, 0.25, 1.0)},
        {"dim": 0},
        {"also": lambda y: y},  # the wide sum is used, too
        {"also": lambda y: y.view(1, 3) * 0},
    ],
)
def test_what_only_looks_like_one_counts_32_bits(options):
    honest, forged = Own().eval(), Own(**options).eval()
    x = torch.zeros(1, 3)
    assert [p.accumulator.bits for p in counted(honest, x).operations if p.cost.macs] == [6]
    assert [p.accumulator.bits for p in counted(forged, x).operations if p.cost.macs] == [32]


def test_steps_of_another_kind_are_stored():
    names = {s.name for s in stored_tensors(trace(Own(step=2.0).eval(), torch.zeros(1, 3)))}
    assert {"step", "weight_step", "other"} <= names
    assert not {"step", "weight_step", "other"} & {
        s.name for s in stored_tensors(trace(Own().eval(), torch.zeros(1, 3)))
    }


def test_a_constant_between_quantizer_and_layer_is_no_integer():
    class Padded(Own):
        def forward(self, x):
            y = self.layer(nn.functional.pad(self.quantizer(x)[:, :2], (0, 1), value=0.3))
            return accumulator(y, self.step, self.weight_step, self.other, 6, -1)

    assert [p.accumulator.bits for p in counted(Padded().eval(), torch.zeros(1, 3)).operations if p.cost.macs] == [32]


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
    seen = copy.copy(context())
    object.__setattr__(seen, "training_data", [(rows, None)])
    object.__setattr__(seen, "example_input", x)
    # Sums 21, -8, 3; 0, 8, 0; 21, 0, 3: -8 ... 21 in 6 bits.
    assert accumulators_of(Accumulators(headroom=0).apply(graph, seen)) == {"0": 6}
    assert accumulators_of(Accumulators(headroom=3).apply(graph, seen)) == {"0": 9}
    assert accumulators_of(graph) == {}  # left alone


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
    written = packing.file_bytes(packing.pack(model, NETS["plain"](), context().example_input))
    assert b"accumulators" not in written  # the structure is compressed
    structure = packing.pack(model, NETS["plain"](), context().example_input).structure
    assert structure.accumulators == {}


@pytest.mark.parametrize(
    ("accumulators", "message"),
    [
        ({"0": 1}, "greater than or equal to 2"),
        ({"0": 32}, "less than or equal to 31"),
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
