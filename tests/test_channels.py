"""Pruners of channels: what is coupled, how much goes, and each importance against a reference worked out apart."""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import evaluate, packing, plugins
from micronet_eval.conditional import Conditional, taking
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.recipe import compress
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.structure import without_weights
from micronet_eval.submission import Architecture, build
from micronet_eval.trace import trace
from micronet_eval.training import Training, train
from micronet_plugins.channels import ChannelMagnitude, Taylor, distances, first_order, group_norm, norm_scales
from micronet_plugins.coupling import dependency_graph, groups_of, removed
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.magnitude import Magnitude
from micronet_plugins.scheduled import loss_of

NAMES = ("magnitude", "taylor", "bn-scale", "fpgm", "hrank", "random")


class Residual(nn.Module):
    """Two blocks on one stream; the first layer and both second ones write it, so they are coupled."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Concatenating(nn.Module):
    """Two branches of different widths side by side, read by a convolution, and flattened into a linear layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 20, 1)
        self.norm = nn.BatchNorm2d(32)
        self.join = nn.Conv2d(32, 10, 3, stride=2, padding=1)
        self.head, self.aside = nn.Linear(10 * 4 * 4, 5), nn.Linear(20, 5)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        joined = self.join(torch.relu(self.norm(torch.cat([left, right], 1)))).relu()
        return self.head(joined.flatten(1)) + self.aside(right.amax((2, 3)))


class Grouped(nn.Module):
    """Convolutions in groups, a depthwise one, and a group norm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
            nn.Conv2d(32, 24, 1), nn.GroupNorm(3, 24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def linear():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30), nn.LayerNorm(30), nn.ReLU(),
        nn.Linear(30, 5),
    )  # fmt: skip


NETS = {"residual": Residual, "concatenating": Concatenating, "grouped": Grouped, "linear": linear}


def inputs(examples=32):
    return torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def context(example=None, seed=5):
    x = inputs()
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 5), 8)
    return Context(torch.zeros(1, 3, 8, 8) if example is None else example, loader, seed, plugins.formulas())


def net(name):
    """Random weights, and batch norms with statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()(inputs())
    return model.eval()


def groups(model, example=None):
    example = torch.zeros(1, 3, 8, 8) if example is None else example
    graph = dependency_graph(model, example)
    return graph, groups_of(graph, model, example)


def size(model):
    return sum(p.numel() for p in model.parameters())


def strategy(name, **options):
    return plugins.lookup("pruner", name)(**options)


# --- what is coupled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_removing_what_nobody_reads_changes_no_output(name):
    """The weights that read a third of the units are zero; without those units the logits are the same."""
    model = net(name)
    graph, found = groups(model)
    mixing = (nn.LayerNorm, nn.GroupNorm)  # what is removed was part of their mean
    lost = [
        [] if any(isinstance(s.layer, mixing) for s in group.sides) else list(range(0, len(group.units) - 1, 3))
        for group in found
    ]
    for group, units in zip(found, lost, strict=True):
        for side in group.sides:
            if not side.is_output:
                read = side.layer.weight.detach()
                for channel in side.channels[torch.isin(side.units, torch.tensor(units))].tolist():
                    if getattr(side.layer, "groups", 1) == 1:
                        read[:, channel] = 0
                    else:
                        own, outputs = channel // read.shape[1], len(read) // side.layer.groups
                        read[own * outputs : (own + 1) * outputs, channel % read.shape[1]] = 0
    with torch.no_grad():
        before, parameters = model(inputs()), size(model)
    expected = removed(zip(found, lost, strict=True))
    for group, units in zip(found, lost, strict=True):
        if units:
            graph.get_pruning_group(group.root, group.prune, sorted(c for u in units for c in group.units[u])).prune()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), before, atol=1e-5, rtol=1e-4)
    assert parameters - size(model) == expected > 0.1 * parameters


def test_what_is_coupled_in_a_residual_net():
    model = net("residual")
    paths = {layer: path for path, layer in model.named_modules()}
    found = [{(paths[s.layer], s.is_output) for s in group.sides} for group in groups(model)[1]]
    stream = {("stem.0", True), ("stem.1", True), ("blocks.0.3", True), ("blocks.1.3", True)}
    stream |= {("blocks.0.0", False), ("blocks.1.0", False), ("head", False)}
    inside = [{(f"blocks.{i}.0", True), (f"blocks.{i}.1", True), (f"blocks.{i}.3", False)} for i in range(2)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, [stream, *inside]))


