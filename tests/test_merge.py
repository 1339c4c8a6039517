"""Batch norm is merged where that is exact, else it becomes a scale and a shift; what the model computes stays."""

import copy
import math
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import get_model, resnet18

from micronet_eval.conditional import Conditional
from micronet_eval.costs import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.formats import Affine, AffineQuantizer, FixedPointQuantizer
from micronet_eval.merge import merged, merged_trace, without_batch_norm
from micronet_eval.scoring import account
from micronet_eval.structure import Mask, ScaleShift
from micronet_eval.trace import trace
from micronet_plugins.architectures import wide_resnet
from micronet_plugins.lsq import PowerOfTwo


def fill(model):
    """Batch norms that do something, as after training; in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
    return model.eval()


def module(forward, **members):
    """A module with this forward(self, x) and submodules, filled."""
    made = nn.Module()
    for name, member in members.items():
        setattr(made, name, member)
    made.forward = MethodType(forward, made)
    return fill(made)


def same(model, x, tolerance=1e-5):
    """The merged model, if it computes what `model` computes."""
    result = merged(model, x)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=tolerance, atol=tolerance)
    return result


def images(channels=3, size=6):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), images()),
        (nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), images()),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8, eps=0.1), images(4)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), images(4)),
        (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), images()),
        (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), torch.randn(2, 3, 9)),
        (nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), torch.randn(2, 3, 4, 4, 4)),
        (nn.Linear(5, 8), nn.BatchNorm1d(8), torch.randn(2, 5)),
        (nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), torch.randn(2, 5)),
    ],
)
@pytest.mark.rule("storage.merged")
def test_batch_norm_behind_a_layer_is_merged(layer, norm, x):
    result = same(fill(nn.Sequential(layer, norm, nn.ReLU())), x)
    assert type(result[0]) is type(layer)
    assert result[0].bias is not None
    assert type(result[1]) is nn.Identity


def test_a_merged_batch_norm_costs_only_a_bias():
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)))
    counted = account(trace(merged(model, images()), images()[:1]), FORMULAS, freebie=False)
    assert counted.storage.bits == (24 + 8) * 32
    assert (counted.math.mults, counted.math.adds) == (36 * 24, 36 * 24)


def test_all_of_resnet18_is_merged():
    result = same(fill(resnet18()), images(size=64), tolerance=1e-4)
    kinds = {type(m) for m in result.modules()}
    assert nn.BatchNorm2d not in kinds
    assert ScaleShift not in kinds


def test_batch_norm_in_front_of_a_convolution_stays_a_scale_and_shift():
    result = same(fill(wide_resnet(16, 1)), images(size=16), tolerance=1e-4)
    # bn2 lies behind conv1 and is merged; bn1 follows a residual sum, or the stem, which the first sum reads, too.
    kinds = {path: type(m) for path, m in result.named_modules() if path.split(".")[-1] in ("bn1", "bn2")}
    assert len(kinds) == 12
    assert kinds == {path: nn.Identity if path.endswith("bn2") else ScaleShift for path in kinds}


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 1), images(4)),
        (nn.Conv2d(4, 6, 3, bias=False), images(4)),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2), images(4)),
        (nn.Conv2d(4, 4, 2, groups=4), images(4)),
        (nn.Linear(4, 6), torch.randn(5, 4)),
        (nn.Linear(4, 6, bias=False), torch.randn(5, 4)),
    ],
)
def test_batch_norm_in_front_of_a_layer_that_pads_nothing_is_merged_forward(layer, x):
    norm = nn.BatchNorm2d(4) if x.dim() == 4 else nn.BatchNorm1d(4)
    model = fill(nn.Sequential(norm, layer))
    result = same(model, x)
    assert isinstance(result[0], nn.Identity)
    assert result[1].bias is not None
    assert isinstance(merged(model, x, ["backward"])[0], ScaleShift)


def overwritten(self, x):
    x = x * 1
    y = self.norm(x)
    return self.conv(y) + x.relu_() if self.late else x.relu_() + self.conv(y)


def written_through_a_view(self, x):
    x = x * 1
    y = self.norm(x)
    x.view(-1)[::2] = 7
    return self.conv(y) + (x if self.late else 0)


@pytest.mark.parametrize("forward", [overwritten, written_through_a_view])
@pytest.mark.parametrize("late", [True, False])
def test_a_norm_whose_input_is_overwritten_meanwhile_keeps_its_result(forward, late):
    """Merged it would be an Identity, and the layer behind it would read what was written."""
    model = module(forward, norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    model.late = late
    result = same(model, images())
    before = forward is overwritten and late  # the layer has run when its input is written into
    assert type(result.norm) is (nn.Identity if before else ScaleShift)


def test_masked_weights_keep_their_zeros_forward():
    layer = nn.Linear(4, 2)
    parametrize.register_parametrization(layer, "weight", Mask(torch.tensor([[True, False, True, True]] * 2)))
    result = same(fill(nn.Sequential(nn.BatchNorm1d(4), layer)), torch.randn(3, 4))
    assert isinstance(result[0], nn.Identity)
    assert (result[1].weight[:, 1] == 0).all()


def test_a_layer_takes_the_norm_in_front_and_the_norm_behind():
    result = same(fill(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))), images(4))
    assert [type(m) for m in result] == [nn.Identity, nn.Conv2d, nn.Identity]


def test_a_norm_that_could_go_both_ways_goes_backward():
    result = same(fill(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))), images())
    assert result[0].bias is not None


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_behind_a_transposed_convolution_is_merged(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups)
    result = same(fill(nn.Sequential(layer, nn.BatchNorm2d(6))), images(4))
    assert isinstance(result[1], nn.Identity)


def read_twice(self, x):
    y = self.norm(x)
    return self.layer(y) + y


def layer_reads_another_too(self, x):
    return self.layer(self.norm(x)) + self.layer(x)


def relu_between(self, x):
    return self.layer(torch.relu(self.norm(x)))


@pytest.mark.parametrize(
    ("forward", "layer"),
    [
        (read_twice, nn.Conv2d(4, 4, 1)),
        (layer_reads_another_too, nn.Conv2d(4, 4, 1)),
        (relu_between, nn.Conv2d(4, 4, 1)),
        (lambda self, x: self.layer(self.norm(x)), nn.Conv2d(4, 4, 3, padding=1)),
        (lambda self, x: self.layer(self.norm(x)), nn.Conv2d(4, 4, 1, padding=1)),
        (lambda self, x: self.layer(self.norm(x)), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        (lambda self, x: self.layer(self.norm(x)), nn.ConvTranspose2d(4, 4, 3)),
        (lambda self, x: self.layer(self.norm(x).transpose(1, 2)), nn.Conv2d(6, 4, 1)),
    ],
)
def test_where_merging_forward_would_be_wrong_it_becomes_a_scale_and_shift(forward, layer):
    result = same(module(forward, norm=nn.BatchNorm2d(4), layer=layer), images(4))
    assert isinstance(result.norm, ScaleShift)


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "shufflenet_v2_x0_5"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.rule("storage.merged")
def test_merging_a_real_network_keeps_its_logits(name):
    """In float64: an untrained deep network amplifies float32's rounding to some 1e-5 of its logits."""
    model = get_model(name, weights=None).eval().double()
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as after training: means and variances of what it really sees
            norm.momentum = None
            norm.train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        difference = (merged(model, x)(x) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-10


def test_a_view_that_changes_nothing_may_lie_between():
    def forward(self, x):
        return self.norm(self.layer(x).clone().detach())

    result = same(module(forward, layer=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8)), images())
    assert type(result.norm) is nn.Identity


