"""EigenDamage against brute force: per-example gradients by autograd, one after the other, and curvlinops' EKFAC."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.strategy import Context
from micronet_eval.submission import Architecture, build
from micronet_eval.training import Training, train
from micronet_plugins.chains import LOST, Chain, called_apart, chains, refitted
from micronet_plugins.eigendamage import RATES, Cut, EigenDamage, draw, missing
from micronet_plugins.kronecker import Batch, Factors, batches_of, eigenbases, factors

EXAMPLE = torch.zeros(1, 1, 8, 8)


def context(examples=48, batch_size=16, seed=0, shape=(1, 8, 8)):
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.rand(examples, *shape, generator=generator), torch.arange(examples) % 10)
    return Context(torch.zeros(1, *shape), DataLoader(data, batch_size), seed, plugins.formulas())


def wide_resnet(**options):
    torch.manual_seed(0)
    options = {"depth": 10, "width": 1, "classes": 10, "channels": 1, **options}
    model = build(Architecture(name="wide-resnet", **options), "here", weights=True)
    return model.eval()


def convolutional():
    """Kernels, a stride, a dilation, padding and biases, and a linear layer, in double precision."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 4, (3, 2), dilation=2, padding=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 6, 1),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()


def gradients(model, batch):
    """Each example's gradients by parameter, one backward pass an example."""
    for x, y in zip(batch.inputs, batch.labels, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        yield {name: p.grad.clone() for name, p in model.named_parameters()}


def size(model):
    return sum(p.numel() for p in model.parameters())


def directions(model):
    return [rank for chain in chains(model) for rank in chain.ranks]


def logits(model, x):
    with torch.no_grad():
        return model(x)


@pytest.fixture(scope="module")
def measured():
    """A network, one batch, its eigenbases, and all gradients of the same batch by brute force."""
    model = convolutional()
    model(torch.zeros(1, 2, 7, 7).double())
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(37, 2, 7, 7, generator=generator).double()  # three chunks, the last one smaller
    batch = Batch(inputs, torch.arange(37) % 3, 1.0)
    layers = {chain.core_path: chain.core_has_extra_input for chain in chains(model)}
    frozen = copy.deepcopy(model).requires_grad_(False)
    found = factors(frozen, layers, [batch])
    bases = eigenbases(frozen, layers, found, [batch], 1e-30)
    return model, batch, layers, found, bases, list(gradients(model, batch))


# --- factors and eigenvalues ------------------------------------------------------------------------------------------


def test_the_bias_is_an_extra_input_where_nothing_pads(measured):
    assert measured[2] == {"0": False, "2": False, "4": True, "6": True}


@pytest.mark.parametrize("path", ["0", "2", "4", "6"])
def test_corrected_eigenvalues_are_the_mean_squared_gradient_in_the_eigenbasis(measured, path):
    _, _, layers, _, bases, all_gradients = measured
    basis, total = bases[path], 0
    for gradient in all_gradients:
        weight = gradient[f"{path}.weight"]
        weight = weight.reshape(*weight.shape[:2], -1)
        if layers[path]:
            weight = torch.cat([weight, gradient[f"{path}.bias"][:, None, None]], 1)
        for k in range(weight.shape[2]):
            weight[:, :, k] = basis.outputs.T @ weight[:, :, k] @ basis.inputs
        total = total + weight**2
    torch.testing.assert_close(basis.eigenvalues, total / len(all_gradients), rtol=1e-6, atol=1e-14)


def test_factors_of_one_example_give_the_exact_fisher_matrix(measured):
    """For one example and one position, the gradient is g a^T, and its second moment is the Kronecker product."""
    model, batch, layers, _, _, all_gradients = measured
    one = Batch(batch.inputs[:1], batch.labels[:1], 1.0)
    found = factors(copy.deepcopy(model).requires_grad_(False), layers, [one])["6"]
    gradient = torch.cat([all_gradients[0]["6.weight"], all_gradients[0]["6.bias"][:, None]], 1).reshape(-1)
    torch.testing.assert_close(torch.kron(found.outputs, found.inputs), torch.outer(gradient, gradient))


def test_true_fisher_of_a_linear_layer_is_the_expectation_over_its_own_output():
    """One input many times: A is exact and G must come near diag(p) - p p^T, the covariance of a sampled label."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.tensor([[0.5, -1.0, 2.0]])
    data = [(x.repeat(20_000, 1), torch.zeros(20_000, dtype=torch.int64))]
    batches = batches_of(data, 0.9, True, seed=0)
    found = factors(copy.deepcopy(model).requires_grad_(False), {"0": True}, batches)["0"]
    p = logits(model, x).softmax(1)[0]
    torch.testing.assert_close(found.outputs, torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0)
    extended = torch.tensor([0.5, -1.0, 2.0, 1.0])
    torch.testing.assert_close(found.inputs, torch.outer(extended, extended), rtol=1e-4, atol=0)


class Positions(nn.Module):
    """A layer at 7 positions of an example, which it sees together, or as 7 examples of a larger batch."""

    def __init__(self, layer, merges):
        super().__init__()
        self.layer, self.head, self.merges = layer, nn.Linear(8, 5), merges

    def forward(self, x):
        is_image = isinstance(self.layer, nn.Conv2d)
        if self.merges:
            y = self.layer(x.flatten(0, 1)[(..., None, None) if is_image else ...]).view(len(x), 7, 8)
        else:
            y = self.layer(x.mT[..., None])[..., 0].mT if is_image else self.layer(x)
        return self.head(y.relu().mean(1))


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 1)])
def test_what_a_model_merges_into_the_batch_are_positions_of_one_example(layer):
    apart, merges = Positions(layer, False).requires_grad_(False), Positions(layer, True).requires_grad_(False)
    merges.head = apart.head
    generator, layers = torch.Generator().manual_seed(0), {"layer": True}
    batch = Batch(torch.randn(18, 7, 6, generator=generator), torch.arange(18) % 5, 1.0)
    of_apart, of_merges = (factors(model, layers, [batch]) for model in (apart, merges))
    torch.testing.assert_close(of_apart["layer"].inputs, of_merges["layer"].inputs)
    torch.testing.assert_close(of_apart["layer"].outputs, of_merges["layer"].outputs)
    values = [eigenbases(model, layers, of_apart, [batch], 1e-3)["layer"].eigenvalues for model in (apart, merges)]
    torch.testing.assert_close(*values)


def test_moving_average_over_batches():
    data = [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))] * 3
    weights = [batch.weight for batch in batches_of(data, 0.9, False, seed=0)]
    assert weights == pytest.approx([0.81 / 2.71, 0.9 / 2.71, 1 / 2.71])


def test_damping_is_split_between_the_factors():
    """A = 2 I, G = 8 I: the product 16 I is damped by 1 % of 16 through 10 % of 2 and of 8, plus their product."""
    damped = Factors(2 * torch.eye(3), 8 * torch.eye(2)).damped(0.01)
    torch.testing.assert_close(damped.inputs, 2.2 * torch.eye(3))
    torch.testing.assert_close(damped.outputs, 8.8 * torch.eye(2))


def test_factors_and_eigenvalues_are_those_of_curvlinops(measured):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what torch calls deprecated
        curvlinops = pytest.importorskip("curvlinops")
    model, batch, layers, found, bases, _ = measured
    options = {"fisher_type": "empirical", "check_deterministic": False}
    for path in layers:
        parameters = [p for name, p in model.named_parameters() if name.startswith(f"{path}.")]
        operator = curvlinops.EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            parameters if layers[path] else parameters[:1],
            [(batch.inputs, batch.labels)],
            separate_weight_and_bias=not layers[path],
            **options,
        )
        operator.compute_kronecker_factors()
        # It averages over positions in A, and sums in G; here it is the other way round. It sums over examples in G.
        a, g = operator._input_covariances[path], operator._gradient_covariances[path]
        core = model.get_submodule(path)
        kernel = core.weight[0, 0].numel()
        positions = 1 if isinstance(core, nn.Linear) else None
        if kernel > 1:  # the mean over kernel positions
            side = len(a) // kernel
            a = torch.einsum("ikjk->ij", a.reshape(side, kernel, side, kernel)) / kernel
        ours = found[path]
        if positions is None:
            positions = model[: int(path) + 1](batch.inputs)[0, 0].numel()
        torch.testing.assert_close(ours.inputs / positions, a)
        torch.testing.assert_close(ours.outputs * positions, g / len(batch.inputs))
        if kernel > 1:
            continue  # its eigenvectors mix inputs and kernel positions
        operator.compute_eigenvalue_correction()
        theirs = operator._corrected_eigenvalues[path]
        values = bases[path].eigenvalues[..., 0]
        # Both orders of eigenvectors are by eigenvalue; where eigenvalues are zero the vectors are arbitrary.
        torch.testing.assert_close(values.sum(), theirs.sum() / len(batch.inputs))
        rank = min(8, *values.shape)
        torch.testing.assert_close(values[-rank:, -3:], theirs[-rank:, -3:] / len(batch.inputs))


# --- saliency, ranks, refit -------------------------------------------------------------------------------------------


def test_saliencies_are_the_loss_that_a_direction_costs_by_the_quadratic_model(measured):
    """Of a 1x1 convolution: removing a row or a column costs half its gradients' mean square times weight^2."""
    model, _, _, _, bases, all_gradients = measured
    chain = next(c for c in chains(model) if c.path == "4")
    columns, rows = Cut(chain, bases["4"], 0.5).saliencies
    weight = torch.cat([model[4].weight.detach().flatten(1), model[4].bias.detach()[:, None]], 1)
    rotated = bases["4"].outputs.T @ weight @ bases["4"].inputs
    fisher = torch.zeros(rotated.shape, dtype=torch.float64)
    for gradient in all_gradients:
        both = torch.cat([gradient["4.weight"].flatten(1), gradient["4.bias"][:, None]], 1)
        fisher += (bases["4"].outputs.T @ both @ bases["4"].inputs) ** 2 / len(all_gradients)
    for j in range(5):
        assert float(columns[j]) == pytest.approx(sum(float(fisher[i, j] * rotated[i, j] ** 2) / 2 for i in range(6)))
    for i in range(6):
        assert float(rows[i]) == pytest.approx(sum(float(fisher[i, j] * rotated[i, j] ** 2) / 2 for j in range(5)))


def test_refitting_loses_less_than_dropping_and_reaches_the_best_of_a_matrix():
    generator = torch.Generator().manual_seed(0)
    weight, scales = (
        torch.randn(8, 6, 1, generator=generator).double(),
        tuple(torch.rand(n, generator=generator).double() for n in (6, 8)),
    )
    metric = scales[1][:, None] * scales[0][None, :]

    def loss(approximation):
        return float((metric * (weight[..., 0] - approximation) ** 2).sum())

    kept = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])
    basis_in, core, basis_out = refitted(weight, scales, kept)
    torch.testing.assert_close(basis_in.T @ basis_in, torch.eye(3).double())
    torch.testing.assert_close(basis_out.T @ basis_out, torch.eye(3).double())
    dropped = torch.zeros(8, 6).double()
    dropped[kept[1][:, None], kept[0]] = weight[kept[1][:, None], kept[0], 0]
    # Eckart and Young: no matrix of rank 3 is nearer than the squares of the singular values that are left.
    best = float((torch.linalg.svdvals(metric.sqrt() * weight[..., 0])[3:] ** 2).sum())
    assert best - 1e-12 <= loss(basis_out @ core[..., 0] @ basis_in.T) < loss(dropped)


