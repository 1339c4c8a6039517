"""Sparsifiers: each against scores, densities and least squares worked out apart; all of them pack and stay."""

import copy
import math
from dataclasses import replace as changed

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from micronet_eval import evaluate, packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.recipe import compress
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask
from micronet_eval.trace import trace
from micronet_eval.training import Training, train
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.magnitude import Magnitude, erk_densities, lamp_scores, positions
from micronet_plugins.patterns import Block, NofM, block_norms
from micronet_plugins.scheduled import Gradual, Movement, watch
from micronet_plugins.second_order import OBS, Wanda, damped, refitted, sweep
from micronet_plugins.weights import by_weight, dot_products, grouped, second_moments, ungrouped

NAMES = ("magnitude", "random", "n-m", "block", "wanda", "obs", "gradual", "movement")
OPTIONS = {"gradual": {"epochs": 2}, "movement": {"epochs": 2}, "block": {"rows": 2, "columns": 4}}


class Net(nn.Module):
    """Every kind of layer that is sparsified: convolutions, in groups, transposed, 1d and 3d, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.deep = nn.Conv3d(4, 8, (2, 3, 3), stride=2)
        self.long = nn.Conv1d(8, 8, 3, dilation=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.up(self.grouped(self.first(x).relu()).relu()).relu()
        x = self.deep(x.view(-1, 4, 2, 16, 16)).relu()
        return self.head(self.long(x.flatten(2)).relu().mean(2))


def inputs(examples=32):
    return torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def context(x=None, batch_size=8):
    x = inputs() if x is None else x
    labels = (x.flatten(1).mean(1) > 0).long()
    return Context(x[:1] * 0, DataLoader(TensorDataset(x, labels), batch_size), 5, plugins.formulas())


def net():
    torch.manual_seed(0)
    return Net().eval()


def strategy(name, **options):
    return plugins.lookup("sparsifier", name)(**{**OPTIONS.get(name, {}), **options})


def weights(model):
    return [layer.weight.detach() for layer in dot_products(model).values()]


def zeros(model):
    return [weight == 0 for weight in weights(model)]


def sparsity(model):
    return sum(int(z.sum()) for z in zeros(model)) / sum(z.numel() for z in zeros(model))


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sparsifier_keeps_what_every_sparsifier_must(name):
    model, x = net(), inputs()
    state = copy.deepcopy(model.state_dict())
    made = strategy(name).apply(model, context())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    torch.rand(3)
    again = strategy(name).apply(model, context())
    assert all(torch.equal(a, b) for a, b in zip(weights(made), weights(again), strict=True))
    assert 0.4 < sparsity(made) <= 0.51  # n of m leaves the 3 inputs of the first layer
    assert all(type(m) is Mask for layer in dot_products(made).values() for m in layer.parametrizations["weight"])
    with torch.no_grad():
        logits = made(x)
        unpacked = packing.unpack(packing.pack(made, net(), x[:1]), net())
        assert torch.equal(unpacked(x), logits)
    assert all(torch.equal(a, b) for a, b in zip(zeros(unpacked), zeros(made), strict=True))
    dense, sparse = (account(trace(m, x[:1]), plugins.formulas()) for m in (model, unpacked))
    assert sparse.storage.bits < 0.75 * dense.storage.bits
    assert sparse.math.mults < 0.75 * dense.math.mults


@pytest.mark.parametrize("name", NAMES)
def test_zeros_hold_while_training_goes_on(name):
    made = strategy(name).apply(net(), context())
    before, values = zeros(made), weights(made)
    train(made, Training(epochs=1, learning_rate=0.01, weight_decay=0.1), context(), lambda line: None)
    assert all(torch.equal(a, b) for a, b in zip(zeros(made), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(made), values, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_zero_stays_zero(name):
    once = Magnitude(sparsity=0.3).apply(net(), context())
    twice = strategy(name).apply(once, context())
    assert all(bool(b[a].all()) for a, b in zip(zeros(once), zeros(twice), strict=True))
    if name not in ("n-m", "wanda", "obs", "block"):  # those count by groups, outputs, layers and blocks
        assert abs(sparsity(twice) - 0.5) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_more_zeros_than_are_asked_for_stay(name):
    once = Magnitude(sparsity=0.7, limit=0.99).apply(net(), context())
    twice = strategy(name).apply(once, context())
    assert all(bool(b[a].all()) for a, b in zip(zeros(once), zeros(twice), strict=True))


@pytest.mark.parametrize("name", ["random", "gradual", "movement"])
def test_another_seed_makes_other_zeros(name):
    model = net()
    one, two = (strategy(name).apply(model, changed(context(), seed=seed)) for seed in (1, 2))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


class Tied(nn.Module):
    """Two convolutions with one weight, of which the second runs at fewer positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x.repeat(1, 3, 1, 1)[:, :8]).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_share_a_weight_share_its_mask(name):
    torch.manual_seed(0)
    before = Tied().eval()
    model = strategy(name, sparsity=0.5).apply(before, context()) if name != "n-m" else NofM().apply(before, context())
    model = strategy(name).apply(model, context())  # and once more on what is masked
    assert torch.equal(model.first.weight, model.second.weight)
    assert 0 < int((model.first.weight != 0).sum()) < model.first.weight.numel()
    example = context().example_input
    counted = account(trace(model, example), plugins.formulas())
    assert sorted(s.name for s in counted.stored) == ["first.weight", "head.bias", "head.weight"]
    again = packing.unpack(packing.pack(model, Tied(), example), Tied())
    assert again.first.weight is again.second.weight
    assert torch.equal(again(inputs()), model(inputs()))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("n-m", "block", "wanda")])