def test_masked_weights_keep_their_zeros():
    layer = nn.Conv2d(3, 8, 3)
    mask = torch.arange(216).view(8, 3, 3, 3) % 3 == 0
    parametrize.register_parametrization(layer, "weight", Mask(mask))
    result = same(fill(nn.Sequential(layer, nn.BatchNorm2d(8))), images())
    assert type(result[1]) is nn.Identity
    assert torch.equal(result[0].weight != 0, mask)


def integers(scales, low=-7, zero_points=None):
    """A masked convolution from 3 to 4 channels with weights in integers from `low` to 7, batch norm behind it."""
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 4, 3)
    blocks = (4 // len(scales), 3, 3, 3)
    parametrize.register_parametrization(layer, "weight", Mask(torch.rand(4, 3, 3, 3) < 0.7))
    quantizer = AffineQuantizer(Affine(low, 7, blocks, torch.tensor(scales), zero_points), learned=True)
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    return fill(nn.Sequential(layer, nn.BatchNorm2d(4)))


@pytest.mark.rule("storage.merged")
def test_the_scales_of_integers_take_the_factor_of_batch_norm():
    model = integers([0.02, 0.03, 0.05, 0.07])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.5, -0.5, 0.0, 2.0]))
    result = same(model, images())
    assert type(result[1]) is nn.Identity
    before, after = (
        (m[0].weight / m[0].parametrizations.weight[1].scale.view(4, 1, 1, 1)).round() for m in (model, result)
    )
    assert before.abs().max() == 7
    assert torch.equal(after, before * torch.tensor([1, -1, 0, 1]).view(4, 1, 1, 1))
    assert result[0].parametrizations.weight[1].scale[2] == 1  # beside zeros


