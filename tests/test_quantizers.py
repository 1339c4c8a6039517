"""The bundled quantizers, against numbers worked out by hand or by brute force, and what all of them must hold."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import evaluate, packing, plugins, score
from micronet_eval.errors import InputError
from micronet_eval.formats import (
    Affine,
    AffineQuantizer,
    Codebook,
    CodebookQuantizer,
    FixedPointQuantizer,
    OffGrid,
    format_of,
    of_activations,
)
from micronet_eval.merge import merged
from micronet_eval.recipe import compress
from micronet_eval.storage import stored_tensors
from micronet_eval.strategy import Context
from micronet_eval.structure import (
    Mask,
    StructureError,
    accumulators_of,
    copied,
    quantizers_of,
    set_quantizers,
    traced,
)
from micronet_eval.trace import trace
from micronet_plugins.affine import AffineStrategy, activation_format
from micronet_plugins.calibration import Observed, affine_format, exponent_of
from micronet_plugins.codebook import k_means
from micronet_plugins.gptq import GPTQ, hessians, round_weight, unfolded
from micronet_plugins.lsq import LSQ, PowerOfTwo
from micronet_plugins.mixed import Mixed, allocate
from micronet_plugins.weights import dot_products

CASES = [
    ("fixed-point", {}),
    ("fixed-point", {"calibration": "mse", "activation_calibration": "max", "weight_bits": 4}),
    ("affine", {}),
    ("affine", {"symmetric": False, "granularity": "group", "group_size": 4, "weight_bits": 4, "calibration": "mse"}),
    ("affine", {"granularity": "tensor", "calibration": "sigma", "sigmas": 2}),
    ("lsq", {}),
    ("lsq", {"granularity": "channel"}),
    ("lsq", {"granularity": "channel", "power_of_two": True}),
    ("lsq", {"activations": "layers", "first_last_bits": 8}),
    ("binary", {}),
    ("binary", {"activation_bits": 8, "granularity": "tensor"}),
    ("ternary", {}),
    ("codebook", {}),
    ("gptq", {}),
    ("gptq", {"activations": "layers"}),
    ("gptq", {"granularity": "group", "group_size": 3, "symmetric": False}),
    ("mixed", {}),
    ("mixed", {"weigh": "math", "bits": 4}),
    ("torchao", {}),
    ("torchao", {"config": "int4"}),
    ("brevitas", {}),
    ("brevitas", {"scheme": "ShiftedUint8WeightPerChannelFloat", "weight_bits": 4}),
]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {', '.join(map(str, o))}" for n, o in CASES])


class Residual(nn.Module):
    """A convolution with batch norm, one of 2 groups around which there is a shortcut, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.hidden = nn.Linear(8 * 16, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = F.max_pool2d(x + torch.relu(self.grouped(x)), 2)
        return self.last(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def x():
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def context(x):
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 10), 16)
    return Context(torch.zeros(1, *x.shape[1:]), loader, 0, plugins.formulas())