def test_full_ranks_compute_the_same():
    """Rotating in and out without removing anything, old rotations merged into new ones."""
    for model, x in ((wide_resnet(), torch.rand(4, 1, 8, 8)), (convolutional(), torch.rand(4, 2, 7, 7).double())):
        model(x)
        expected = logits(model, x)
        for chain in chains(model):
            out, inputs = chain.ranks[1], chain.ranks[0]
            q_in, q_out = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (inputs, out))
            core = torch.einsum("or,oik,is->rsk", q_out, chain.weight(), q_in)
            parent, _, name = chain.path.rpartition(".")
            setattr(model.get_submodule(parent), name, chain.rebuilt(q_in.T, core, q_out))
        torch.testing.assert_close(logits(model, x), expected)
        three = chains(model)
        assert {len(chain.layers) for chain in three} == {3}
        assert all(chain.form == (True, True) for chain in three)


# --- the pruner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_parameters_fall_to_the_ratio_and_the_input_model_stays(ratio, fisher):
    model = wide_resnet()
    before = copy.deepcopy(model.state_dict())
    made = EigenDamage(ratio=ratio, fisher=fisher, limit=0.9).apply(model, context())
    assert 0.97 * (1 - ratio) < size(made) / size(model) <= 1 - ratio
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = EigenDamage(ratio=ratio, fisher=fisher, limit=0.9).apply(model, context())
    assert torch.equal(logits(made, EXAMPLE), logits(again, EXAMPLE))
    assert all(p.requires_grad for p in made.parameters())