@pytest.mark.parametrize(
    ("scales", "options"),
    [
        ([0.02], {}),
        ([0.02, 0.03], {}),
        ([0.01] * 4, {"low": -8}),
        ([0.02] * 4, {"zero_points": torch.tensor([1, 0, 0, 0], dtype=torch.int32)}),
    ],
    ids=["one scale", "two outputs share a scale", "-8 has no counterpart", "zero points"],
)
def test_integers_that_no_scale_can_take_a_factor_for_keep_a_scale_and_shift(scales, options):
    model = integers(scales, **options)
    with torch.no_grad():
        model[1].weight.neg_()
    assert type(same(model, images())[1]) is ScaleShift


def tied(parametrization):
    """Two convolutions with one weight, under one parametrization, batch norm behind each."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]
    layers[1].weight = layers[0].weight
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    return fill(nn.Sequential(layers[0], nn.BatchNorm2d(3), layers[1], nn.BatchNorm2d(3)))


QUANTIZER = AffineQuantizer(Affine(-7, 7, (1, 3, 1, 1), torch.full((3,), 0.1)))


@pytest.mark.parametrize(
    "parametrization", [QUANTIZER, Mask(torch.arange(9).view(3, 3, 1, 1) != 4)], ids=["integers", "mask"]
)
def test_a_tied_weight_under_a_parametrization_is_not_scaled(parametrization):
    result = same(tied(parametrization), images())
    assert type(result[1]) is type(result[3]) is ScaleShift


def test_scales_that_two_weights_share_stay():
    model = fill(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", QUANTIZER, unsafe=True)
    result = same(model, images())
    assert type(result[1]) is type(result[3]) is ScaleShift


def test_scales_that_are_powers_of_two_stay():
    layer = nn.Conv2d(3, 4, 1)
    quantizer = AffineQuantizer(Affine(-7, 7, (1, 3, 1, 1), torch.full((4,), 0.125)), learned=True)
    parametrize.register_parametrization(quantizer, "scale", PowerOfTwo())
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    assert type(same(fill(nn.Sequential(layer, nn.BatchNorm2d(4))), images())[1]) is ScaleShift


def test_scales_of_a_transposed_convolution_stay():
    layer = nn.ConvTranspose2d(3, 4, 2)
    quantizer = AffineQuantizer(Affine(-7, 7, (1, 4, 2, 2), torch.full((3,), 0.125)))
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    assert type(same(fill(nn.Sequential(layer, nn.BatchNorm2d(4))), images())[1]) is ScaleShift


def test_scales_that_would_be_too_small_stay():
    model = integers([0.02, 0.03, 0.05, 0.07])
    with torch.no_grad():
        model[1].weight.fill_(1e-12)
    assert type(same(model, images())[1]) is ScaleShift


@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_integers_whose_values_are_not_known_are_not_scaled(place):
    model = integers([0.02, 0.03, 0.05, 0.07]).to(place)
    nn.init.constant_(model[0].parametrizations.weight.original, math.nan)
    assert type(merged(model, images())[1]) is ScaleShift


@pytest.mark.parametrize("blocks", [(), (1, 3, 3, 3)])
def test_one_output_has_one_scale(blocks):
    layer = nn.Conv2d(3, 1, 3)
    quantizer = AffineQuantizer(Affine(-7, 7, blocks, torch.tensor([0.03])))
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    assert type(same(fill(nn.Sequential(layer, nn.BatchNorm2d(1))), images())[1]) is nn.Identity


def test_integers_behind_batch_norm_are_not_scaled():
    model = integers([0.02, 0.03, 0.05, 0.07])
    assert type(same(nn.Sequential(nn.BatchNorm2d(3).eval(), model[0]), images())[0]) is ScaleShift


def test_statistics_are_those_of_evaluation_whatever_the_mode():
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    expected = model(images())
    result = merged(model.train(), images()).eval()
    torch.testing.assert_close(result(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype):
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    result = merged(model, images().to(dtype))
    assert result[0].weight.dtype == result[0].bias.dtype == dtype


# --- not merged -------------------------------------------------------------------------------------------------------


def two_users(self, x):
    y = self.layer(x)
    return self.norm(y) + y


def is_the_output(self, x):
    y = self.layer(x)
    return torch.cat([self.norm(y), y[:, :1]], 1)


def layer_used_twice(self, x):
    return self.norm(self.layer(self.layer(x)))


def norm_used_twice(self, x):
    return self.norm(self.norm(self.layer(x)))


def behind_relu(self, x):
    return self.norm(self.layer(x).relu())


def weight_read_again(self, x):
    return self.norm(self.layer(x)) + self.layer.weight.sum()


def part_of_the_weight_read_again(self, x):
    return F.conv2d(self.norm(self.layer(x)), self.layer.weight[:2])


def bias_read_again(self, x):
    return self.norm(self.layer(x)) - self.layer.bias.view(-1, 1, 1)


def weight_added_up_in_front(self, x):
    return self.norm(self.layer(x * self.layer.weight.abs().mean()))


@pytest.mark.parametrize(
    "forward",
    [
        two_users, is_the_output, layer_used_twice, norm_used_twice, behind_relu, weight_read_again,
        part_of_the_weight_read_again, bias_read_again, weight_added_up_in_front,
    ],
)  # fmt: skip
def test_where_merging_would_be_wrong_it_becomes_a_scale_and_shift(forward):
    result = same(module(forward, layer=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)), images())
    assert type(result.norm) is ScaleShift


def test_a_convolution_that_is_an_output_of_the_model_is_left():
    def forward(self, x):
        y = self.layer(x)
        return y, self.norm(y)

    model = module(forward, layer=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    result = merged(model, images())
    assert type(result.norm) is ScaleShift
    assert torch.equal(result(images())[0], model(images())[0])


def test_a_quantized_weight_is_not_scaled():
    layer = nn.Conv2d(3, 8, 3)
    parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(8, -7))
    result = same(fill(nn.Sequential(layer, nn.BatchNorm2d(8))), images())
    assert type(result[1]) is ScaleShift


def test_a_quantized_activation_in_between_is_not_passed():
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 3), FixedPointQuantizer(8, -4), nn.BatchNorm2d(8)))
    assert type(same(model, images())[2]) is ScaleShift


def test_a_tied_weight_is_not_scaled():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    same(fill(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second)), images())


@pytest.mark.parametrize("masked", ["both", "one"])
def test_a_tied_weight_with_masks_of_each_layer_is_not_scaled(masked):
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    for i, layer in enumerate((first, second)[: 1 + (masked == "both")]):
        parametrize.register_parametrization(layer, "weight", Mask(torch.arange(9).view(3, 3, 1, 1) != i), unsafe=True)
    result = same(fill(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(3))), images())
    assert type(result[1]) is type(result[4]) is ScaleShift


def test_a_weight_that_the_model_returns_is_not_scaled():
    model = module(lambda self, x: (self.norm(self.layer(x)), self.layer.weight * 2), layer=nn.Conv2d(3, 3, 1),
                   norm=nn.BatchNorm2d(3))  # fmt: skip
    result = merged(model, images())
    assert type(result.norm) is ScaleShift
    assert torch.equal(result(images())[1], model(images())[1])


class OneWeight(Conditional):
    """Batch norm behind a layer on one path, and the layer's weight without it on the other."""

    paths = ("normed", "plain")

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.other.weight = self.layer.weight

    def run(self, x):
        return self.norm(self.layer(x)) if self.takes("normed", x.mean((1, 2, 3)) > 0) else self.other(x)