def test_channels_at_one_position_of_all_groups_are_one_unit():
    model = net("grouped")
    written = {side.layer: group for group in groups(model)[1] for side in group.sides if side.is_output}
    into_groups, out_of_groups, normed = (written[model.layers[i]] for i in (0, 3, 8))
    assert into_groups.units == [[i, i + 6, i + 12, i + 18] for i in range(6)]  # 4 groups of 6 inputs
    assert out_of_groups.units == [[i, i + 8, i + 16, i + 24] for i in range(8)]
    assert normed.units == [[i, i + 8, i + 16] for i in range(8)]  # 3 groups of the norm


@pytest.mark.parametrize("name", NETS)
def test_the_outputs_are_no_candidates(name):
    model = net(name)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    assert not any(side.layer is last and side.is_output for group in groups(model)[1] for side in group.sides)


@pytest.mark.parametrize("name", ["magnitude", "torch-pruning"])
def test_channels_in_front_of_a_layer_that_cannot_be_packed_stay(name):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)
    architecture = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    made = strategy(name, ratio=0.2).apply(architecture, context())
    assert made[0].weight.shape == (8, 3, 3, 3)
    assert made[5].weight.shape[0] < 8 or made[3].weight.shape[0] < 8
    packing.pack(made, architecture, context().example_input)


def test_outputs_of_a_fully_convolutional_net_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [group.root for group in groups(model)[1]] == [model[0]]


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", NETS)
def test_a_pruner_reaches_its_ratio_and_the_model_packs(name, kind):
    model = net(kind)
    state, x = copy.deepcopy(model.state_dict()), inputs()
    ratio = 0.3 if (name, kind) == ("bn-scale", "concatenating") else 0.5
    made = strategy(name, ratio=ratio).apply(model, context())
    assert ratio - 0.1 < 1 - size(made) / size(model) <= ratio  # the steps of such small nets are large
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    torch.rand(3)
    again = strategy(name, ratio=ratio).apply(model, context()).state_dict()
    assert all(torch.equal(again[key], value) for key, value in made.state_dict().items())
    with torch.no_grad():
        assert made(x).shape == (32, 5)
    final = merged(made, x[:1])
    with without_weights():
        architecture = NETS[kind]()
    unpacked = packing.unpack(packing.pack(final, architecture, x[:1]), NETS[kind]())
    with torch.no_grad():
        assert torch.equal(unpacked.eval()(x), final(x))
    before, after = (account(trace(m, x[:1]), plugins.formulas()) for m in (merged(model, x[:1]), unpacked))
    assert after.math.mults < before.math.mults
    assert after.storage.bits < (1.15 - ratio) * before.storage.bits


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_ratio_is_reached_from_the_kept_side(ratio):
    model = build(Architecture(name="wide-resnet", depth=10, width=1, classes=10, channels=1), "here", weights=True)
    c = context(torch.zeros(1, 1, 8, 8))
    made = strategy("magnitude", ratio=ratio).apply(model, c)
    assert ratio - 0.02 < 1 - size(made) / size(model) <= ratio


def test_no_layer_loses_more_than_the_limit():
    model = net("residual")
    with torch.no_grad():
        model.blocks[0][0].weight.mul_(1e-3)
        model.blocks[0][3].weight.mul_(1e-3)
    made = strategy("taylor", ratio=0.4, limit=0.5).apply(model, context())
    assert made.blocks[0][0].out_channels == 12
    assert min(made.blocks[1][0].out_channels / 24, made.stem[0].out_channels / 16) >= 0.5


def test_layers_to_keep():
    made = strategy("magnitude", ratio=0.3).apply(net("concatenating"), context())
    assert made.left.out_channels < 12
    made = strategy("magnitude", ratio=0.2, keep=("stem.0",)).apply(net("residual"), context())
    assert (made.stem[0].out_channels, made.blocks[0][3].out_channels) == (16, 16)
    assert made.blocks[0][0].out_channels < 24