def test_no_layer_loses_more_than_the_limit():
    model = wide_resnet()
    made = EigenDamage(ratio=0.9, limit=0.4).apply(model, context())
    for before, after in zip(chains(model), chains(made), strict=True):
        assert after.parameters >= 0.6 * before.parameters
    assert size(made) > 0.1 * size(model)


def test_a_round_stops_at_the_parameters_that_are_wanted():
    """Rounds of 30 % would go from 77,562 over 54,293 to 38,005; with 45,000 for an end the second one stops there."""
    model = wide_resnet()
    once = EigenDamage(ratio=0.3, parameters=45_000, limit=0.9).apply(model, context())
    assert size(once) == size(EigenDamage(ratio=0.3, limit=0.9).apply(model, context())) > 45_000
    twice = EigenDamage(ratio=0.3, parameters=45_000, limit=0.9).apply(once, context())
    assert 0.97 * 45_000 < size(twice) <= 45_000
    again = EigenDamage(ratio=0.3, parameters=45_000, limit=0.9).apply(twice, context())
    assert size(again) == size(twice)


def test_the_same_basis_has_the_same_signs_on_every_machine():
    """The largest entry of each direction is positive; eigenvectors alone may come with either sign."""
    model = wide_resnet()
    made = EigenDamage(ratio=0.7, limit=0.9).apply(model, context())
    rotations = [rotation for chain in chains(made) for rotation in chain.rotations()]
    assert sum(rotation is not None for rotation in rotations) > 5
    for chain in chains(made):
        rotate_in, rotate_out = chain.rotations()
        for basis in ([] if rotate_in is None else [rotate_in.T]) + ([] if rotate_out is None else [rotate_out]):
            largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
            assert bool((largest > 0).all())