def test_a_weight_of_two_layers_counts_once(name):
    torch.manual_seed(0)
    model = strategy(name, sparsity=0.6).apply(Tied().eval(), context())
    layers = model.first, model.head
    assert sum(int((x.weight == 0).sum()) for x in layers) == round(0.6 * sum(x.weight.numel() for x in layers))


class Words(nn.Module):
    """A table of words as embedding and softmax: one module, two with one weight, or read by a function."""

    def __init__(self, how):
        super().__init__()
        self.inside, self.softmax = nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.table = nn.Embedding(40, 16) if how == "embedding" else self.softmax
        if how == "embedding":
            self.table.weight = self.softmax.weight

    def forward(self, tokens):
        vectors = (
            self.table(tokens)
            if self.table is not self.softmax
            else nn.functional.embedding(tokens, self.softmax.weight)
        )
        return self.softmax(self.inside(vectors).relu())


def words(how):
    """The model, and a context of tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (16, 6))
    data = DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), 8)
    return Words(how).eval(), Context(tokens[:1], data, 0, plugins.formulas())


@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_that_is_tied_to_the_softmax_has_its_zeros(name):
    model, c = words("embedding")
    made = strategy(name).apply(model, c)
    assert int((made.table.weight == 0).sum()) > 0
    assert made.table.parametrizations.weight[0] is made.softmax.parametrizations.weight[0]
    counted = account(trace(made, c.example_input), plugins.formulas())
    assert sum("bias" not in s.name for s in counted.stored) == 2
    twice = strategy(name).apply(made, c)
    assert torch.equal(twice.table.weight, twice.softmax.weight)
    plain = words("embedding")[0]
    unpacked = packing.unpack(packing.pack(made, plain, c.example_input), plain)
    assert torch.equal(unpacked.table.weight, made.table.weight)


@pytest.mark.parametrize("how", ["embedding", "function"])
def test_obs_leaves_the_values_of_a_table_that_is_the_embedding_too(how):
    model, c = words(how)
    made = OBS(sparsity=0.5).apply(model, c)
    table, before = made.softmax.weight, model.softmax.weight
    assert torch.equal(table, before * (table != 0))
    assert before[table == 0].abs().max() <= before[table != 0].abs().min()
    inside = made.inside.weight
    assert not torch.equal(inside, model.inside.weight * (inside != 0))


def test_the_moments_of_a_weight_of_two_layers_are_those_of_both():
    model = Tied().eval()
    moments = second_moments(model, context(), 4, "test")
    assert list(moments) == ["first", "head"]
    model.second.weight = nn.Parameter(model.first.weight.detach().clone())
    apart = second_moments(model, context(), 4, "test")
    torch.testing.assert_close(
        moments["first"].float(), (apart["first"] + apart["second"]).float(), rtol=1e-4, atol=1e-3
    )


class Attending(nn.Module):
    """Attention, whose last layer torch calls as a function, and a layer of a kind of its own."""

    class Own(nn.Linear):
        pass

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.own, self.head = self.Own(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = x.reshape(-1, 12, 16)
        return self.head(self.own(self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_layers_whose_inputs_are_not_seen_lose_their_smallest_weights(name):
    torch.manual_seed(0)
    model = Attending().eval()
    made = strategy(name, sparsity=0.5, scope="layer").apply(model, context())
    assert sparsity(made) == pytest.approx(0.5, abs=1e-3)
    for layer, dense in ((made.own, model.own), (made.attention.out_proj, model.attention.out_proj)):
        gone = layer.weight == 0
        assert torch.equal(layer.weight, dense.weight * ~gone)
        assert dense.weight[gone].abs().max() <= dense.weight[~gone].abs().min()


def test_positions_are_those_of_all_that_multiplies_by_a_weight():
    model = Attending().eval()
    assert positions(model, list(by_weight(model).values()), context()) == [12, 12, 1]
    tied = Tied().eval()
    assert positions(tied, list(by_weight(tied).values()), context()) == [8 * 8 + 6 * 6, 1]


@pytest.mark.parametrize(("step", "message"), [(0, "each by a mask or quantizer of its own"), (1, "something else")])
def test_a_weight_of_two_layers_with_a_mask_of_each_is_not_packed(step, message):
    model = Tied().eval()
    for i, layer in enumerate((model.first, model.second)):
        mask = Mask(torch.arange(8 * 8 * 9).view(8, 8, 3, 3) % 5 != step * i)
        nn.utils.parametrize.register_parametrization(layer, "weight", mask)
    with pytest.raises(InputError, match=f"cannot pack 'first.weight': .*{message}"):
        packing.pack(model, Tied(), context().example_input)


@pytest.mark.parametrize("name", NAMES)
def test_a_sparsifier_comes_before_the_quantizer(name):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    quantized = FixedPointStrategy().apply(linear, context())
    with pytest.raises(InputError, match="quantized already; put the sparsifier before the quantizer"):
        strategy(name).apply(quantized, context())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_layers_is_refused(name):
    with pytest.raises(InputError, match="no convolution and no linear layer"):
        strategy(name).apply(nn.Sequential(nn.Flatten(), nn.ReLU()), context())


@pytest.mark.parametrize("name", ["obs", "wanda"])
def test_inputs_that_overflow_are_told(name):
    with pytest.raises(InputError, match=f"{name}: the squares of what layer 'first' reads are not finite"):
        strategy(name).apply(net(), context(inputs() * 1e30))


@pytest.mark.parametrize("name", ["obs", "wanda"])
def test_layers_of_other_kinds_alone_are_told(name):
    with pytest.raises(InputError, match=f"{name}: no layer's inputs can be seen, .* take the sparsifier 'magnitude'"):
        strategy(name).apply(nn.Sequential(nn.Flatten(), Attending.Own(192, 5)), context())


@pytest.mark.parametrize("name", ["obs", "wanda", "gradual", "movement"])
def test_missing_training_data_are_told(name):
    none = Context(inputs(1), DataLoader(TensorDataset(inputs(0), torch.zeros(0).long()), 8, sampler=[]), 0, {})
    with pytest.raises(InputError, match="there is no training data to"):
        strategy(name).apply(net(), none)


@pytest.mark.parametrize("name", ["obs", "wanda"])
def test_layers_may_be_called_by_keyword(name):
    class ByName(nn.Sequential):
        def forward(self, x):
            return self[2](input=self[1](input=x.flatten(1)).relu())

    torch.manual_seed(0)
    made = strategy(name).apply(ByName(nn.Identity(), nn.Linear(192, 16), nn.Linear(16, 5)), context())
    assert 0.45 < sparsity(made) <= 0.51


def test_weights_that_cannot_be_ranked_are_told():
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 5)))
    with pytest.raises(InputError, match="layer '1' computes its weight out of other tensors, as weight norm"):
        Magnitude().apply(model, context())
    with torch.no_grad():
        model = nn.Sequential(nn.Flatten(), prune.identity(nn.Linear(192, 5), "weight"))
    with pytest.raises(InputError, match="layer '1' computes its weight out of other tensors"):
        Magnitude().apply(model, context())
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="the weights of layer 'head' are not finite; train the model first"):
        Magnitude().apply(model, context())


@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_labels_without_an_output_are_told(name):
    wrong = DataLoader(TensorDataset(inputs(8), torch.full((8,), 9)), 8)
    with pytest.raises(InputError, match="label 9 has no output; the model has 5"):
        strategy(name).apply(net(), changed(context(), training_data=wrong))


def test_a_recipe_with_a_block_mask_is_stored_as_one(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'task = "digits"\ndata = "noise"\n[submission]\nname = "x"\nauthors = ["x"]\n[architecture]\n'
        'name = "wide-resnet"\ndepth = 10\nwidth = 1\nclasses = 10\nchannels = 1\n'
        '[[stages]]\nsparsifier = "block"\nsparsity = 0.75\nrows = 8\ncolumns = 8\n'
        '[[stages]]\nmerge = "batch-norm"\n[[stages]]\nquantizer = "fixed-point"\n'
    )
    compress(tmp_path / "recipe.toml", tmp_path / "made")
    layouts = [layout for *_, layout in packing.read(tmp_path / "made" / "weights.safetensors").structure.tensors]
    assert layouts.count("blocks:8x8") >= 5
    storage = evaluate(tmp_path / "made").storage
    assert storage.mask_bits < 77_562 / 30


# --- magnitude --------------------------------------------------------------------------------------------------------


def test_dear_weights_go_first():
    """Weights 2, 3, 9 of a convolution are used at 4 x 4 positions, 1.5, 2.5, 5 of a linear layer once."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 3.0, 9.0]).view(3, 1, 1, 1))
        model[3].weight.copy_(torch.tensor([[1.5, 2.5, 5.0]]))

    def left(**options):
        made = Magnitude(sparsity=0.5, limit=0.7, **options).apply(model, context(torch.randn(8, 1, 4, 4)))
        return [layer.weight.flatten().tolist() for layer in (made[0], made[3])]

    assert left() == [[0, 3, 9], [0, 0, 5]]
    # By 1 + 0.2 x 16 = 4.2 and 1.2 the squares 4, 9, 81 and 2.25, 6.25, 25 become 0.95, 2.1, 19 and 1.9, 5.2, 21.
    assert left(mac_cost=0.2) == [[0, 0, 9], [0, 2.5, 5]]