def test_another_seed_draws_other_channels():
    one, two = (strategy("random").apply(net("linear"), context(seed=seed)) for seed in (1, 2))
    assert [p.shape for p in one.parameters()] != [p.shape for p in two.parameters()] or not torch.equal(
        one[1].weight, two[1].weight
    )


def test_both_ways_of_a_conditional_model_run():
    class Hasty(Conditional):
        paths = ("exit", "full")

        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU())
            self.exit, self.rest, self.head = nn.Linear(32, 5), nn.Linear(32, 64), nn.Linear(64, 5)

        def run(self, x):
            x = self.trunk(x)
            answer = self.exit(x)
            if self.takes("exit", answer.softmax(1).amax(1) >= 0.4):
                return answer
            return self.head(self.rest(x).relu())

    made = strategy("magnitude", ratio=0.5).apply(Hasty().eval(), context())
    width = made.trunk[1].out_features
    assert width < 32
    assert made.exit.in_features == made.rest.in_features == width
    assert (made.exit.out_features, made.head.out_features) == (5, 5)
    for path in ("exit", "full"):
        with taking(made, path):
            assert made(inputs()).shape == (32, 5)


def test_masks_stay_on_what_is_left():
    sparse = Magnitude(sparsity=0.6).apply(net("residual"), context())
    made = strategy("magnitude", ratio=0.3).apply(sparse, context())
    convolutions = [layer for layer in made.modules() if isinstance(layer, nn.Conv2d)]
    zeros = [layer.weight == 0 for layer in convolutions]
    assert sum(int(zero.sum()) for zero in zeros) > 0.3 * sum(zero.numel() for zero in zeros)
    train(made, Training(epochs=1, learning_rate=0.01), context(), lambda line: None)
    assert all(torch.equal(layer.weight == 0, zero) for layer, zero in zip(convolutions, zeros, strict=True))


def test_a_recipe_with_a_pruner_of_channels(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'task = "digits"\ndata = "noise"\n[submission]\nname = "x"\nauthors = ["x"]\n[architecture]\n'
        'name = "wide-resnet"\ndepth = 10\nwidth = 1\nclasses = 10\nchannels = 1\n'
        '[[stages]]\npruner = "taylor"\nratio = 0.5\nbatches = 2\n[[stages]]\nsparsifier = "magnitude"\n'
        '[[stages]]\nmerge = "batch-norm"\n[[stages]]\nquantizer = "fixed-point"\n'
    )
    compress(tmp_path / "recipe.toml", tmp_path / "made")
    report = evaluate(tmp_path / "made")
    assert 0.45 * 77_562 < report.storage.parameters < 0.51 * 77_562  # merging adds a bias for each batch norm


# --- importances ------------------------------------------------------------------------------------------------------


