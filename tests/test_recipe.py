"""Recipes and the bundled strategies: what each stage does, and what it leaves alone."""

import copy
import math
import re
import warnings
from dataclasses import replace as changed
from decimal import Decimal

import pytest
import torch
from conftest import SMALL
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import evaluate, packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.recipe import Statistics, compress, estimate_statistics
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask, quantizers_of
from micronet_eval.submission import Architecture, build, read_manifest
from micronet_eval.trace import trace
from micronet_eval.training import Training, train
from micronet_plugins.eigendamage import EigenDamage
from micronet_plugins.fixed_point import FixedPointStrategy, exponent_for
from micronet_plugins.low_rank import LowRank, factorizations
from micronet_plugins.magnitude import Magnitude

EXAMPLE = torch.zeros(1, 1, 8, 8)
HEAD = 'task = "{task}"\nseed = {seed}' + SMALL
ALL_STAGES = [
    "train = { epochs = 1, learning_rate = 0.01 }",
    'pruner = "low-rank"\nparameters = 40_000',
    "statistics = { batches = 2 }",
    'sparsifier = "magnitude"\nsparsity = 0.6',
    "train = { epochs = 1, learning_rate = 0.003 }",
    'merge = "batch-norm"',
    'quantizer = "fixed-point"\nweight_bits = 6',
    "train = { epochs = 1, learning_rate = 0.0003 }",
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Runs a recipe of these stages; gives the folder and the lines of its log."""

    def make(*stages, task="digits", seed=1, more=""):
        folder, log = tmp_path_factory.mktemp("recipe"), []
        text = HEAD.format(task=task, seed=seed) + more + "".join(f"[[stages]]\n{stage}\n" for stage in stages)
        (folder / "recipe.toml").write_text(text)
        compress(folder / "recipe.toml", folder / "made", log=log.append)
        return folder / "made", log

    return make


@pytest.fixture(scope="module")
def all_stages(make):
    return make(*ALL_STAGES)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wide_resnet(**options):
    torch.manual_seed(0)
    options = {"depth": 10, "width": 1, "classes": 10, "channels": 1, **options}
    return build(Architecture(name="wide-resnet", **options), "here", weights=True)


def context(examples=64):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples, 1, 8, 8, generator=generator)
    labels = (inputs.mean((1, 2, 3)) > 0).long()
    return Context(EXAMPLE, DataLoader(TensorDataset(inputs, labels), 16), 5, plugins.formulas())


def weights(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


# --- the whole recipe -------------------------------------------------------------------------------------------------


def test_the_same_recipe_makes_the_same_files(make, all_stages):
    folder, log = all_stages
    torch.rand(7)  # whatever was drawn before
    again, log_again = make(*ALL_STAGES)
    assert contents(again) == contents(folder)
    assert set(contents(folder)) == {"submission.toml", "weights.safetensors", "recipe.toml"}
    assert log == log_again


def test_another_seed_makes_other_weights(make):
    one, _ = make('merge = "batch-norm"', seed=1)
    two, _ = make('merge = "batch-norm"', seed=2)
    assert contents(one)["weights.safetensors"] != contents(two)["weights.safetensors"]


def test_the_recipe_lies_beside_the_weights_and_makes_them_again(all_stages, tmp_path):
    folder, _ = all_stages
    compress(folder / "recipe.toml", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_steps_are_the_stages_and_the_last_has_the_counts_of_the_packed_model(all_stages):
    folder, log = all_stages
    steps = read_manifest(folder).provenance.steps
    assert [step.stage for step in steps] == [
        "architecture", "train", "pruner low-rank", "statistics", "sparsifier magnitude", "train", "merge batch-norm",
        "quantizer fixed-point", "train",
    ]  # fmt: skip
    report = evaluate(folder)
    assert steps[-1].parameters == report.storage.parameters
    assert steps[-1].nonzeros == report.storage.nonzeros
    assert (steps[-1].mults, steps[-1].adds) == (report.math.mults, report.math.adds)
    lines = [line for line in log if not line.startswith("  epoch")]
    assert lines == [
        f"{step.stage}: {step.parameters:,} parameters, {step.nonzeros:,} non-zero, "
        f"{step.mults + step.adds:,} operations"
        for step in steps
    ]


def test_each_stage_changes_what_it_is_for(all_stages):
    _, trained, pruned, statistics, sparse, retrained, merged, quantized, last = read_manifest(
        all_stages[0]
    ).provenance.steps
    assert pruned.parameters < 40_000 < trained.parameters
    assert statistics.parameters == sparse.parameters == pruned.parameters
    assert sparse.nonzeros < 0.42 * statistics.nonzeros
    assert sparse.mults < statistics.mults
    assert retrained.nonzeros == sparse.nonzeros
    assert merged.parameters < retrained.parameters
    assert merged.mults < retrained.mults
    assert quantized.parameters == last.parameters == merged.parameters
    assert quantized.nonzeros <= merged.nonzeros


def test_the_counts_of_a_step_are_those_of_the_model_as_it_is(make):
    """Unquantized and with batch norm: neither counted as 16 bit nor merged."""
    folder, _ = make("statistics = { batches = 1 }")
    architecture, statistics = read_manifest(folder).provenance.steps
    model = wide_resnet()
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert architecture.parameters == sum(w.numel() for w in weights(model)) + 10 + 2 * norms
    assert architecture.nonzeros == architecture.parameters - norms  # every shift is zero
    assert statistics.nonzeros == statistics.parameters == architecture.parameters
    counted = account(trace(model, EXAMPLE), plugins.formulas())
    assert counted.freebie
    assert (architecture.mults, architecture.adds) == (counted.math.mults, counted.math.adds)


def test_the_manifest_says_what_the_recipe_says(make):
    more = "[submission.claims]\nstorage = 344_500\nscore = 0.0467\nquality = 0.80\n"
    folder, _ = make('merge = "batch-norm"', more=more)
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.task, manifest.authors) == ("small", "digits", ["test"])
    assert (manifest.architecture.name, manifest.architecture.options["depth"]) == ("wide-resnet", 10)
    assert manifest.provenance.data == "task"
    claims = manifest.claims
    assert (claims.storage, claims.math, claims.score) == (344_500, None, Decimal("0.0467"))
    assert claims.quality.as_tuple() == Decimal("0.80").as_tuple()  # the digits as printed are the tolerance


def test_an_architecture_with_a_fraction_as_option():
    small = build(Architecture(name="mobilenet-v2", width=Decimal("0.5"), classes=10), "here")
    full = build(Architecture(name="mobilenet-v2", width=1, classes=10), "here")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in full.parameters())


def test_fractions_in_lists_are_floats_too():
    options = Architecture(name="x", widths=[Decimal("1.5"), 2], more={"a": [Decimal("0.5")]}).options
    assert options == {"widths": [1.5, 2], "more": {"a": [0.5]}}
    assert isinstance(options["widths"][0], float)


@pytest.mark.parametrize(("share", "held_out"), [("0.0002", "none"), ("0.9999", "1,348")])
def test_a_share_that_leaves_nothing_on_one_side_is_told(make, share, held_out):
    with pytest.raises(InputError, match=f"field 'validation': {share} of 1,348 examples holds out {held_out}"):
        make("train = { epochs = 1, learning_rate = 0.01 }", seed=f"1\nvalidation = {share}")


def test_low_rank_leaves_layers_that_share_a_weight_or_run_twice():
    torch.manual_seed(0)
    twice, tied = nn.Linear(16, 16), [nn.Linear(16, 16), nn.Linear(16, 16)]
    tied[1].weight = tied[0].weight
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), twice, nn.ReLU(), twice, *tied, nn.Linear(16, 10))
    total = sum(p.numel() for p in model.parameters())
    made = LowRank(parameters=total - 300).apply(model.eval(), context())
    assert sum(p.numel() for p in made.parameters()) <= total - 300
    assert made[3] is made[5] and type(made[3]) is nn.Linear and made[6].weight is made[7].weight


def test_test_data_are_never_touched(make, register):
    digits = plugins.lookup("task", "digits")

    def train_only(root, split):
        assert split == "train", "test data were asked for"
        return digits.dataset(root, split)

    register(tasks={"train-only": changed(digits, name="train-only", dataset=train_only)})
    folder, _ = make(*ALL_STAGES, task="train-only")
    with pytest.raises(AssertionError, match="test data were asked for"):
        evaluate(folder)


def test_noise_needs_no_data(make, register):
    def nothing(root, split):
        raise AssertionError("data were asked for")

    register(tasks={"no-data": changed(plugins.lookup("task", "digits"), name="no-data", dataset=nothing)})
    text = 'quantizer = "fixed-point"'
    folder, _ = make("statistics = { batches = 1 }", text, task='no-data"\ndata = "noise')
    assert read_manifest(folder).provenance.data == "noise"


# --- training and statistics ------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(make):
    _, log = make("train = { epochs = 3, learning_rate = 0.01 }")
    losses = [float(found[1]) for line in log if (found := re.search(r"epoch \d of 3: loss ([\d.]+)", line))]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.5 * losses[0]


def test_training_returns_the_model_in_evaluation_mode_with_other_weights():
    model = wide_resnet()
    before = copy.deepcopy(model)
    after = train(model, Training(epochs=1, learning_rate=0.01), context(), lambda line: None)
    assert not any(m.training for m in after.modules())
    assert all(not torch.equal(a, b) for a, b in zip(weights(after), weights(before), strict=True))


def test_weight_decay_shrinks_weights():
    trained = [
        train(wide_resnet(), Training(epochs=1, learning_rate=0.01, weight_decay=decay), context(), lambda line: None)
        for decay in (0.0, 20.0)
    ]
    free, decayed = (sum(float(w.square().sum()) for w in weights(model)) for model in trained)
    assert decayed < 0.9 * free


def test_statistics_are_plain_averages_over_training_data():
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(99)
    model[0].num_batches_tracked.fill_(99)
    batches = list(context().calibration(3))
    estimate_statistics(model, Statistics(batches=3), context())
    mean, variance = (sum(f(b) for b in batches) / 3 for f in (torch.mean, torch.var))
    torch.testing.assert_close(model[0].running_mean, mean.reshape(1))
    torch.testing.assert_close(model[0].running_var, variance.reshape(1))
    assert model[0].momentum == 0.1
    assert not model[0].training


def test_masked_weights_stay_zero_while_training():
    model = Magnitude(sparsity=0.7).apply(wide_resnet(), context())
    before = [w == 0 for w in weights(model)]
    train(model, Training(epochs=2, learning_rate=0.05, weight_decay=0.1), context(), lambda line: None)
    after = weights(model)
    assert sum(int(zero.sum()) for zero in before) > 0.65 * sum(w.numel() for w in after)
    assert all(bool((w[zero] == 0).all()) for w, zero in zip(after, before, strict=True))
    assert all(bool((w[~zero] != 0).all()) for w, zero in zip(after, before, strict=True))


# --- strategies leave their input alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [LowRank(parameters=30_000), Magnitude(sparsity=0.5), FixedPointStrategy(weight_bits=4, activation_bits=5)],
    ids=lambda strategy: strategy.kind,
)
@pytest.mark.parametrize("sparse", [False, True], ids=["plain", "sparse"])
def test_a_strategy_leaves_its_input_alone(strategy, sparse):
    model = wide_resnet()
    if sparse:
        model = Magnitude(sparsity=0.3).apply(model, context())
    before, listing = copy.deepcopy(model.state_dict()), repr(model)
    made = strategy.apply(model, context())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert repr(model) == listing
    assert made is not model
    made_state = made.state_dict()
    assert any(name not in made_state or not torch.equal(made_state[name], before[name]) for name in before)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(after[name], before[name]) for name in before), "the two share a parameter"


# --- low-rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [5_000, 20_000, 60_000])
def test_low_rank_keeps_to_the_parameters(parameters):
    model = LowRank(parameters=parameters).apply(wide_resnet(), context())
    assert 0.9 * parameters < sum(p.numel() for p in model.parameters()) <= parameters


@pytest.mark.parametrize("macs", [400_000, 200_000])
def test_low_rank_keeps_to_parameters_and_macs(macs):
    free = LowRank(parameters=40_000).apply(wide_resnet(), context())
    bound = LowRank(parameters=40_000, macs=macs).apply(wide_resnet(), context())
    counts = [account(trace(model, EXAMPLE), plugins.formulas()).math.macs for model in (free, bound)]
    assert counts[0] > macs
    assert 0.8 * macs < counts[1] <= macs
    assert sum(p.numel() for p in bound.parameters()) <= 40_000


def test_low_rank_counts_the_macs_of_layers_that_stay_and_of_layers_that_run_twice():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[3](self[2](self[1](self[1](self[0](x)))))

    torch.manual_seed(0)
    grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    model = Twice(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 3, padding=1), grouped, nn.Conv2d(16, 16, 3))
    assert account(trace(model, EXAMPLE), plugins.formulas()).math.macs == 64 * (16 + 2 * 2304 + 576) + 36 * 2304
    made = LowRank(parameters=3_000, macs=150_000).apply(model, context())
    assert 0.8 * 150_000 < account(trace(made, EXAMPLE), plugins.formulas()).math.macs <= 150_000
    with pytest.raises(
        InputError, match=r"30,000 MACs cannot be reached .*; 36,864 of the model's are in operations that"
    ):
        LowRank(parameters=3_000, macs=30_000).apply(model, context())


def test_low_rank_with_room_for_all_changes_nothing():
    model = wide_resnet()
    made = LowRank(parameters=10**6).apply(model, context())
    assert repr(made) == repr(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(made), weights(model), strict=True))


def test_low_rank_comes_before_the_quantizer():
    for quantizer in (FixedPointStrategy(), FixedPointStrategy(weights_only=True)):
        quantized = quantizer.apply(wide_resnet(), context())
        with pytest.raises(InputError, match="put the pruner before the quantizer"):
            LowRank(parameters=40_000).apply(quantized, context())


def test_low_rank_leaves_layers_that_are_to_be_kept():
    made = LowRank(parameters=30_000, keep=("3.0.conv1",)).apply(wide_resnet(), context())
    assert isinstance(made.get_submodule("3.0.conv1"), nn.Conv2d)
    assert isinstance(made.get_submodule("3.0.conv2"), nn.Sequential)
    without = LowRank(parameters=30_000).apply(wide_resnet(), context())
    assert isinstance(without.get_submodule("3.0.conv1"), nn.Sequential)


def test_what_low_rank_keeps_may_be_a_pattern_and_has_to_match_a_layer():
    made = LowRank(parameters=30_000, keep=("1.*", "2.0.conv?")).apply(wide_resnet(), context())
    factored = {path for path, layer in made.named_modules() if type(layer) is nn.Sequential and "." in path}
    assert factored and not any(path.startswith(("1.", "2.0.conv")) for path in factored)
    with pytest.raises(InputError, match=r"option 'keep': no layer's path matches '3\.0'"):
        LowRank(parameters=30_000, keep=("3.0",)).apply(wide_resnet(), context())


def test_low_rank_leaves_frozen_layers_frozen():
    model = wide_resnet().requires_grad_(False)
    model[-1].requires_grad_(True)
    made = LowRank(parameters=20_000).apply(model, context())
    assert isinstance(made[-1], nn.Sequential) and isinstance(made.get_submodule("3.0.conv1"), nn.Sequential)
    assert {name.partition(".")[0] for name, p in made.named_parameters() if p.requires_grad} == {str(len(made) - 1)}


def linear(change):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    change(model[1])
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(1, 8, 3), "nor is a layer that is the whole model"),
        (linear(lambda layer: nn.init.constant_(layer.weight, math.nan)), "weights of layer '1' are NaN or infinite"),
        (linear(nn.utils.parametrizations.weight_norm), "layer '1' is made by _WeightNorm; .*remove_parametrizations"),
    ],
)
def test_what_low_rank_cannot_factor_is_one_clear_message(model, message):
    with pytest.raises(InputError, match=message):
        LowRank(parameters=40).apply(model, context())


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_hooks_that_make_weights_are_one_clear_message(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        model = nn.Sequential(nn.Flatten(), getattr(nn.utils, name)(nn.Linear(64, 10)))
    for strategy in (LowRank(parameters=100), EigenDamage(), Magnitude()):
        with pytest.raises(
            InputError, match=rf"layer '1' has {name}; remove it first: torch\.nn\.utils\.remove_{name}"
        ):
            strategy.apply(model, context())


class Reading(nn.Sequential):
    """Reads an attribute of its first layer that no Sequential has."""

    def forward(self, x):
        return super().forward(x.flatten(1).to(self[0].weight.dtype))


@pytest.mark.parametrize(
    ("pruner", "mend"),
    [(LowRank(parameters=1_500), "name it in 'keep', or take it"), (EigenDamage(limit=0.9), "take it")],
)
def test_a_forward_that_reads_an_attribute_of_a_replaced_layer_is_one_clear_message(pruner, mend):
    torch.manual_seed(0)
    model = Reading(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(InputError, match=f"reads 'weight' of layer '0' that became several; {mend} from the input"):
        pruner.apply(model, context())


LAYERS = [
    pytest.param(nn.Conv2d(6, 9, 3, stride=2, padding=1), (2, 6, 8, 8), id="strided"),
    pytest.param(nn.Conv2d(9, 6, 3, dilation=2, padding=2, bias=False), (2, 9, 8, 8), id="dilated"),
    pytest.param(nn.Conv2d(6, 9, (1, 3), padding=(0, 1)), (2, 6, 8, 8), id="1x3"),
    pytest.param(nn.Conv2d(6, 9, 1, stride=2), (2, 6, 8, 8), id="1x1 wider"),
    pytest.param(nn.Conv2d(9, 6, 1, bias=False), (2, 9, 8, 8), id="1x1 narrower"),
    pytest.param(nn.Linear(6, 9), (2, 6), id="linear wider"),
    pytest.param(nn.Linear(9, 6, bias=False), (2, 9), id="linear narrower"),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_full_rank_reproduces_the_layer_and_more_rank_is_better(layer, shape):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    (factorization,) = factorizations(nn.Sequential(layer), trace(nn.Sequential(layer), inputs).ops)

    def error(*ranks):
        made = factorization.build(ranks)
        outputs = inputs
        for part in made:
            outputs = part(outputs)
        used = sum(p.numel() for p in made.parameters()) - (0 if layer.bias is None else layer.bias.numel())
        assert used == sum(factorization.factors(ranks))
        assert outputs.shape == layer(inputs).shape
        return float((outputs - layer(inputs)).detach().norm() / layer(inputs).detach().norm())

    inputs_and_outputs = layer.weight.shape[1], layer.weight.shape[0]
    full = factorization.full
    assert full == (inputs_and_outputs if layer.weight[0, 0].numel() > 1 else (6,))
    errors = [error(*(max(1, round(share * rank)) for rank in full)) for share in (1.0, 0.7, 0.4, 0.1)]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2] < errors[3]


def test_the_macs_of_a_factorization_are_those_that_are_counted():
    model = nn.Sequential(nn.Conv2d(6, 9, 3, stride=2, padding=1))
    (factorization,) = factorizations(model, trace(model, torch.zeros(1, 6, 8, 8)).ops)
    made = factorization.build((2, 3))
    counted = account(trace(made, torch.zeros(1, 6, 8, 8)), plugins.formulas())
    assert factorization.macs((2, 3)) == counted.math.macs == 64 * 6 * 2 + 16 * (9 * 2 * 3 + 3 * 9)


# --- magnitude --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.777, 0.9])
def test_magnitude_zeros_exactly_the_smallest_of_all(sparsity):
    model = wide_resnet()
    made = weights(Magnitude(sparsity=sparsity, limit=0.999).apply(model, context()))
    every = torch.cat([w.flatten() for w in weights(model)])
    zeroed = torch.cat([w.flatten() for w in made]) == 0
    assert int(zeroed.sum()) == round(sparsity * every.numel())
    assert every[zeroed].abs().max() <= every[~zeroed].abs().min()
    assert all(torch.equal(new[new != 0], old[new != 0]) for new, old in zip(made, weights(model), strict=True))


def test_magnitude_keeps_the_limit_and_the_sum():
    model = wide_resnet()
    with torch.no_grad():
        model.get_submodule("1.0.conv1").weight.mul_(1e-3)  # would be lost altogether
    made = weights(Magnitude(sparsity=0.5, limit=0.6).apply(model, context()))
    zeros = [int((w == 0).sum()) for w in made]
    assert all(count <= 0.6 * w.numel() for count, w in zip(zeros, made, strict=True))
    assert max(count / w.numel() for count, w in zip(zeros, made, strict=True)) > 0.59
    assert sum(zeros) == round(0.5 * sum(w.numel() for w in made))


@pytest.mark.parametrize("scope", ["layer", "erk", "global", "lamp"])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_no_layer_loses_more_than_the_limit(name, scope):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 10)).eval()
    made = plugins.lookup("sparsifier", name)(sparsity=0.95, scope=scope).apply(model, context())
    assert all(int((w == 0).sum()) <= 0.95 * w.numel() for w in weights(made))


def test_a_limit_below_the_sparsity_is_the_sparsity():
    made = weights(Magnitude(sparsity=0.9, limit=0.5).apply(wide_resnet(), context()))
    assert [int((w == 0).sum()) for w in made] == [int(0.5 * w.numel()) for w in made]


def test_magnitude_twice_keeps_the_zeros_of_before():
    once = Magnitude(sparsity=0.5).apply(wide_resnet(), context())
    twice = Magnitude(sparsity=0.7).apply(once, context())
    assert all(bool((new[old == 0] == 0).all()) for new, old in zip(weights(twice), weights(once), strict=True))
    assert sum(int((w == 0).sum()) for w in weights(twice)) == round(0.7 * sum(w.numel() for w in weights(twice)))
    assert all(len(m) == 1 for m in twice.modules() if isinstance(m, nn.ModuleList) and isinstance(m[0], Mask))


# --- fixed-point ------------------------------------------------------------------------------------------------------


def test_fixed_point_gives_every_weight_and_every_factor_its_bits():
    made = FixedPointStrategy(weight_bits=5, activation_bits=7).apply(wide_resnet(), context())
    assert {quantizer.bits for quantizer in quantizers_of(made).values()} == {7}
    layers = account(trace(made, EXAMPLE), plugins.formulas()).layers
    assert all(layer.input_bits <= 7 for layer in layers if layer.mults)
    assert {layer.weight_bits for layer in layers if layer.op in ("aten.convolution", "aten.addmm")} == {5}
    assert all(w.unique().numel() <= 2**5 for w in weights(made))


def test_calibration_looks_at_training_data():
    exponents = []
    for scale in (1.0, 1024.0):
        loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8) * scale, torch.zeros(8)), 8)
        made = FixedPointStrategy().apply(wide_resnet(), changed(context(), training_data=loader))
        exponents.append(int(next(iter(quantizers_of(made).values())).exponent))
    assert 9 <= exponents[1] - exponents[0] <= 11


@pytest.mark.parametrize(("bound", "bits", "exponent"), [(127, 8, 0), (128, 8, 1), (1, 2, 0), (0.5, 2, -1), (0, 8, 0)])
def test_the_smallest_exponent_that_fits(bound, bits, exponent):
    assert exponent_for(bound, bits) == exponent


def test_more_bits_are_closer_to_the_unquantized_model():
    model, inputs = wide_resnet(), next(context().calibration(1))
    wanted = model(inputs)
    options = {"weight_sigmas": 4, "activation_sigmas": 6}
    made = [FixedPointStrategy(weight_bits=b, activation_bits=b, **options) for b in (4, 8, 16)]
    differences = [strategy.apply(model, context())(inputs) - wanted for strategy in made]
    errors = [float(difference.detach().norm() / wanted.detach().norm()) for difference in differences]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-2


def test_what_is_packed_is_what_was_made(all_stages):
    folder, _ = all_stages
    architecture = read_manifest(folder).architecture
    model = packing.unpack(packing.read(folder / "weights.safetensors"), build(architecture, folder))
    assert {q.bits for q in quantizers_of(model).values()} == {8}
    assert all(w.unique().numel() <= 2**6 for w in weights(model))
    assert evaluate(folder).quality.measured > 0.3  # three epochs of training are not lost