def test_a_weight_that_another_path_reads_is_not_scaled():
    assert type(same(fill(OneWeight()), images()).norm) is ScaleShift


MOVES = {
    "roll": lambda y: y.roll(1, 1),
    "shuffle": lambda y: y.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8),
    "transpose": lambda y: y.transpose(1, 2),
    "pad": lambda y: F.pad(y, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", MOVES)
def test_nothing_is_merged_through_operations_that_move_channels_or_add_values(name):
    def forward(self, x):
        return self.norm(MOVES[name](self.layer(x)))

    same(module(forward, layer=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8)), images(size=8))


def test_nothing_is_merged_through_a_slice():
    def forward(self, x):
        return self.norm(self.layer(x)[:, :4])

    same(module(forward, layer=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(4)), images())


def test_a_linear_layer_on_tokens_is_not_scaled_by_a_norm_over_the_tokens():
    model = fill(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    same(model, torch.randn(2, 6, 4))


def test_a_weight_that_is_computed_from_the_parameter_is_not_scaled():
    layer = nn.Conv2d(3, 8, 1)

    def standardized(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)

    layer.forward = MethodType(standardized, layer)
    same(fill(nn.Sequential(layer, nn.BatchNorm2d(8))), images())


def test_a_norm_by_the_statistics_of_the_input_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert type(same(model, images())[1]) is nn.BatchNorm2d


class Live(nn.Module):
    """Its forward normalizes by the batch, whatever the mode of the model."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm2d(4)

    def forward(self, x):
        self.norm.train()
        return self.norm(self.layer(x))


@pytest.mark.parametrize("masked", [False, True])  # a masked layer is really merged, and traced again
def test_a_norm_that_the_forward_runs_in_training_mode_stays(masked):
    model, x = Live(nn.Conv2d(4, 4, 1)).eval(), torch.zeros(1, 4, 8, 8)
    if masked:
        parametrize.register_parametrization(model.layer, "weight", Mask(torch.ones(4, 4, 1, 1, dtype=torch.bool)))
    math = account(merged_trace(model, x), FORMULAS).math
    # The convolution takes 4 of both for each of 256 values. A channel of k = 64 values takes 3k + 3 multiplications
    # and 2 (k - 1) + 2k + 1 additions.
    assert (math.mults, math.adds) == (4 * 256 + 4 * (3 * 64 + 3), 4 * 256 + 4 * (2 * 63 + 2 * 64 + 1))
    assert type(merged(model, x).norm) is nn.BatchNorm2d


def test_a_model_that_is_one_batch_norm():
    same(fill(nn.BatchNorm2d(3)), images())


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_the_original_is_untouched():
    model = fill(resnet18()).train()
    state = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    result = merged(model, images(size=64))
    assert [type(m) for m in model.modules()] == kinds
    assert all(m.training for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in result.parameters()}


def test_a_model_without_batch_norm_comes_back_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    assert merged(model, images()) is model


def test_without_batch_norm_merges_nothing():
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    expected, weight = model(images()), model[0].weight.clone()
    result = without_batch_norm(model)
    assert result is model
    assert type(model[1]) is ScaleShift
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.rule("storage.batch-norm")
def test_a_scale_and_shift_costs_two_values_a_channel_and_one_multiplication_and_addition_an_element():
    model = fill(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    counted = account(trace(merged(model, images()), images()[:1]), FORMULAS, freebie=False)
    assert counted.storage.bits == 6 * 32
    assert (counted.math.mults, counted.math.adds) == (2 * 3 * 36, 3 * 36)


# --- modules that only look like a batch norm or a layer --------------------------------------------------------------


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


class WithoutBias(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize("directions", [["backward", "forward"], []])
def test_a_subclass_of_batch_norm_may_do_more_and_stays(directions):
    model = fill(nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4)))
    x = images()
    result = merged(model, x, directions)
    assert torch.equal(result(x), model(x))
    assert [op.name for op in trace(result, x).ops].count("aten.relu") == 1


def test_a_batch_norm_with_a_hook_stays():
    model = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    x = images()
    assert torch.equal(merged(model, x)(x), model(x))


def test_a_subclass_of_a_layer_may_leave_out_the_bias():
    same(fill(nn.Sequential(WithoutBias(3, 4, 3), nn.BatchNorm2d(4))), images())


def test_a_batch_norm_with_two_names_is_merged_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.features = nn.Sequential(self.conv, self.norm)

        def forward(self, x):
            return self.features(x)

    result = same(fill(Twice()), images())
    assert isinstance(result.features[1], nn.Identity)
    assert isinstance(result.norm, nn.Identity)


@pytest.mark.parametrize("lacks", ["1.running_mean", "1.weight", "0.weight", "2.running_var"])
def test_a_batch_norm_that_lacks_values_is_told(lacks):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    path, _, name = lacks.partition(".")
    layer = model.get_submodule(path)
    table = layer._buffers if name in layer._buffers else layer._parameters
    kept = table[name].to("meta")
    table[name] = nn.Parameter(kept) if name == "weight" else kept
    with pytest.raises(InputError, match=f"tensor '{lacks}' has no values"):
        merged(model, torch.zeros(1, 1, 2, 2))