def two_layers():
    """Three hidden units with weights that one can add up."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0], [1.0, -1.0]]))
        model[3].weight.copy_(torch.tensor([[0.0, 2.0, -1.0], [12.0, -2.0, 1.0]]))
    return model


def test_the_norm_of_all_weights_that_go_with_a_unit():
    (group,) = groups(two_layers(), torch.zeros(1, 2))[1]
    torch.testing.assert_close(group_norm(group, 1), torch.tensor([19.0, 5.0, 4.0]).double())
    torch.testing.assert_close(group_norm(group, 2), torch.tensor([13.0, 3.0, 2.0]).double())


def test_the_sum_of_distances_to_all_filters():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1))
    (group,) = groups(model, torch.zeros(1, 1, 4, 4))[1]
    torch.testing.assert_close(distances(group), torch.tensor([4.0, 3.0, 5.0]).double())


def test_first_order_is_the_derivative_by_a_gate_where_channels_are_read():
    model, x = net("grouped"), inputs(8)
    labels = torch.arange(8) % 5
    _, found = groups(model)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    for group in found:
        (reader,) = [side for side in group.sides if not side.is_output]
        gate = torch.ones(len(group.units), requires_grad=True)
        scale = lambda module, args, g=gate, s=reader: (  # noqa: E731
            args[0] * torch.ones(s.total).index_put((s.channels,), g[s.units]).view(1, -1, *[1] * (args[0].dim() - 2)),
        )
        hook = reader.layer.register_forward_pre_hook(scale)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), gate)
        hook.remove()
        torch.testing.assert_close(first_order(group), slope.double(), atol=1e-6, rtol=1e-4)


def test_taylor_is_the_root_of_sums_of_squares_over_batches_by_its_norm_over_the_group():
    model, c = net("linear"), context()
    _, found = groups(model)
    expected = [0.0] * len(found)
    for x, labels in list(c.training_data)[:2]:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        expected = [e + first_order(group) ** 2 for e, group in zip(expected, found, strict=True)]
    got = strategy("taylor", batches=2).importance(model, found, c)
    assert all(torch.allclose(a, b**0.5 / b.sum() ** 0.5) for a, b in zip(got, expected, strict=True))


def test_bn_scale_removes_the_smallest_scales_and_leaves_groups_without_norm():
    model = net("residual")
    with torch.no_grad():
        model.blocks[0][1].weight[:8] = torch.tensor([0.01, -0.02, 0.03, 0.01, 0.02, -0.03, 0.01, 0.02])
    made = strategy("bn-scale", ratio=0.13).apply(model, context())
    kept = model.blocks[0][1].weight[8:]
    assert torch.equal(made.blocks[0][1].weight[-16:], kept)
    (group,) = groups(two_layers(), torch.zeros(1, 2))[1]
    assert norm_scales(group) is None
    with pytest.raises(InputError, match="no channels that this pruner can rank"):
        strategy("bn-scale").apply(two_layers(), context(torch.zeros(1, 2)))


def test_hrank_counts_the_rank_of_maps():
    """The first layer copies its inputs, whose maps have ranks 1, 3 and 2."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
    maps = torch.zeros(4, 3, 8, 8)
    maps[:, 0] = 1.0
    maps[:, 1, range(3), range(3)] = 1.0
    maps[:, 2, range(2), range(2)] = 1.0
    loader = DataLoader(TensorDataset(maps, torch.zeros(4)), 2)
    c = Context(maps[:1], loader, 0, plugins.formulas())
    (score,) = strategy("hrank", batches=2).importance(model, groups(model, maps[:1])[1], c)
    torch.testing.assert_close(score, torch.tensor([0.5, 1.5, 1.0]).double())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_ratio_beyond_the_limit_is_refused():
    with pytest.raises(
        InputError, match=r"parameters shall go, but only [\d,]+ are in channels that may; lower 'ratio'"
    ):
        strategy("magnitude", ratio=0.9, limit=0.2).apply(net("residual"), context())


def test_sizes_in_the_forward_are_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(192, 12), nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.head(self.second(x).view(-1, 12))

    with pytest.raises(InputError, match=r"sizes written into it; name the layers .* 'keep'.*"):
        strategy("magnitude").apply(Fixed(), context())
    made = strategy("magnitude", ratio=0.3, keep=("second",)).apply(Fixed(), context())
    assert (made.second.out_features, made.first.out_features < 12) == (12, True)


def test_channels_of_the_input_stay():
    # A depthwise convolution that reads the input has as many channels as the input.
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip
    assert [group.root for group in groups(model)[1]] == [model[2]]
    for name in ("random", "hrank"):
        assert size(strategy(name).apply(model, context())) < size(model)


def test_a_layer_at_several_places_keeps_its_channels():
    shared = nn.Linear(20, 20)
    first = nn.Linear(192, 20)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), shared, shared, nn.Linear(20, 16), nn.Linear(16, 5))
    assert [group.root for group in groups(model)[1]] == [model[5]]