def strategy(name, **options):
    if name in ("torchao", "brevitas"):
        pytest.importorskip({"torchao": "torchao.quantization", "brevitas": "brevitas.nn"}[name], exc_type=ImportError)
    return plugins.lookup("quantizer", name)(**options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fine_tune(model, x):
    """One step; gives the parameters that no gradient reached."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    optimizer.step()
    model.eval()
    return without


# --- what every quantizer must hold -----------------------------------------------------------------------------------


@EACH
def test_trains_packs_and_counts(name, options, net, x):
    nn.init.constant_(net.norm.weight, 0.9)  # else steps of powers of two before and behind it fit each other
    before = state(net)
    model = strategy(name, **options).apply(net, context(x))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    again = strategy(name, **options).apply(net, context(x))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    first = model.first.parametrizations.weight.original.clone()
    assert fine_tune(model, x) == []
    trained = model.first.parametrizations.weight.original
    assert not torch.equal(first, trained)
    packed = packing.pack(model, Residual(), x[:1])
    unpacked = packing.unpack(packed, Residual()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), model(x))
    for counted in (score(model, x[:1]).storage, score(unpacked, x[:1]).storage):
        for stream in ("values", "masks", "overhead"):
            bits = getattr(counted, f"{stream.removesuffix('s')}_bits")
            assert bits <= packed.bits[stream] < bits + 8
    assert score(model, x[:1]).math == score(unpacked, x[:1]).math


@EACH
def test_zeros_of_a_mask_stay(name, options, net, x):
    mask = torch.rand(net.hidden.weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    parametrize.register_parametrization(net.hidden, "weight", Mask(mask))
    model = strategy(name, **options).apply(net, context(x))
    fine_tune(model, x)
    assert not model.hidden.weight[~mask].any()
    assert model.hidden.weight[mask].any()


@EACH
def test_tied_weights_are_stored_once(name, options, x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    net, x = Tied().eval(), x.flatten(1)[:, :32]
    model = strategy(name, **options).apply(net, context(x))
    assert torch.equal(model.a.weight, model.b.weight)
    unpacked = packing.unpack(packing.pack(model, Tied(), x[:1]), Tied()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), model(x))
    assert score(model, x[:1]).storage.parameters == 32 * 32 + 32 * 10 + 32 + 32 + 10


def test_a_second_quantizer_leaves_learned_scales_alone(net, x):
    first = LSQ().apply(net, context(x))
    scales = {name: q.scale.clone() for name, q in quantizers_of(first).items()}
    second = strategy("fixed-point").apply(first, context(x))
    assert all(torch.equal(quantizers_of(second)[name].scale, scale) for name, scale in scales.items())
    unpacked = packing.unpack(packing.pack(second, Residual(), x[:1]), Residual()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), second(x))


def test_calibration_takes_no_more_training_data_than_asked_for(net, x):
    given = context(x)
    taken = []

    class Watched(Context):
        def calibration(self, batches):
            for inputs in super().calibration(batches):
                taken.append(len(inputs))
                yield inputs

    watched = Watched(given.example_input, given.training_data, 0, given.formulas)
    AffineStrategy(batches=2).apply(net, watched)
    assert taken == [16, 16]


RECIPE = (
    f'task = "digits"\ndata = "noise"{SMALL}'
    + """[[stages]]
pruner = "low-rank"
parameters = 40_000
[[stages]]
sparsifier = "magnitude"
[[stages]]
merge = "batch-norm"
[[stages]]
quantizer = "QUANTIZER"
[[stages]]
train = { epochs = 1, learning_rate = 0.0001 }
"""
)


@pytest.mark.parametrize("name", ["lsq", "ternary"])
def test_a_recipe_ends_in_a_file_no_larger_than_counted(name, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("QUANTIZER", name))
    compress(tmp_path / "recipe.toml", tmp_path / "made")
    report = evaluate(tmp_path / "made")
    counted = report.storage
    assert counted.file_bytes <= counted.bits / 8 * 1.02 + 64 * 1024


# --- grids ------------------------------------------------------------------------------------------------------------


def test_codes_of_a_known_tensor():
    weight = torch.tensor([[-0.7, 0.3], [0.6, 1.4]])
    found = affine_format(weight, 4, (1, 2))
    assert (found.low, found.high) == (-7, 7)
    assert torch.allclose(found.scales, torch.tensor([0.1, 0.2]))
    rounded = AffineQuantizer(found)(weight)
    assert found.encode(rounded).tolist() == [[16 - 7, 3], [3, 7]]


def test_zero_points_of_a_known_tensor():
    found = affine_format(torch.tensor([-1.0, 0.1, 2.0]), 2, (3,), symmetric=False)
    assert (found.low, found.high, found.scales.tolist(), found.zero_points.tolist()) == (0, 3, [1.0], [1])
    assert AffineQuantizer(found)(torch.tensor([-5.0, 0.1, 1.6])).tolist() == [-1, 0, 2]


def test_ranges_by_max_sigma_and_mse():
    values = torch.tensor([-1.0, 1.0] * 50 + [10.0])
    assert affine_format(values, 4, (101,)).scales.item() == pytest.approx(10 / 7)
    mean, std = values.mean().item(), values.std(correction=0).item()
    sigma = affine_format(values, 4, (101,), calibration="sigma", sigmas=2)
    assert sigma.scales.item() == pytest.approx((mean + 2 * std) / 7)

    def error(found):
        return (AffineQuantizer(found)(values) - values).square().sum().item()

    assert error(affine_format(values, 4, (101,), calibration="mse")) < error(affine_format(values, 4, (101,)))


def test_exponents_by_max_and_mse():
    # max: 8 needs the step 2 at 4 bits (2**3 - 1 = 7 steps of 1 are too few). Then 100 ones round to 0 (ties to even).
    seen = Observed.of(torch.tensor([1.0] * 100 + [8.0]))
    assert exponent_of(seen, 4, "max") == 1
    assert exponent_of(seen, 4, "mse") == 0  # 8 becomes 7, an error of 1, not of 100


def test_overhead_of_groups(x):
    """8 inputs in groups of 4, 6 outputs: 12 scales of 32 bits, and 12 zero points of the 4 bits of a weight."""
    torch.manual_seed(0)
    layer, inputs = nn.Sequential(nn.Linear(8, 6, bias=False)), x.flatten(1)[:, :8]
    options = {"granularity": "group", "group_size": 4, "weight_bits": 4, "activation_bits": 0}
    storage = score(AffineStrategy(**options).apply(layer, context(inputs)), inputs[:1]).storage
    assert (storage.overhead_bits, storage.value_bits + storage.mask_bits) == (12 * 32, 48 * 4)
    storage = score(AffineStrategy(**options, symmetric=False).apply(layer, context(inputs)), inputs[:1]).storage
    assert storage.overhead_bits == 12 * 32 + 12 * 4


def test_activations_without_negatives_have_no_zero_point():
    positive = activation_format(Observed.of(torch.tensor([0.0, 51.0])), 8, False, "max", 6)
    assert (positive.low, positive.high, positive.zero_points) == (0, 255, None)
    assert positive.scales.item() == pytest.approx(0.2)
    both = activation_format(Observed.of(torch.tensor([-10.0, 41.0])), 8, False, "max", 6)
    assert both.zero_points.item() == 50


def test_a_scaled_activation_is_8_bits_a_scale_and_one_multiplication_an_output(x):
    """4 -> 3 without bias: 12 products, x / scale at the input, one scale an output for both."""
    torch.manual_seed(0)
    inputs = x.flatten(1)[:, :4]
    model = AffineStrategy(symmetric=False).apply(nn.Sequential(nn.Linear(4, 3, bias=False)), context(inputs))
    counted = score(model, inputs[:1])
    nonzero = int((model.get_submodule("0").weight != 0).sum())
    bits = [q.bits for q in quantizers_of(model).values()]
    assert bits == [8]
    width = max(8, 9)  # a weight less its zero point
    assert counted.math.mult_ops32 == nonzero * width / 32 + 4 + 3
    zero_points = 3 * 8 + 8
    assert counted.storage.overhead_bits == 3 * 32 + 32 + zero_points


@pytest.mark.parametrize("quantizer", [AffineStrategy(activation_bits=4), LSQ(activation_bits=4)])
def test_what_only_a_relu_reads_has_no_sign(quantizer):
    """The sums of a residual block are quantized before the ReLU: where nothing else reads them, negative codes say
    nothing, and twice as many are left for the rest."""

    class Block(nn.Module):
        def __init__(self, shortcut):
            super().__init__()
            self.first, self.relu, self.second, self.shortcut = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), shortcut

        def forward(self, x):
            y = self.first(x)
            return self.second(self.relu(y)) + (y * y if self.shortcut else 0)

    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for shortcut in (False, True):
        torch.manual_seed(0)
        model = quantizer.apply(Block(shortcut), context(inputs))
        found[shortcut] = quantizers_of(model)["first"].range
    assert found[False] == (0, 15)
    assert found[True][0] < 0 < found[True][1] <= 7


# --- places and bits --------------------------------------------------------------------------------------------------


def test_activations_of_layers_are_rounded_in_front_of_each(net, x):
    """The shortcut of Residual reads what the convolution reads, but unrounded."""
    model = LSQ(activations="layers", activation_bits=2).apply(net, context(x))
    assert list(quantizers_of(model)) == ["first:input", "grouped:input", "hidden:input", "last:input"]
    seen = {}
    for path in ("norm", "grouped", "hidden"):
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args[0], out)}))
    with torch.no_grad():
        model(x)
    stream = torch.relu(seen["norm"][1])
    assert len(seen["grouped"][0].unique()) <= 4 < len(stream.unique())
    expected = F.max_pool2d(stream + torch.relu(seen["grouped"][1]), 2).flatten(1)
    with torch.no_grad():
        assert torch.equal(seen["hidden"][0], quantizers_of(model)["hidden:input"](expected))
    layers = {layer.module: layer for layer in score(model, x[:1]).layers if layer.macs}
    assert [layers[path].input_bits for path in ("first", "grouped", "hidden", "last")] == [2] * 4


@pytest.mark.parametrize("activations", ["all", "layers"])
@pytest.mark.parametrize("quantizer", [AffineStrategy, LSQ])
def test_the_first_and_the_last_layer_have_bits_of_their_own(quantizer, activations, net, x):
    options = {"weight_bits": 3, "activation_bits": 4, "first_last_bits": 6, "activations": activations}
    model = quantizer(**options).apply(net, context(x))
    layers = {layer.module: layer for layer in score(model, x[:1]).layers if layer.macs}
    paths = ("first", "grouped", "hidden", "last")
    assert [layers[path].weight_bits for path in paths] == [6, 3, 3, 6]
    assert [layers[path].input_bits for path in paths] == ([6, 4, 4, 6] if activations == "layers" else [4] * 4)


def test_tied_weights_of_the_last_layer_have_its_bits(x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.hidden, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            self.out.weight = self.table.weight

        def forward(self, x):
            return self.out(torch.relu(self.hidden(self.table((x * 0).long()))))

    model = LSQ(weight_bits=2, first_last_bits=6, activations="layers").apply(Tied(), context(x.flatten(1)[:, 0]))
    assert [model.get_submodule(p).parametrizations.weight[0].range for p in ("table", "hidden", "out")] == [
        (-32, 31)
    ] * 3


def test_layers_called_by_keyword_are_quantized_in_front(x):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(input=x)

    model = LSQ(activations="layers").apply(Named(), context(x.flatten(1)[:, :8]))
    assert list(quantizers_of(model)) == ["layer:input"]
    model(x.flatten(1)[:, :8])


def test_activations_of_layers_where_there_is_no_layer(x):
    with pytest.raises(InputError, match="has no convolution and no linear layer"):
        strategy("affine", activations="layers").apply(nn.Sequential(nn.BatchNorm2d(1)).eval(), context(x))


def test_a_place_in_front_of_what_reads_nothing(net):
    graph = traced(net)
    with pytest.raises(StructureError, match="node 'x' has no first argument"):
        set_quantizers(graph, {"x:input": FixedPointQuantizer(8)})
    with pytest.raises(StructureError, match="no node 'none:input'"):
        set_quantizers(graph, {"none:input": FixedPointQuantizer(8)})


# --- batch norm that is trained ---------------------------------------------------------------------------------------

KEPT = [
    ("lsq", {"granularity": "channel", "activation_bits": 3}),
    ("lsq", {"granularity": "channel", "activations": "layers", "first_last_bits": 8}),
    ("affine", {"symmetric": True}),
    ("gptq", {}),
]


@pytest.mark.parametrize(("name", "options"), KEPT, ids=lambda value: value if isinstance(value, str) else "")
def test_batch_norm_is_trained_with_the_quantizers_and_merged_into_their_scales(name, options, net, x):
    with torch.no_grad():
        net.norm.weight[::2] = -0.5
    model = strategy(name, keep_batch_norm=True, **options).apply(net, context(x))
    assert type(model.norm) is nn.BatchNorm2d
    before = state(model.norm)
    assert fine_tune(model, x) == []
    assert not any(torch.equal(before[name], value) for name, value in model.norm.state_dict().items())
    last = strategy("biases", bits=10).apply(model, context(x))
    assert type(last.norm) is nn.Identity
    with torch.no_grad():
        codes = (last.first.weight / last.first.parametrizations.weight[0].scale.view(8, 1, 1, 1)).round()
        torch.testing.assert_close(merged(model, x[:1])(x), model(x), rtol=1e-4, atol=1e-4)
        assert (last(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
    assert codes.abs().max() <= 127
    layer = next(layer for layer in score(last, x[:1]).layers if layer.module == "first")
    assert layer.adds == layer.mults  # the bias of each output stands for the addition that its products save
    unpacked = packing.unpack(packing.pack(last, Residual(), x[:1]), Residual()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), last(x))
    assert all(t.format.spec.startswith("fixed") for t in stored_tensors(trace(last, x[:1])) if t.name.endswith("bias"))


def test_activations_are_rounded_behind_batch_norm_that_is_kept(net, x):
    model = LSQ(granularity="channel", keep_batch_norm=True).apply(net, context(x))
    assert "norm" in quantizers_of(model)
    assert "first" not in quantizers_of(model)
    fixed = LSQ().apply(merged(net, x[:1]), context(x))
    assert len(quantizers_of(fixed)) == len(quantizers_of(model))


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5)])
def test_batch_norm_behind_what_does_nothing_is_merged_all_the_same(between, x):
    def made(layer):
        return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()

    one, plain = (
        LSQ(granularity="channel", keep_batch_norm=True).apply(made(b), context(x)) for b in (between, nn.ReLU())
    )
    assert "_2" in quantizers_of(one)
    assert type(merged(one, x[:1]).get_submodule("2")) is nn.Identity
    assert "_2" in quantizers_of(plain)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lsq", {}),
        ("lsq", {"granularity": "channel", "power_of_two": True}),
        ("affine", {"symmetric": False}),
        ("binary", {}),
        ("codebook", {}),
    ],
)
def test_batch_norm_is_not_kept_where_it_would_not_merge(name, options, net, x):
    with pytest.raises(InputError, match="batch norm 'norm' could not be merged into weights that are quantized so"):
        strategy(name, keep_batch_norm=True, **options).apply(net, context(x))


def test_accumulators_come_when_batch_norm_is_merged(net, x):
    model = LSQ(granularity="channel", keep_batch_norm=True).apply(net, context(x))
    with pytest.raises(InputError, match=r"accumulators: batch norm 'norm' is not merged yet.* put quantizer biases"):
        strategy("accumulators").apply(model, context(x))
    narrow = strategy("accumulators").apply(strategy("biases").apply(model, context(x)), context(x))
    assert {"first", "last"} <= set(accumulators_of(narrow))


def test_batch_norm_that_is_merged_already_cannot_be_kept(net, x):
    with pytest.raises(InputError, match="has no batch norm, or it is merged already"):
        LSQ(keep_batch_norm=True).apply(merged(net, x[:1]), context(x))


def test_biases_that_are_rounded_are_left(net, x):
    model = strategy("biases", bits=6).apply(LSQ(rest_bits=12).apply(net, context(x)), context(x))
    assert [q.bits for q in model.hidden.parametrizations.bias] == [12]


@pytest.mark.parametrize(("size", "name"), [(1.0, "float16"), (1e-6, "bfloat16")])
def test_scales_of_16_bits_keep_the_integers(size, name, net, x):
    """Beside small scales float16 would lose more than bfloat16."""
    with torch.no_grad():
        net.first.weight *= size
        net.norm.running_var.fill_(1.0)
    model = LSQ(granularity="channel", keep_batch_norm=True, power_of_two="activations").apply(net, context(x))
    wide, narrow = (strategy("biases", scale_bits=bits).apply(model, context(x)) for bits in (32, 16))
    (before, old), (after, new) = (
        (m.first.weight, m.first.parametrizations.weight[-1].scale.detach()) for m in (wide, narrow)
    )
    assert torch.equal((before / old.view(-1, 1, 1, 1)).round(), (after / new.view(-1, 1, 1, 1)).round())
    torch.testing.assert_close(new, old, rtol=2**-8 if name == "bfloat16" else 2**-11, atol=0)
    assert [t.format.spec for t in stored_tensors(trace(narrow, x[:1])) if t.name == "first.weight"] == [
        f"affine:-7:7:1x{'x'.join(map(str, net.first.weight.shape[1:]))}:{name}"
    ]
    unpacked = packing.unpack(packing.pack(narrow, Residual(), x[:1]), Residual()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), narrow(x))
    of_scales = {bits: scale_bits(m, x, "first") for bits, m in ((32, wide), (16, narrow))}
    assert of_scales == {32: 32, 16: 16}


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_scales_of_16_bits_keep_the_signs(name, net, x):
    model = strategy(name).apply(net, context(x))
    wide, narrow = (strategy("biases", scale_bits=bits).apply(model, context(x)) for bits in (32, 16))
    (before, old), (after, new) = ((m.first.weight, m.first.parametrizations.weight[-1]) for m in (wide, narrow))
    assert torch.equal(before.sign(), after.sign())
    assert torch.equal(old.threshold, new.threshold)
    assert torch.equal(old.scale.half().float(), new.scale)
    assert not torch.equal(old.scale, new.scale)
    (spec,) = [t.format.spec for t in stored_tensors(trace(narrow, x[:1])) if t.name == "first.weight"]
    assert spec.endswith(":float16")
    unpacked = packing.unpack(packing.pack(narrow, Residual(), x[:1]), Residual()).eval()
    with torch.no_grad():
        assert torch.equal(unpacked(x), narrow(x))
    of_scales = {bits: scale_bits(m, x, "first") for bits, m in ((32, wide), (16, narrow))}
    assert of_scales == {32: 32, 16: 16}


def scale_bits(model, x, module):
    return next(op.weight_bits for op in score(model, x[:1]).layers if (op.module, op.op) == (module, "micronet.scale"))


# --- lsq --------------------------------------------------------------------------------------------------------------


def test_layers_have_bits_of_their_own(net, x):
    bits = {"*": 3, "hidden": 2, "first": 5}
    model = LSQ(weight_bits=7, first_last_bits=8, layer_bits=bits).apply(net, context(x))
    found = {path: layer.parametrizations.weight[-1].bits for path, layer in dot_products(model).items()}
    assert found == dict.fromkeys(found, 3) | {"hidden": 2, "first": 5}
    with pytest.raises(InputError, match="option 'layer_bits': no layer's path matches 'head'"):
        LSQ(layer_bits={"head": 2}).apply(net, context(x))
    with pytest.raises(ValidationError, match="less than or equal to 8"):
        strategy("lsq", layer_bits={"first": 9})


def test_steps_of_activations_alone_are_powers_of_two(net, x):
    model = LSQ(granularity="channel", power_of_two="activations").apply(net, context(x))
    assert all(bool((torch.frexp(q.scale)[0] == 0.5).all()) for q in quantizers_of(model).values())
    assert not bool((torch.frexp(model.first.parametrizations.weight[-1].scale)[0] == 0.5).all())


def test_the_gradient_of_the_step_is_the_papers():
    """v / s = 0.6, 2.4, -10, 18 in -4 ... 3: 1 - 0.6, 2 - 2.4, -4, 3, together -1; times 1 / sqrt(4 x 3)."""
    v = torch.tensor([0.3, 1.2, -5.0, 9.0], requires_grad=True)
    quantizer = AffineQuantizer(Affine(-4, 3, (4,), torch.tensor([0.5])), learned=True)
    quantizer(v).sum().backward()
    assert v.grad.tolist() == [1, 1, 0, 0]
    assert quantizer.scale.grad.item() == pytest.approx(-1 / 12**0.5)


def test_the_gradient_of_the_step_beside_a_zero_point():
    """Integers from 0 to 15, 5 of them below zero: v / s from -5 to 10 is within the range."""
    zero = torch.tensor([5], dtype=torch.int32)
    quantizer = AffineQuantizer(Affine(0, 15, (), torch.tensor([0.5]), zero), learned=True)
    v = torch.tensor([-3.0, -2.5, 0.6, 4.9, 5.0, 5.1], requires_grad=True)
    q = quantizer(v)
    assert q.tolist() == [-2.5, -2.5, 0.5, 5, 5, 5]
    q.sum().backward()
    assert v.grad.tolist() == [0, 1, 1, 1, 1, 0]
    of_values = -5 + 0 + (1 - 1.2) + (10 - 9.8) + 0 + 10
    assert quantizer.scale.grad.item() == pytest.approx(of_values * (6 / 6 * 15) ** -0.5)


def test_the_gradients_of_steps_by_channel():
    v = torch.tensor([[0.3, 1.2], [-5.0, 9.0]], requires_grad=True)
    quantizer = AffineQuantizer(Affine(-4, 3, (1, 2), torch.tensor([0.5, 0.5])), learned=True)
    quantizer(v).sum().backward()
    assert quantizer.scale.grad.tolist() == pytest.approx([0, -1 / 6**0.5], abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_steps_begin_where_the_squared_error_is_least(bits, share):
    """Next to the best of a thousand steps."""

    def error(step, values, low, high):
        return (values - (values / step).round().clamp(low, high) * step).square().sum().item()

    generator = torch.Generator().manual_seed(0)
    layer, half = nn.Linear(3000, 4), 2 ** (bits - 1)
    with torch.no_grad():
        kept = torch.rand(layer.weight.shape, generator=generator) < share
        sizes = torch.logspace(-3, 3, 4)[:, None]
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * kept * sizes)
    found = LSQ(granularity="channel", weight_bits=bits).quantizer(layer, "weight").scale.tolist()
    for step, row in zip(found, layer.weight.detach().double(), strict=True):
        best = min(error(s, row, -half, half - 1) for s in (row.abs().max() * torch.logspace(-4, 0, 1001)).tolist())
        assert error(step, row, -half, half - 1) <= 1.1 * best
    values = torch.rand(1000, generator=generator, dtype=torch.float64).square()
    quantizer = LSQ(activation_bits=bits).activation_quantizer(Observed.of(values))
    assert quantizer.range == (0, 2**bits - 1)
    best = min(error(s, values, 0, 2**bits - 1) for s in torch.logspace(-4, 0, 1001).tolist())
    assert error(quantizer.scale.item(), values, 0, 2**bits - 1) <= 1.1 * best


def test_steps_of_zeros_begin_at_1():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0] * 4, [0.0, 0.0, 0.0, -4.0]]))
    steps = LSQ(weight_bits=3, granularity="channel").quantizer(layer, "weight").scale.tolist()
    assert steps == [1, pytest.approx(4 / 3)]


def test_one_bit_with_a_sign_is_minus_1_or_0():
    quantizer = LSQ(activation_bits=1).activation_quantizer(Observed.of(torch.tensor([-2.0, -2.0, 0.0, 1.0])))
    assert quantizer.range == (-1, 0)
    assert quantizer.scale.item() == 2


def test_a_step_that_fell_below_zero_is_packed_as_it_computes(x):
    """An optimizer may take a step below zero; the forward bounds it, and so does what is packed."""
    torch.manual_seed(0)
    layer, inputs = nn.Sequential(nn.Linear(8, 4)), x.flatten(1)[:, :8]
    model = strategy("lsq").apply(layer, context(inputs)).train()
    scale = model.get_submodule("0").parametrizations.weight[0].scale
    with torch.no_grad():
        scale.fill_(-0.1)
    packed = packing.pack(model.eval(), layer, inputs[:1])
    assert scale.item() > 0
    assert torch.equal(packing.unpack(packed, layer)(inputs), model(inputs))


def test_steps_of_powers_of_two():
    """0.7 lies behind the root of 1/2, about 0.707, so that 1/2 is nearer in the logarithm. Gradients pass through."""
    nearest = PowerOfTwo()
    steps = torch.tensor([0.7, 0.71, 3.0, 2.0**-50, -1.0], requires_grad=True)
    assert nearest(steps).tolist() == [0.5, 1.0, 4.0, 2.0**-40, 2.0**-40]
    nearest(steps).sum().backward()
    assert steps.grad.tolist() == [1, 1, 1, 0, 0]


def test_where_steps_of_powers_of_two_begin():
    """Against all powers of two, for two channels and for an activation."""

    def error(step, values, low, high):
        return ((values / step).round().clamp(low, high) * step - values).square().sum().item()

    torch.manual_seed(0)
    layer, exponents = nn.Linear(64, 2), range(-12, 4)
    with torch.no_grad():
        layer.weight[1] *= 7
    for bits, half in ((3, 4), (8, 128)):
        found = LSQ(power_of_two=True, granularity="channel", weight_bits=bits).quantizer(layer, "weight").scale
        for step, row in zip(found.tolist(), layer.weight.detach().double(), strict=True):
            assert step == 2.0 ** min(exponents, key=lambda e, r=row, h=half: error(2.0**e, r, -h, h - 1))
    dense = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sparse = torch.where(dense < 0.05, dense * 100, 0)
    for bits, seen in itertools.product((3, 4, 8), (dense, sparse)):
        step = LSQ(power_of_two=True, activation_bits=bits).activation_quantizer(Observed.of(seen)).scale.item()
        assert step == 2.0 ** min(exponents, key=lambda e, v=seen, b=bits: error(2.0**e, v, 0, 2**b - 1))
    nothing = nn.Linear(8, 1)
    nn.init.zeros_(nothing.weight)
    assert LSQ(power_of_two=True).quantizer(nothing, "weight").scale.item() == 1


def test_steps_of_powers_of_two_are_trained(x):
    torch.manual_seed(0)
    inputs = x.flatten(1)[:, :8]
    model = LSQ(power_of_two=True, granularity="channel").apply(nn.Sequential(nn.Linear(8, 4)), context(inputs)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scale = model.get_submodule("0").parametrizations.weight[0].parametrizations.scale.original
    before = scale.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert bool((scale != before).all())
    assert bool((torch.frexp(model.get_submodule("0").parametrizations.weight[0].scale)[0] == 0.5).all())


@pytest.mark.rule("storage.overhead")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_steps_of_powers_of_two_are_shifts(x, power_of_two):
    """8 -> 4 without bias: else a scale is 32 bits, and one multiplication for each input, and each output, at 32."""
    torch.manual_seed(0)
    inputs = x.flatten(1)[:, :8]
    layer = nn.Sequential(nn.Linear(8, 4, bias=False))
    model = LSQ(power_of_two=power_of_two, granularity="channel").apply(layer, context(inputs))
    counted = score(model, inputs[:1])
    nonzero = int((model.get_submodule("0").weight != 0).sum())
    assert counted.math.mult_ops32 == nonzero * 4 / 32 + (0 if power_of_two else 8 + 4)
    assert counted.storage.overhead_bits == 4 * (8 if power_of_two else 32) + 32  # the activation's stays a float32
    packed = packing.pack(model, layer, inputs[:1])
    assert [spec for name, spec, _ in packed.structure.tensors if name == "0.weight"] == [
        "affine:-8:7:1x8" + (":shifts" if power_of_two else "")
    ]
    again = packing.unpack(packed, copied(layer))
    assert torch.equal(again(inputs), model(inputs))
    assert (score(again, inputs[:1]).storage, score(again, inputs[:1]).math) == (counted.storage, counted.math)


@pytest.mark.parametrize("zeros", [None, torch.tensor([0, 1])])
def test_scales_that_are_powers_of_two_are_exponents(zeros):
    weight = torch.tensor([[1.5, -1.0], [4.0, 2.0]])
    found = Affine(-4, 3, (1, 2), torch.tensor([0.5, 2.0]), zeros)
    assert found.spec == "affine:-4:3:1x2:shifts" + ("" if zeros is None else ":zeros")
    assert next((column.tolist(), bits) for column, bits in found.side) == ([255, 1], 8)
    columns = iter(found.side)
    again = format_of(found.spec, weight.shape, lambda count, bits: next(columns)[0])
    assert again == found
    assert torch.equal(again.decode(found.encode(weight)), weight)


@pytest.mark.parametrize("byte", [128, 129])  # -128, -127: such a scale is no normal float32, and would not be written
def test_exponents_that_no_file_holds_are_refused(byte):
    with pytest.raises(OffGrid, match="exponents from -126 to 127 are possible"):
        format_of("affine:-4:3:1x2:shifts", (2, 2), lambda count, bits: torch.tensor([byte, 1]))


@pytest.mark.parametrize("scales", [[0.5, 0.6], [0.6, 2.0**-127], [2049.0, 2.0**-24]])
def test_other_scales_are_numbers(scales):
    """Neither exponents nor floats of 16 bits hold both: 2049 takes 12 significant bits, bfloat16 has 8."""
    found = Affine(-4, 3, (1, 2), torch.tensor(scales))
    assert (found.spec, found.side_bits) == ("affine:-4:3:1x2", 64)


@pytest.mark.rule("storage.overhead")
@pytest.mark.parametrize(
    ("scales", "name"),
    [
        ([0.5, 3.0], "float16"),
        ([2047.0, 2.0**-24], "float16"),
        ([0.5, 2.0**-127], "bfloat16"),  # no exponents: 2^-127 is no normal float32, and fixed point has none such
        ([3.0, 1e30], "bfloat16"),
    ],
)
def test_scales_of_16_bits_are_floats_of_16_bits(scales, name):
    scales = torch.tensor(scales).to(getattr(torch, name)).float()
    found = Affine(-4, 3, (1, 2), scales)
    assert (found.spec, found.side_bits) == (f"affine:-4:3:1x2:{name}", 32)
    weight = scales[:, None] * torch.tensor([[1.0, -4.0], [3.0, 0.0]])
    columns = iter(found.side)
    again = format_of(found.spec, weight.shape, lambda count, bits: next(columns)[0])
    assert again == found
    assert torch.equal(again.scales, scales)
    assert torch.equal(again.decode(found.encode(weight)), weight)


def test_scales_without_values_are_no_shifts(x):
    """On the meta device nothing is known of them, so they count as numbers."""
    inputs = x.flatten(1)[:, :8]
    layer = nn.Sequential(nn.Linear(8, 4, bias=False))
    model = LSQ(granularity="channel", activation_bits=0).apply(layer, context(inputs))
    counted = score(model.to("meta"), inputs[:1].to("meta"))
    assert counted.storage.overhead_bits == 4 * 32


# --- binary, ternary, tables ------------------------------------------------------------------------------------------


def test_binary_weights_are_a_bit_each_and_a_32nd(x):
    torch.manual_seed(0)
    layer, inputs = nn.Sequential(nn.Linear(8, 4, bias=False)), x.flatten(1)[:, :8]
    model = strategy("binary").apply(layer, context(inputs))
    weight = layer[0].weight.detach()
    assert torch.allclose(model[0].weight, weight.sign() * weight.abs().mean(1, keepdim=True))
    counted = score(model, inputs[:1])
    assert counted.math.mult_ops32 == 32 / 32 + 4
    assert counted.storage.bits == 32 + 4 * 32


def test_ternary_weights_of_a_known_tensor(x):
    """mean|w| = 2, threshold 1.4; scales (3 + 5) / 2 = 4. Stored: 4 bits of mask, 2 signs, a scale."""
    layer, inputs = nn.Sequential(nn.Linear(4, 1, bias=False)), x.flatten(1)[:, :4]
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, -3.0, 5.0, -0.5]]) * 2 / 2.375)
    model = strategy("ternary").apply(layer, context(inputs))
    assert model[0].weight.tolist() == [pytest.approx([0, -8 / 2.375, 8 / 2.375, 0])]
    counted = score(model, inputs[:1])
    assert counted.math.mult_ops32 == 2 / 32 + 1
    assert counted.storage.bits == 4 + 2 + 32


@pytest.mark.rule("storage.smallest")
def test_ternary_weights_in_blocks_are_codes(x):
    """One row of eight: a bit each for the rows and 8 codes of 2 bits. As signs they would take a bitmask of 64."""
    layer, inputs = nn.Sequential(nn.Linear(8, 8, bias=False)), x.flatten(1)[:, :8]
    with torch.no_grad():
        layer[0].weight.zero_()[3] = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, 0])
    model = strategy("ternary", granularity="tensor").apply(layer, context(inputs))
    assert score(model, inputs[:1]).storage.bits == 8 + 8 * 2 + 8  # and the scale, 1
    packed = packing.pack(model, layer, inputs[:1])
    assert packed.structure.tensors[0][1] == "affine:-1:1:8x8:shifts"
    with torch.no_grad():
        assert torch.equal(packing.unpack(packed, copied(layer))(inputs), model(inputs))


def test_k_means_reaches_the_optimum():
    values = torch.tensor([0.1, 0.2, 1.0, 1.1, 5.0, 5.5, 5.6])
    ordered = values.double().sort().values

    def cost(cuts):
        parts = torch.tensor_split(ordered, cuts)
        return sum((p - p.mean()).square().sum().item() for p in parts)

    best = min(cost(cuts) for cuts in itertools.combinations(range(1, 7), 2))
    table = k_means(values, 3, 100)
    found = (values[:, None] - table).abs().min(1).values.double().square().sum().item()
    assert found == pytest.approx(best, rel=1e-5)


def test_a_table_keeps_its_zero_and_few_values_as_they_are():
    values = torch.tensor([0.0] * 5 + [0.2, 0.4, 0.9, 1.0, 1.1])
    assert 0.0 in k_means(values, 2, 100).tolist()
    assert k_means(torch.tensor([3.0, -1.0, 3.0]), 8, 10).tolist() == [-1, 3]


def test_each_value_of_a_table_gets_the_gradients_of_its_weights():
    quantizer = CodebookQuantizer(Codebook(torch.tensor([2.0, 0.0, -1.0])), learned=True)
    weight = torch.tensor([1.9, 2.2, 0.1, -3.0], requires_grad=True)
    (quantizer(weight) * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert quantizer.table.grad.tolist() == [11, 0, 1000]
    assert weight.grad.tolist() == [1, 10, 100, 1000]


# --- gptq -------------------------------------------------------------------------------------------------------------


def correlated(inputs, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(count, 4, generator=generator) @ torch.randn(4, inputs, generator=generator)
    return causes + 0.3 * torch.randn(count, inputs, generator=generator)


def test_gptq_changes_the_outputs_less_than_rounding_to_nearest():
    torch.manual_seed(0)
    weight, inputs = torch.randn(32, 24), correlated(24, 400)
    for symmetric, blocks in itertools.product((True, False), ((1, 24), (1, 8), (32, 24))):
        grid = affine_format(weight, 3, blocks, symmetric)
        nearest = AffineQuantizer(grid)(weight)
        better = round_weight(weight, (2 * inputs.T @ inputs)[None].double(), grid, 0.01)
        assert torch.equal(grid.decode(grid.encode(better)), better)
        error, least = (((w - weight) @ inputs.T).square().sum().item() for w in (nearest, better))
        assert least < 0.7 * error


def test_gptq_of_one_column_is_rounding_to_nearest():
    weight = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    grid = affine_format(weight, 3, (16, 1))
    assert torch.equal(
        round_weight(weight, torch.full((1, 1, 1), 7.0).double(), grid, 0.01), AffineQuantizer(grid)(weight)
    )


def test_gptq_of_two_columns_by_hand():
    """With q1 given, the second weight with least error is w2 + (w1 - q1) H12 / H22: 0.3 + 0.4 x 3 / 4 = 0.6."""
    grid = Affine(-7, 7, (1, 2), torch.tensor([1.0]))
    hessian = torch.tensor([[[4.0, 3.0], [3.0, 4.0]]]).double()
    assert round_weight(torch.tensor([[1.4, 0.3]]), hessian, grid, 1e-9).tolist() == [[1, 1]]
    assert AffineQuantizer(grid)(torch.tensor([[1.4, 0.3]])).tolist() == [[1, 0]]


def test_gptq_is_what_solving_again_after_each_column_gives():
    """Column by column: round, then the best remaining weights given all that is rounded (least squares, from H)."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(3, 140).double(), correlated(140, 300).double()
    hessian, grid = 2 * inputs.T @ inputs, affine_format(weight, 4, (1, 140))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(140)
    left, scales = weight.clone(), grid.scales.double()
    for i in range(140):
        left[:, i] = (left[:, i] / scales).round().clamp(-7, 7) * scales
        fixed, rest = slice(0, i + 1), slice(i + 1, 140)
        moved = (left[:, fixed] - weight[:, fixed]) @ damped[fixed, rest]
        left[:, rest] = weight[:, rest] - torch.linalg.solve(damped[rest, rest], moved.T).T
    assert torch.allclose(round_weight(weight, hessian[None], grid, 0.01), left)


def test_what_a_convolution_sees_gives_its_outputs(x):
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 7, 7)
    for layer in (
        nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(4, 6, 2, padding=1, padding_mode="reflect", bias=False),
    ):
        columns = unfolded(layer, inputs)
        weight = layer.weight.reshape(layer.groups, 6 // layer.groups, -1)
        outputs = layer(inputs).transpose(0, 1).reshape(layer.groups, 6 // layer.groups, -1)
        assert torch.allclose(weight @ columns, outputs, atol=1e-5)
        expected = 2 * columns.double() @ columns.double().transpose(1, 2)
        assert torch.allclose(hessians(layer, [layer], [inputs[:2], inputs[2:]]), expected)


class Twice(nn.Module):
    """A table of words that is the softmax, too, and two layers with one weight, called by keyword."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(16, 40, bias=False)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, tokens):
        x = nn.functional.embedding(tokens, self.table.weight)
        return self.table(self.second(input=self.first(input=x).relu()).relu())


def test_gptq_rounds_a_shared_weight_for_all_that_read_it():
    torch.manual_seed(0)
    model, tokens = Twice().eval(), torch.randint(0, 40, (16, 6))
    made = GPTQ(weight_bits=3, activation_bits=0).apply(model, context(tokens))
    grid = made.table.parametrizations.weight[-1]
    assert torch.equal(made.table.weight, grid(model.table.weight))  # to nearest: it is the embedding, too
    both = hessians(model, [model.first, model.second], [tokens])
    assert torch.allclose(both, sum(hessians(model, [layer], [tokens]) for layer in (model.first, model.second)))
    grid = made.first.parametrizations.weight[-1]
    assert grid is made.second.parametrizations.weight[-1]
    assert not torch.equal(made.first.weight, grid(model.first.weight))


def test_gptq_tells_of_weights_that_are_not_finite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="the weights of layer '1' are not finite; train the model first"):
        GPTQ().apply(model, context(torch.randn(4, 8)))


def test_gptq_keeps_more_of_a_network_than_affine_at_the_same_grid(net, x):
    options = {"weight_bits": 3, "activation_bits": 0, "calibration": "mse"}
    with torch.no_grad():
        wanted = net(x)
        errors = [(s(**options).apply(net, context(x))(x) - wanted).norm() for s in (GPTQ, AffineStrategy)]
    assert errors[0] < 0.8 * errors[1]


# --- mixed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3.5, 5])
def test_mixed_keeps_to_its_mean_of_stored_bits(net, x, bits):
    model = Mixed(bits=bits).apply(net, context(x))
    weights = [m.parametrizations.weight for m in (model.first, model.grouped, model.hidden, model.last)]
    mean = sum(w[0].bits * w.original.numel() for w in weights) / sum(w.original.numel() for w in weights)
    assert bits - 0.5 < mean <= bits
    stored = [s for s in stored_tensors(trace(model, x[:1])) if s.tensor.dim() >= 2]
    # what a width of 2 holds may be but signs, which take 1 bit and a mask
    assert sum(s.bits().values for s in stored) <= bits * sum(s.elements for s in stored)


def test_mixed_keeps_to_its_mean_of_multiplied_bits(net, x):
    model = Mixed(bits=4, weigh="math").apply(net, context(x))
    layers = [layer for layer in score(model, x[:1]).layers if layer.module in ("first", "grouped", "hidden", "last")]
    assert len(layers) == 4
    mean = sum(max(layer.input_bits, layer.weight_bits) * layer.mults for layer in layers) / sum(
        layer.mults for layer in layers
    )
    assert mean <= 4.3  # weights that became zero are no longer multiplied


def test_bits_go_where_they_matter():
    """Against all choices: a steep table keeps its bits, a flat one gives them up."""
    tables = [{b: a * 4.0**-b for b in range(2, 9)} for a in (1.0, 100.0, 10.0)]
    weights = [10.0, 1.0, 4.0]
    found = allocate(tables, weights, 4.0)

    def loss(bits):
        return sum(table[b] for table, b in zip(tables, bits, strict=True))

    allowed = [
        bits
        for bits in itertools.product(range(2, 9), repeat=3)
        if sum(b * w for b, w in zip(bits, weights, strict=True)) <= 4.0 * sum(weights)
    ]
    assert tuple(found) in allowed
    assert loss(found) <= 1.1 * min(map(loss, allowed))
    assert found[1] > found[0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("affine", {"activation_bits": 1}),
        ("affine", {"granularity": "row"}),
        ("mixed", {"bits": 9}),
        ("mixed", {"fewest": 6, "bits": 5}),
        ("codebook", {"values": 1}),
        ("ternary", {"threshold": 0}),
    ],
)
def test_options_are_validated(name, options):
    with pytest.raises(ValidationError):
        strategy(name, **options)


@pytest.mark.parametrize("name", ["fixed-point", "affine", "gptq", "mixed"])
def test_no_training_data_is_said(name, net, x):
    given = context(x)
    empty = Context(given.example_input, [], 0, given.formulas)
    with pytest.raises(InputError, match="no training data"):
        strategy(name).apply(net, empty)


def test_torchao_says_that_it_is_missing(net, x, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match="pip install torchao"):
        plugins.lookup("quantizer", "torchao")().apply(net, context(x))


def test_brevitas_says_that_it_is_missing(net, x, monkeypatch):
    monkeypatch.setitem(sys.modules, "brevitas.nn", None)
    with pytest.raises(InputError, match="pip install brevitas"):
        plugins.lookup("quantizer", "brevitas")().apply(net, context(x))


@pytest.mark.parametrize("scheme", ["Int8WeightPerTensorFixedPointMSE", "ShiftedUint8WeightPerChannelFloat"])
@pytest.mark.parametrize("transposed", [False, True])
def test_brevitas_chooses_the_values(scheme, transposed):
    """As if Brevitas' own layer stood there."""
    layers = pytest.importorskip("brevitas.nn", exc_type=ImportError)
    torch.manual_seed(3)
    kind = "ConvTranspose2d" if transposed else "Conv2d"
    plain = getattr(nn, kind)(1, 4, 3, bias=False).eval()
    x = torch.randn(16, 1, 8, 8)
    model = strategy("brevitas", scheme=scheme, weight_bits=3, activation_bits=0).apply(plain, context(x))
    scheme = getattr(__import__("brevitas.quant").quant, scheme)
    theirs = getattr(layers, f"Quant{kind}")(1, 4, 3, bias=False, weight_quant=scheme, weight_bit_width=3).eval()
    theirs.weight.data.copy_(plain.weight)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))
    assert len(model.weight.unique()) <= 8 * 4


def test_brevitas_says_what_it_cannot_quantize(x):
    pytest.importorskip("brevitas.nn", exc_type=ImportError)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2)).eval()
    with pytest.raises(InputError, match=r"brevitas: Int8WeightPerChannelFloat cannot quantize ConvTranspose2d\(8, 6"):
        plugins.lookup("quantizer", "brevitas")().apply(model, context(x))


def test_torchao_groups_must_divide(net, x):
    with pytest.raises(InputError, match="group_size"):
        strategy("torchao", config="int4", group_size=24).apply(net, context(x))


@pytest.mark.parametrize(
    "declared", ["affine", "affine:0:0", "affine:0:255:zeros:x", "codebook:4", "affine:0:99999999"]
)
def test_an_unknown_quantizer_of_activations_is_refused(declared, net, x):
    with pytest.raises(OffGrid):
        of_activations(declared)
    packed = packing.pack(AffineStrategy().apply(net, context(x)), Residual(), x[:1])
    packed.structure.activations["first"] = declared
    with pytest.raises(InputError, match="the weights do not fit"):
        packing.unpack(packed, Residual())