def test_rounds_merge_their_rotations_and_pack_to_the_same_logits(tmp_path):
    model = wide_resnet()
    for _ in range(3):
        model = EigenDamage(ratio=0.3).apply(model, context())
    assert {len(chain.layers) for chain in chains(model)} == {1, 2, 3}
    assert not any(isinstance(part, nn.Sequential) for c in chains(model) for part in c.layers)
    model = merged(model, EXAMPLE)
    packing.write(packing.pack(model, wide_resnet(), EXAMPLE), tmp_path / "weights")
    unpacked = packing.unpack(packing.read(tmp_path / "weights"), merged(wide_resnet(), EXAMPLE))
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(logits(unpacked, x), logits(model, x))
    # The file does not say how its chains came to be: their form does, and a further round merges into them.
    further = EigenDamage(ratio=0.3).apply(unpacked, context())
    assert {len(chain.layers) for chain in chains(further)} <= {1, 2, 3}


def test_a_sequential_of_the_architecture_keeps_its_layers_over_rounds():
    # One linear layer would be cheaper than two with a wide middle, but has no place in a file.
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(12, 100, bias=False), nn.Linear(100, 12))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), pair, nn.ReLU(), nn.Linear(12, 10))
    pruned = EigenDamage(ratio=0.5, limit=0.9).apply(model, context())
    (cut,) = (chain for chain in chains(pruned) if chain.path == "3")
    assert cut.parameters < size(pair)
    assert cut.cheapest((1, 1))[1] == cut.form and not cut.is_one_place


