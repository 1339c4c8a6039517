"""Where activation quantizers go: after fixed point no multiplication sees more bits than it was given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v2, resnet18
from torchvision.ops import SqueezeExcitation

from micronet_eval.costs import FORMULAS
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.placement import multiplied_nodes
from micronet_eval.scoring import account
from micronet_eval.strategy import Context
from micronet_eval.structure import quantizers_of, traced
from micronet_eval.trace import trace
from micronet_plugins.architectures import wide_resnet
from micronet_plugins.fixed_point import FixedPointStrategy

WEIGHT_BITS, ACTIVATION_BITS = 7, 9


class Dense(nn.Module):
    """Every layer reads all that was computed before it, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        a = self.first(x).relu()
        b = self.second(a)
        return self.last(F.max_pool2d(torch.cat([a, b.relu()], 1), 2)).mean((2, 3))


class Residual(nn.Module):
    """A functional sum that is read by a convolution and by the next sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(F.relu(x))
        x = x + self.b(x)
        return torch.sigmoid(x)


class Gated(nn.Module):
    """Squeeze and excitation: a product of two activations."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.gate(F.silu(self.conv(x))).mean((2, 3)))


class Branching(nn.Module):
    """Its Python code depends on the values of a tensor."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def context(size=8):
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.zeros(8, dtype=torch.int64)), batch_size=4)
    return Context(images[:1], loader, 0, FORMULAS)


def quantized(model, size=8):
    torch.manual_seed(0)
    strategy = FixedPointStrategy(weight_bits=WEIGHT_BITS, activation_bits=ACTIVATION_BITS, batches=1)
    return strategy.apply(model.eval(), context(size))


def nodes_of(model):
    return multiplied_nodes(traced(model.eval()), torch.zeros(1, 3, 8, 8), ACTIVATION_BITS, FORMULAS)


MODELS = {
    "residual": (Residual, 8),
    "dense": (Dense, 8),
    "gated": (Gated, 8),
    "wide resnet": (lambda: wide_resnet(10, 1), 8),
    "resnet18": (resnet18, 32),
    "mobilenet v2": (mobilenet_v2, 32),
    "mobilenet v2, merged": (lambda: merged(mobilenet_v2().eval(), torch.zeros(1, 3, 32, 32)), 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_multiplication_sees_more_bits_than_it_was_given(name):
    build, size = MODELS[name]
    counted = account(trace(quantized(build(), size), torch.zeros(1, 3, size, size)), FORMULAS)
    multiplying = [layer for layer in counted.layers if layer.mults]
    assert multiplying
    assert {layer.input_bits for layer in multiplying} == {ACTIVATION_BITS}
    assert {layer.weight_bits for layer in multiplying} <= {0, WEIGHT_BITS}
    assert any(layer.weight_bits for layer in multiplying)
    assert counted.math.mult_ops32 == counted.math.mults * ACTIVATION_BITS / 32


@pytest.mark.parametrize("name", ["residual", "dense", "gated", "resnet18"])
def test_quantization_is_close_to_the_model_at_many_bits(name):
    build, size = MODELS[name]
    model = build().eval()
    strategy = FixedPointStrategy(weight_bits=16, activation_bits=16, batches=1)
    x = context(size).example_input
    with torch.no_grad():
        expected, actual = model(x), strategy.apply(model, context(size))(x)
    assert (actual - expected).norm() <= 0.01 * expected.norm()


def test_a_residual_sum_is_quantized_once_for_all_that_read_it():
    # `stem` for the relu, which keeps it narrow; `add` for the second convolution; `add_1` for the sigmoid. Not `a` and
    # `b`, which are only added.
    assert nodes_of(Residual()) == ["x", "stem", "add", "add_1"]


def test_a_value_is_quantized_where_it_is_computed_and_not_behind_what_only_selects():
    # Not behind cat and max_pool2d: their parts are narrow already. `first` and `second` feed the products of relu.
    assert nodes_of(Dense()) == ["x", "first", "second", "last"]


def test_values_that_are_narrow_already_need_no_quantizer():
    model = quantized(Residual())
    assert multiplied_nodes(model, torch.zeros(1, 3, 8, 8), ACTIVATION_BITS, FORMULAS) == []
    assert multiplied_nodes(model, torch.zeros(1, 3, 8, 8), ACTIVATION_BITS - 1, FORMULAS) != []


def test_sums_alone_need_no_quantizer():
    class Sum(nn.Module):
        def forward(self, x):
            return x + x

    assert nodes_of(Sum()) == []


def test_every_weight_is_on_the_grid_of_its_bits():
    model = quantized(Residual())
    for layer in (model.stem, model.a, model.b):
        quantizer = layer.parametrizations["weight"][0]
        steps = layer.weight / 2.0 ** int(quantizer.exponent)
        assert torch.equal(steps, steps.round())
        assert steps.min() >= -(2 ** (WEIGHT_BITS - 1))
        assert steps.max() < 2 ** (WEIGHT_BITS - 1)


def test_the_original_is_untouched():
    model = Residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = quantized(model)
    assert quantizers_of(result)
    assert not quantizers_of(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_traced_is_an_input_error():
    with pytest.raises(InputError, match="traceable"):
        quantized(Branching())


def test_a_product_inside_a_layer_is_an_input_error_that_names_it():
    """Attention multiplies values that exist only inside of torch's own layer."""
    model = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True))
    with pytest.raises(InputError, match="inside '1"):
        quantized(model)