class Tied(nn.Module):
    """Two layers with one weight, and a table that a function reads, too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in ((192, 20), (20, 20), (20, 20), (20, 16), (16, 5)))
        self.layers[2].weight = self.layers[1].weight
        self.read = nn.Linear(5, 12)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.read(x) @ self.read.weight


def test_layers_that_share_a_weight_keep_their_channels():
    model = Tied().eval()
    assert [group.root for group in groups(model)[1]] == [model.layers[3]]
    made = strategy("magnitude", ratio=0.05).apply(model, context())
    assert size(made) < size(model)
    assert made.layers[1].weight is made.layers[2].weight
    packing.pack(made, Tied(), context().example_input)


class Gated(nn.Module):
    """Two halves of one layer's channels, multiplied."""

    def __init__(self):
        super().__init__()
        self.gates, self.last, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        left, right = self.gates(x).chunk(2, 1)
        return self.head(self.last(left * right.sigmoid()).relu().mean((2, 3)))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_halves_that_meet_again_go_together(ratio):
    model = Gated().eval()
    gates = next(group for group in groups(model)[1] if group.root is model.gates)
    assert gates.units == [[i, i + 16] for i in range(16)]
    made = strategy("magnitude", ratio=ratio).apply(model, context())
    assert ratio - 0.1 < 1 - size(made) / size(model) <= ratio
    assert made.gates.out_channels == 2 * made.last.in_channels


class Moving(nn.Module):
    """A layer whose channels come to other places before they are read, between two whose channels do not."""

    def __init__(self, move):
        super().__init__()
        self.first, self.moved, self.last = nn.Linear(192, 12), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.head, self.move = nn.Linear(12, 5), move

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.head(self.last(self.move(self.moved(x).relu())).relu())


MOVES = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "shuffle": lambda x: x.view(-1, 2, x.shape[1] // 2).transpose(1, 2).flatten(1),
    "heads": lambda x: x * x.view(len(x), 2, -1).softmax(-1).flatten(1),
    "none": lambda x: x * x.softmax(1),
}


@pytest.mark.parametrize("move", MOVES)
def test_channels_that_the_forward_gives_other_places_stay(move):
    torch.manual_seed(0)
    model = Moving(MOVES[move]).eval()
    state = copy.deepcopy(model.state_dict())
    roots = {group.root for group in groups(model, torch.zeros(2, 3, 8, 8))[1]}
    assert roots == {model.first, model.last} | ({model.moved} if move == "none" else set())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_hrank_sees_layers_that_are_called_by_keyword():
    class ByName(nn.Sequential):
        def forward(self, x):
            x = self[2](input=self[1](input=self[0](x)).relu()).relu()
            return self[3](input=x.mean((2, 3)))

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
    model = ByName(*layers).eval()
    assert size(strategy("hrank", ratio=0.2).apply(model, context())) < size(model)


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="no convolution and no linear layer"):
        strategy("magnitude").apply(nn.Sequential(nn.Flatten(), nn.ReLU()), context())