class OneByOne(nn.Sequential):
    """Calls the layers of its first Sequential itself, with a ReLU behind each."""

    def forward(self, x):
        for layer in self[0]:
            x = layer(x.flatten(1)).relu()
        return self[1](x)


def test_layers_that_the_forward_calls_one_by_one_are_no_chain():
    torch.manual_seed(0)
    first, second, head = nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False), nn.Linear(32, 10)
    apart = OneByOne(nn.Sequential(first, second), head)
    assert called_apart(apart, EXAMPLE) == ["0"]
    assert called_apart(nn.Sequential(nn.Flatten(), *apart), EXAMPLE) == []
    # A rotation does not go through a ReLU: the layers are cut as they are where no Sequential holds them.
    plain, x = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head), torch.rand(4, 1, 8, 8)
    made, expected = (EigenDamage(ratio=0.1).apply(model, context()) for model in (apart, plain))
    assert size(made) < size(apart)
    assert torch.equal(logits(made, x), logits(expected, x))


@pytest.mark.parametrize(
    "layer", [nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 3)), nn.Conv2d(16, 16, 3)]
)
def test_a_side_without_a_rotation_keeps_all_its_directions(layer):
    """A 3x3 kernel behind a rotation alone costs the same with fewer output directions: it loses none."""
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 9, 10)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(8, 16, 5, 5, generator=generator), torch.arange(8), 1.0)
    chain = chains(model)[0]
    layers = {chain.core_path: False}
    basis = eigenbases(model, layers, factors(model, layers, [batch]), [batch], 1e-3)[chain.core_path]
    cut, ranks = Cut(chain, basis, 0.5), (4, 15)
    assert chain.cheapest(ranks)[1] == (True, False)
    _, core = cut.build(ranks)
    assert int(torch.linalg.matrix_rank(core.weight.flatten(1))) == 16
    assert cut.lost(ranks)[0] > 0 == cut.lost(ranks)[1]
    assert {side for _, side in cut.order} == ({0, 1} if chain.is_one_place else {0})


def test_grouped_masked_shared_and_unused_layers_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
            self.twice, self.unused = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(9, 9)
            self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.other.weight = self.tied.weight
            self.masked = nn.Linear(8, 10)
            nn.utils.parametrize.register_parametrization(self.masked, "weight", nn.Identity())

        def forward(self, x):
            x = self.twice(self.twice(self.grouped(self.plain(x)).relu_()).relu_())
            return self.masked(self.other(self.tied(x.mean((2, 3)))))

    torch.manual_seed(0)
    model = Net()
    made = EigenDamage(ratio=0.9, limit=0.9).apply(model, context())
    assert size(made.plain) < size(model.plain)
    for name in ("grouped", "twice", "unused", "tied", "other", "masked"):
        assert all(map(torch.equal, model.get_submodule(name).parameters(), made.get_submodule(name).parameters()))


def test_layers_called_by_keyword_are_cut_like_others():
    class ByName(nn.Sequential):
        def forward(self, x):
            for layer in self[:-1]:
                x = layer(x)
            return self[-1](input=x)

    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
    x = torch.rand(4, 1, 8, 8)
    by_position, by_name = (EigenDamage().apply(kind(*layers), context()) for kind in (nn.Sequential, ByName))
    assert torch.equal(logits(by_name, x), logits(by_position, x))


def test_a_model_without_classes_is_one_clear_message():
    with pytest.raises(InputError, match=r"output is \(examples, classes\)"):
        EigenDamage().apply(nn.Sequential(nn.Conv2d(1, 4, 3)), context())