def test_lamp_scores():
    """3 of (3, 1, 2): 9 / 9; 1: 1 / (1 + 4 + 9); 2: 4 / (4 + 9)."""
    scores = lamp_scores(torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 / 14, 4 / 13]).double())
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_ignores_the_scale_of_a_layer():
    one, two = net(), net()
    with torch.no_grad():
        two.head.weight.mul_(64)
    masks = [zeros(Magnitude(scope="lamp", sparsity=0.8).apply(model, context())) for model in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_erk_densities():
    """Raw densities 8 / 16 and 20 / 100; at a third of 116 weights they are scaled by 116 / 3 / (8 + 20)."""
    scale = 116 / 3 / 28
    torch.testing.assert_close(erk_densities([(4, 4), (10, 10)], 1 / 3), [0.5 * scale, 0.2 * scale])
    full, rest = erk_densities([(4, 4), (10, 10)], 0.9)  # the small layer stays dense
    assert full == 1
    assert rest == pytest.approx((0.9 * 116 - 16) / 100)


def test_erk_densities_sum_to_the_budget():
    shapes = [(16, 1, 3, 3), (16, 16, 3, 3), (64, 32, 3, 3), (64, 32, 1, 1), (10, 64)]
    sizes = [math.prod(shape) for shape in shapes]
    for density in (0.02, 0.1, 0.5, 0.99):
        for least in (0.0, 0.01):
            densities = erk_densities(shapes, density, least)
            assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(density * sum(sizes))
            assert all(least <= d <= 1 for d in densities)
    two = erk_densities(shapes, 0.1)
    assert two[1] / two[2] == pytest.approx((16 + 16 + 6) / (16 * 16 * 9) / ((64 + 32 + 6) / (64 * 32 * 9)))


@pytest.mark.parametrize("scope", ["global", "layer", "lamp", "erk"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_every_scope_reaches_the_sparsity_and_takes_the_smallest_of_a_layer(scope, share):
    model = net()
    made = Magnitude(scope=scope, sparsity=share).apply(model, context())
    assert abs(sparsity(made) - share) < 1e-3
    for weight, zero in zip(weights(model), zeros(made), strict=True):
        assert not zero.any() or weight[zero].abs().max() <= weight[~zero].abs().min()
        assert zero.float().mean() <= 0.96
        if scope == "layer":
            assert int(zero.sum()) == round(share * zero.numel())


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_every_m_inputs_stay_and_they_are_the_largest(n, m):
    model = net()
    made = NofM(n=n, m=m).apply(model, context())
    for layer, dense in zip(dot_products(made).values(), weights(model), strict=True):
        sparse, dense = grouped(layer, layer.weight.detach()), grouped(layer, dense)
        for start in range(0, dense.shape[2], m):
            now, before = sparse[:, :, start : start + m], dense[:, :, start : start + m].abs()
            stay = min(n, now.shape[2])
            assert bool(((now != 0).sum(2) == stay).all())
            torch.testing.assert_close(now.abs().sum(2), before.sort(2, descending=True).values[:, :, :stay].sum(2))


def test_n_must_be_smaller_than_m():
    with pytest.raises(ValidationError, match="n = 4 of m = 4 removes nothing"):
        NofM(n=4, m=4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_block_norms(norm):
    """5 x 7 in blocks of 2 x 3: the last row of blocks is one high, the last column one wide."""
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    norms = block_norms(weight, (2, 3), norm)
    assert norms.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            part = weight[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].double()
            expected = part.abs().mean() if norm == "l1" else part.square().mean().sqrt()
            assert float(norms[i, j]) == pytest.approx(float(expected))


def test_whole_blocks_go_the_smallest_first():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
    made = Block(sparsity=0.75, rows=4, columns=8).apply(model, context())
    blocks = made[1].weight.detach().view(4, 4, 24, 8).transpose(1, 2).flatten(2)
    before = model[1].weight.detach().view(4, 4, 24, 8).transpose(1, 2).flatten(2).abs().sum(2)
    gone = (blocks == 0).all(2)
    assert bool(((blocks == 0).any(2) == gone).all())
    assert int(gone.sum()) == 72
    assert before[gone].max() <= before[~gone].min()


def test_dear_kernels_go_first():
    """Kernels with |w| = 3 and 4 on average are used at 4 x 4 positions, weights 2.5 and 3 of a linear layer once."""
    layers = (nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([3.0, 4.0]).view(2, 1, 1, 1) * torch.tensor([0.5, 1.0, 1.5] * 3).view(3, 3))
        layers[3].weight.copy_(torch.tensor([[2.5, 3.0]]))

    def left(**options):
        made = Block(rows=1, columns=0, sparsity=0.25, **options).apply(model, context(torch.zeros(1, 1, 4, 4)))
        return [made[0].weight.count_nonzero((1, 2, 3)).tolist(), made[3].weight.count_nonzero(0).tolist()]

    assert left() == [[9, 9], [0, 1]]
    assert left(scope="lamp") == [[0, 9], [1, 1]]  # 9 / (9 + 16) against 6.25 / (6.25 + 9)
    assert left(mac_cost=1) == [[0, 9], [1, 1]]  # 9 / 17 against 6.25 / 2


# --- by calibration data ----------------------------------------------------------------------------------------------

LAYERS = [
    pytest.param(nn.Linear(6, 4), (9, 6), id="linear"),
    pytest.param(nn.Linear(6, 4), (3, 5, 6), id="linear on tokens"),
    pytest.param(nn.Conv1d(6, 4, 3, dilation=2), (3, 6, 9), id="1d"),
    pytest.param(nn.Conv2d(6, 4, 3, stride=2, padding=1), (3, 6, 7, 7), id="2d"),
    pytest.param(nn.Conv2d(6, 9, 3, padding=1, groups=3, padding_mode="reflect"), (3, 6, 7, 7), id="groups"),
    pytest.param(nn.Conv3d(2, 4, 2), (3, 2, 4, 4, 4), id="3d"),
    pytest.param(nn.ConvTranspose1d(6, 4, 3, stride=2), (3, 6, 5), id="transposed 1d"),
    pytest.param(nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, groups=2), (3, 6, 5, 5), id="transposed"),
    pytest.param(nn.ConvTranspose3d(2, 4, 2), (3, 2, 3, 3, 3), id="transposed 3d"),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_second_moments_give_the_energy_of_every_output(layer, shape):
    """The sum over examples and positions of y^2 is w H w^T, for each output of each group."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    (moment,) = second_moments(model, context(x, 2), 99, "test").values()
    outputs = layer(x).detach()
    channel = -1 if isinstance(layer, nn.Linear) else 1
    bias = layer.bias.detach().view(-1, *[1] * (0 if channel == -1 else x.dim() - 2))
    energy = (outputs - bias).movedim(channel, 0).flatten(1).square().sum(1)
    weight = grouped(layer, layer.weight.detach()).flatten(2).double()
    torch.testing.assert_close(((weight @ moment) * weight).sum(2).flatten().float(), energy, rtol=1e-4, atol=1e-4)
    assert torch.equal(ungrouped(layer, grouped(layer, layer.weight)), layer.weight)


def test_wanda_by_hand():
    """Norms of the inputs 1, 2, 10: scores (3, 4, 1) and (1, 8, 20); a third of each output goes."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 2.0, 0.1], [-1.0, 4.0, 2.0]]))
    x = torch.tensor([[1.0, 0.0, 6.0], [0.0, 2.0, 8.0]])
    made = Wanda(sparsity=1 / 3).apply(model, context(x))
    assert (made[0].weight != 0).tolist() == [[True, True, False], [False, True, True]]


def correlated(d=24, examples=400):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, d, generator=generator)
    noise = 0.3 * torch.randn(examples, d, generator=generator)
    return torch.randn(examples, 6, generator=generator) @ mixing + noise


@pytest.mark.parametrize("column", [0, 3, 7])
def test_one_removed_weight_is_the_closed_form_of_obs(column):
    """w - w_p / [H^-1]_pp x [H^-1]_p, for whichever weight is removed (Hassibi and Stork 1992)."""
    h = damped((correlated(8).T @ correlated(8)).double(), 0.01)
    inverse = torch.linalg.inv(h)
    weight = torch.ones(1, 8).double()
    weight[0, column] = 0.01  # the least salient
    expected = weight - weight[0, column] / inverse[column, column] * inverse[column]
    new, kept = sweep(weight, h, 1 / 8, block=8)
    assert (~kept).nonzero().tolist() == [[0, column]]
    torch.testing.assert_close(new, expected, atol=1e-7, rtol=1e-6)
    assert new[0, column] == 0


def test_the_sweep_chooses_what_inverting_again_at_every_column_chooses():
    generator = torch.Generator().manual_seed(3)
    h = damped((correlated(12).T @ correlated(12)).double(), 0.01)
    weight = torch.randn(5, 12, generator=generator).double()
    expected, now = torch.ones(5, 12, dtype=torch.bool), weight.clone()
    for start in range(0, 12, 4):
        inverses = [torch.linalg.inv(h[j:, j:]) for j in range(12)]
        scores = torch.stack([now[:, j].square() / inverses[j][0, 0] for j in range(start, start + 4)], 1)
        for flat in scores.flatten().argsort()[:10].tolist():  # half of 5 x 4
            expected[flat // 4, start + flat % 4] = False
        for j in range(start, start + 4):
            gone = now[:, j] * ~expected[:, j]
            now[:, j:] -= torch.outer(gone / inverses[j][0, 0], inverses[j][0])
    _, kept = sweep(weight, h, 0.5, block=4)
    assert torch.equal(kept, expected)


def test_the_sweep_builds_on_no_weight_that_was_zero():
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)).double()
    weight[:, :8] *= torch.arange(8) % 4 == 0  # three quarters of the first block are zero already
    h = damped((correlated(16).T @ correlated(16)).double(), 0.01)
    new, kept = sweep(weight, h, 0.5, block=8)
    assert not bool(kept[weight == 0].any() or new[weight == 0].any())
    assert int(kept[:, 8:].sum()) == 20


def test_the_refit_is_the_solution_of_least_squares():
    generator = torch.Generator().manual_seed(2)
    h = damped((correlated(16).T @ correlated(16)).double(), 0.05)
    weight = torch.randn(4, 16, generator=generator).double()
    kept = torch.rand(4, 16, generator=generator) > 0.5
    new = refitted(weight, weight * kept, kept, h)
    for row in range(4):
        m = kept[row]
        torch.testing.assert_close(
            new[row, m], torch.linalg.solve(h[m][:, m], h[m] @ weight[row]), rtol=1e-5, atol=1e-6
        )
        assert not new[row, ~m].any()


@pytest.mark.parametrize(("share", "better"), [(0.3, 0.5), (0.5, 0.5), (0.8, 0.7)])
def test_obs_is_closer_to_the_layers_output_than_wanda_and_magnitude(share, better):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 12)), correlated()
    errors = [
        float((s.apply(model, context(x, 100))(x) - model(x)).detach().square().mean())
        for s in (OBS(sparsity=share), Wanda(sparsity=share), Magnitude(sparsity=share, scope="layer"))
    ]
    assert errors[0] < better * min(errors[1:])