def test_a_quantized_model_is_refused():
    quantized = FixedPointStrategy().apply(net("residual"), context())
    with pytest.raises(InputError, match="put the pruner before the quantizer"):
        strategy("magnitude").apply(quantized, context())


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    """When the pruner is made: a recipe that trains in front of it does not begin."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for name in ("magnitude", "torch-pruning"):
        with pytest.raises(
            InputError, match=r"needs torch-pruning; install it with: pip install 'micronet-eval\[prune\]'"
        ):
            strategy(name)


def test_a_model_that_torch_pruning_cannot_follow_is_told_with_other_pruners():
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    with pytest.raises(InputError, match="torch-pruning cannot follow the model; low-rank and eigendamage prune"):
        strategy("magnitude").apply(model, context(torch.zeros(1, 3, 32, 32)))


@pytest.mark.parametrize("name", ["taylor", "hrank", "torch-pruning"])
def test_missing_training_data_are_told(name):
    c = context()
    none = DataLoader(TensorDataset(inputs(0), torch.zeros(0).long()), 8, sampler=[])
    with pytest.raises(InputError, match=f"{name}: there is no training data to"):
        options = {"importance": "taylor"} if name == "torch-pruning" else {}
        strategy(name, **options).apply(net("linear"), Context(c.example_input, none, 0, c.formulas))


def test_maps_that_are_not_finite_are_told():
    model = net("residual")
    model.stem[1].running_mean[0] = torch.nan
    with pytest.raises(InputError, match="hrank: feature maps are not finite; train the model first"):
        strategy("hrank").apply(model, context())


@pytest.mark.parametrize("name", ["taylor", "torch-pruning"])
def test_language_models_are_pruned_by_the_loss_of_all_words(name):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inside, self.softmax = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)

        def forward(self, tokens):
            return self.softmax(self.inside(self.table(tokens)).relu()).log_softmax(-1), None

    torch.manual_seed(0)
    model, tokens = Words().eval(), torch.randint(0, 20, (16, 6))
    c = Context(tokens[:1], DataLoader(TensorDataset(tokens, tokens), 8), 0, plugins.formulas())
    options = {"importance": "taylor"} if name == "torch-pruning" else {}
    made = strategy(name, ratio=0.2, **options).apply(model, c)
    assert made.inside.out_features < 16
    assert made.softmax.out_features == 20


def test_labels_without_an_output_are_told():
    c = context()
    wrong = DataLoader(TensorDataset(inputs(8), torch.full((8,), 9)), 8)
    with pytest.raises(InputError, match="label 9 has no output; the model has 5"):
        strategy("taylor").apply(net("residual"), Context(c.example_input, wrong, 0, c.formulas))


# --- torch-pruning's own pruner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"importance": "taylor", "across": "network"}, {"importance": "lamp"}])
def test_torch_pruning_removes_what_its_users_would_see_removed(options):
    import torch_pruning as tp

    model, c = net("residual"), context()
    found = plugins.lookup("pruner", "torch-pruning")(ratio=0.25, batches=1, **options).apply(model, c)
    theirs = copy.deepcopy(model)
    kinds = {"taylor": tp.importance.GroupTaylorImportance, "lamp": tp.importance.LAMPImportance}
    importance = kinds.get(options.get("importance"), tp.importance.GroupMagnitudeImportance)()
    pruner = tp.pruner.BasePruner(
        theirs, c.example_input, importance, pruning_ratio=0.25, max_pruning_ratio=0.9,
        global_pruning="across" in options, ignored_layers=[theirs.head],
    )  # fmt: skip
    examples, labels = next(iter(c.training_data))
    nn.functional.cross_entropy(theirs(examples), labels).backward()
    pruner.step()
    assert [tuple(p.shape) for p in found.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), theirs.parameters(), strict=True))
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in model.parameters())
    whole = merged(found, c.example_input)
    packed = packing.pack(whole, Residual(), c.example_input)
    assert torch.equal(packing.unpack(packed, Residual()).eval()(examples), whole(examples))


def test_torch_pruning_says_what_it_cannot_prune():
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    raises = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), *ends)
    breaks = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 6, 1), *ends)
    for model in (raises, breaks):
        with pytest.raises(
            InputError, match="torch-pruning cannot prune the model; magnitude leaves out what it cannot"
        ):
            plugins.lookup("pruner", "torch-pruning")().apply(model, context())


def test_torch_pruning_comes_before_sparsifiers():
    sparse = Magnitude(sparsity=0.5).apply(net("residual"), context())
    with pytest.raises(InputError, match="put it before sparsifiers"):
        plugins.lookup("pruner", "torch-pruning")().apply(sparse, context())


def test_taylor_prunes_what_labels_each_place():
    """Classes are the second dimension, though there are as many as columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    x, labels = torch.randn(4, 3, 8, 8), torch.randint(8, (4, 8, 8))
    expected = nn.functional.cross_entropy(model(x), labels)
    torch.testing.assert_close(loss_of(model, x, labels), expected)
    with pytest.raises(InputError, match="labels of 4x8 do not fit outputs of 4x8x8x8"):
        loss_of(model, x, labels[:, 0])
    made = Taylor(ratio=0.3).apply(model, Context(x[:1], [(x, labels)], 0, plugins.formulas()))
    assert made(x).shape == (4, 8, 8, 8)
    assert made[0].out_channels < 16


def test_a_forward_that_draws_numbers_can_be_pruned():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.second(x + 0.1 * torch.randn_like(x))

    torch.manual_seed(0)
    x = torch.randn(2, 8)
    made = ChannelMagnitude(ratio=0.3).apply(Noisy().eval(), Context(x[:1], [], 0, plugins.formulas()))
    assert made.first.out_features < 16


def test_a_name_in_keep_that_no_layer_has_is_told():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    context = Context(torch.randn(2, 8), [], 0, plugins.formulas())
    with pytest.raises(InputError, match="option 'keep': no layer's path matches 'stem'"):
        ChannelMagnitude(keep=("stem",)).apply(model, context)