def test_values_that_overflow_are_one_clear_message():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(model[0].weight, 1e25)
    with pytest.raises(InputError, match=r"are too large to square.* estimate batch norm's statistics"):
        EigenDamage().apply(model, context())


def test_no_data_are_one_clear_message():
    with pytest.raises(InputError, match="no training data to calibrate on; give at least one batch"):
        EigenDamage().apply(wide_resnet(), Context(EXAMPLE, [], 0, plugins.formulas()))


def test_frozen_layers_stay_frozen():
    model = wide_resnet().requires_grad_(False)
    model[-1].requires_grad_(True)
    pruned = EigenDamage(ratio=0.5).apply(model, context())
    grown = EigenDamage(back_ratio=0.5).apply(pruned, context())
    for made in (pruned, grown):
        trained = {name.partition(".")[0] for name, p in made.named_parameters() if p.requires_grad}
        assert trained == {str(len(model) - 1)} and isinstance(made[-1], nn.Sequential)


def test_a_label_without_an_output_is_one_clear_message():
    with pytest.raises(InputError, match="label 9 has no output; the model has 3"):
        EigenDamage(fisher="empirical").apply(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), context())


def test_a_model_with_nothing_to_cut_is_one_clear_message():
    depthwise, shared = nn.Sequential(nn.Conv2d(10, 10, 8, groups=10), nn.Flatten()), nn.Linear(64, 64)
    for model, shape in ((depthwise, (10, 8, 8)), (nn.Sequential(nn.Flatten(), shared, shared), (1, 8, 8))):
        with pytest.raises(InputError, match="no linear layer that can be cut"):
            EigenDamage().apply(model, context(shape=shape))


@pytest.mark.parametrize("dead", ["1.bias", "3.weight"])
def test_layers_that_no_gradient_reaches_are_cut_as_well_as_others(dead):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    # All units of the first layer are off; or the last layer but one hands no gradient back.
    nn.init.constant_(model.get_parameter(dead), -100.0 if dead == "1.bias" else 0.0)
    pruned = EigenDamage(ratio=0.5, limit=0.9).apply(model, context())
    assert size(pruned) <= 0.5 * size(model)
    assert all(bool(p.isfinite().all()) for p in pruned.parameters())


# --- annealing --------------------------------------------------------------------------------------------------------


def test_annealing_gives_back_a_share_of_the_parameters_and_changes_nothing_yet():
    model = wide_resnet()
    pruned = EigenDamage(ratio=0.6, limit=0.9).apply(model, context())
    grown = EigenDamage(back_ratio=0.25).apply(pruned, context())
    assert size(grown) - size(pruned) == pytest.approx(0.25 * (size(model) - size(pruned)), rel=0.01)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(logits(grown, x), logits(pruned, x))


def test_annealing_looks_back_at_the_last_round_alone():
    model, sizes = wide_resnet(), [size(wide_resnet())]
    for _ in range(5):
        for options in ({"ratio": 0.3}, {"back_ratio": 0.25}):
            model = EigenDamage(**options).apply(model, context())
            sizes.append(size(model))
    # 30 % go, and a quarter of them comes back: 22.5 % fewer in two rounds.
    for before, after in itertools.pairwise(sizes[::2]):
        assert after / before == pytest.approx(0.775, abs=0.01)


def test_annealing_after_a_round_that_removed_nothing_gives_nothing_back():
    pruned = EigenDamage(ratio=0.6, limit=0.9).apply(wide_resnet(), context())
    same = EigenDamage(ratio=0.6, parameters=size(pruned)).apply(pruned, context())
    assert size(EigenDamage(back_ratio=1.0).apply(same, context())) == size(same) == size(pruned)