def test_calibration_takes_the_batches_it_says():
    model = nn.Sequential(nn.Linear(24, 12))
    x = correlated(examples=40)
    one, all_of_them = (OBS(batches=b).apply(model, context(x, 20))[0].weight for b in (1, 2))
    again = OBS(batches=9).apply(model, context(x[:20], 20))[0].weight
    assert torch.equal(one, again)
    assert not torch.equal(one, all_of_them)


# --- while it trains --------------------------------------------------------------------------------------------------


def test_the_cubic_schedule():
    options = Gradual(sparsity=0.8, ramp=0.5)
    assert [options.sparsity_at(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.8 * 7 / 8, 0.8, 0.8])


def test_gradual_trains_and_ends_at_its_sparsity():
    model = net()
    made = Gradual(sparsity=0.75, epochs=10, learning_rate=0.01, batch_size=8).apply(model, context())
    assert sparsity(made) == pytest.approx(0.75, abs=1e-3)
    x, labels = context().training_data.dataset.tensors
    after, before = (nn.functional.cross_entropy(m(x), labels).item() for m in (made, model))
    assert after < 0.8 * before
    assert not made.training


def test_movement_adds_up_weight_times_gradient():
    """With one step the score is -w x dL/dw; the lowest go, whatever their size."""
    model, c = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), context(batch_size=32)
    x, labels = c.training_data.dataset.tensors
    weight = model[1].weight
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), weight)
    scores = -(weight * gradient).detach().flatten()
    made = Movement(epochs=1, batch_size=64, ramp=1).apply(model, c)
    gone = (made[1].weight == 0).flatten()
    assert int(gone.sum()) == 480
    assert scores[gone].max() <= scores[~gone].min() + 1e-9


def test_a_weight_can_come_back_while_the_sparsity_grows():
    """What moves away from zero later has a score that rises, although a mask hides the weight."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    watched = watch(layer, layer)
    watched.mask = torch.tensor([[False, True]])
    layer(torch.tensor([[-3.0, 0.5]])).sum().backward()
    assert watched.scores.tolist() == [[3.0, -1.0]]
    assert layer.parametrizations.weight.original.grad.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_language_models_are_trained_while_they_become_sparse(name):
    model = plugins.lookup("architecture", "transformer-lm")(vocab=11, width=8, heads=2, hidden=16, layers=1, context=6)
    tokens = torch.randint(0, 11, (8, 6), generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), 4)
    made = strategy(name, sparsity=0.5).apply(model, Context(tokens[:1], data, 0, plugins.formulas()))
    assert 0.3 < sparsity(made) <= 0.51


@pytest.mark.parametrize("name", ["obs", "gptq"])
def test_moments_that_cannot_be_inverted_are_told(name):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    kind = "sparsifier" if name == "obs" else "quantizer"
    with pytest.raises(InputError, match="second moments that cannot be inverted; raise damping"):
        plugins.lookup(kind, name)(damping=1e-30, batches=1).apply(net(), context(x, 2))