def test_two_annealing_rounds_give_back_the_share_twice():
    pruned = EigenDamage(ratio=0.6, limit=0.9).apply(wide_resnet(), context())
    removed = size(wide_resnet()) - size(pruned)
    once = EigenDamage(back_ratio=0.1).apply(pruned, context())
    twice = EigenDamage(back_ratio=0.1).apply(once, context())
    assert [size(once) - size(pruned), size(twice) - size(once)] == pytest.approx([0.1 * removed] * 2, rel=0.03)


def test_new_directions_learn_ten_times_faster():
    pruned = EigenDamage(ratio=0.6, limit=0.9).apply(wide_resnet(), context())
    grown = EigenDamage(back_ratio=0.25).apply(pruned, context())
    assert any(hasattr(module, RATES) for module in grown.modules())
    plain = copy.deepcopy(grown)
    for module in plain.modules():
        vars(module).pop(RATES, None)
    start = copy.deepcopy(grown.state_dict())
    one_step = Training(epochs=1, learning_rate=1e-3, batch_size=48)
    for model in (grown, plain):
        train(model, one_step, context(), lambda line: None)
    boosted = 0
    for path, module in grown.named_modules():
        for name, factor in getattr(module, RATES, {}).items():
            key = f"{path}.{name}"
            step, usual = grown.state_dict()[key] - start[key], plain.state_dict()[key] - start[key]
            torch.testing.assert_close(step, factor * usual, atol=1e-6, rtol=1e-3)
            assert set(factor.unique().tolist()) <= {1.0, 10.0}
            boosted += int((factor == 10).sum())
    new = sum(directions(grown)) - sum(directions(pruned))
    assert boosted > new
    # Another round makes them directions like all others.
    later = EigenDamage(ratio=0.01).apply(grown, context())
    assert not any(hasattr(module, RATES) for module in later.modules())


def test_draws_follow_the_scores_up_to_what_is_missing():
    def chain(inputs, outputs, rank_in, rank_out):
        layers = nn.Conv2d(inputs, rank_in, 1, bias=False), nn.Conv2d(rank_in, rank_out, 3, bias=False)
        return Chain("", (*layers, nn.Conv2d(rank_out, outputs, 1, bias=False)), 1, is_one_place=True)

    wide, nearly_whole = chain(400, 400, 20, 20), chain(10, 400, 8, 20)
    assert missing(nearly_whole)[0] == 2
    generator = torch.Generator().manual_seed(0)
    new = draw([wide, nearly_whole], [(3.0, 1.0), (9.0, 0.0)], 60_000, generator)
    assert new[1] == (2, 0)
    rank_in, rank_out = (old + more for old, more in zip(wide.ranks, new[0], strict=True))
    left = 60_000 - 2 * (10 + 9 * 20) - (400 * sum(new[0]) + 9 * (rank_in * rank_out - 20 * 20))
    assert 0 <= left < 400 + 9 * min(rank_in, rank_out)
    assert new[0][0] / sum(new[0]) == pytest.approx(0.75, abs=0.1)
    # Where nothing was lost, all sides are as likely.
    fair = draw([wide], [(0.0, 0.0)], 60_000, generator)[0]
    assert fair[0] / sum(fair) == pytest.approx(0.5, abs=0.1)


def test_what_layers_lost_is_pooled_over_rounds():
    model = EigenDamage(ratio=0.5, limit=0.9).apply(wide_resnet(), context())
    twice = EigenDamage(ratio=0.3, pool_momentum=0.5).apply(model, context())
    forgetful = EigenDamage(ratio=0.3, pool_momentum=0.0).apply(model, context())
    seen = 0
    for path, module in twice.named_modules():
        if hasattr(module, LOST) and hasattr(model.get_submodule(path), LOST):
            old, now = (getattr(m.get_submodule(path), LOST) for m in (model, forgetful))
            if old != now:
                seen += 1
                assert getattr(module, LOST) == pytest.approx([(a + b) / 2 for a, b in zip(old, now, strict=True)])
    assert seen


def test_annealing_before_pruning_is_one_clear_message():
    with pytest.raises(InputError, match="prune first"):
        EigenDamage(back_ratio=0.25).apply(wide_resnet(), context())
