"""Layers that are called by what a layer of their kind called before: every trace is the same as the long way."""

import copy
import functools
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torchvision.models import get_model

from micronet_eval import shortcuts
from micronet_eval.errors import InputError
from micronet_eval.structure import Mask
from micronet_eval.trace import Value, trace


@pytest.fixture
def long_ways(monkeypatch):
    """The modules that are called the long way, as they are called."""
    called = []
    start = shortcuts.Shortcuts.__init__

    def watched(self, recorder, call):
        def noting(module, *args, **kwargs):
            called.append(module)
            return call(module, *args, **kwargs)

        start(self, recorder, noting)

    monkeypatch.setattr(shortcuts.Shortcuts, "__init__", watched)
    return called


def told(recorded):
    """All that a trace says, values by the order in which they are met."""
    numbers = {}

    def show(item):
        if isinstance(item, Value):
            return numbers.setdefault(item, len(numbers)), item.shape, item.dtype, item.name
        if isinstance(item, list | tuple):
            return [type(item).__name__, *map(show, item)]
        return item

    operations = [
        (op.name, op.module, op.path, str(op.func), show(op.args), sorted(op.kwargs.items()), show(op.outputs))
        for op in recorded.ops
    ]
    memory = {}
    places = [(show(v), memory.setdefault(id(b), len(memory)), b.bytes) for v, b in recorded.buffers.items()]
    rest = (show(recorded.inputs), show(recorded.outputs), recorded.folded, recorded.rewritten)
    return operations, sorted(places), rest


@contextmanager
def without_shortcuts():
    kinds, shortcuts.KINDS = shortcuts.KINDS, {}
    try:
        yield
    finally:
        shortcuts.KINDS = kinds


def both_ways(model, *shape):
    """The trace, if it is the same the long way."""
    x = torch.zeros(shape)
    recorded = trace(model, x)
    with without_shortcuts():
        assert told(recorded) == told(trace(model, x))
    return recorded


def outcome(model, x):
    """What the trace says, or what is wrong."""
    try:
        return told(trace(model, x))
    except InputError as error:
        return str(error)


def outcome_both_ways(model, *shape):
    """What the trace says, or what is wrong, if it is the same the long way."""
    x = torch.zeros(shape)
    found = outcome(model, x)
    with without_shortcuts():
        assert found == outcome(model, x)
    return found


LAYERS = [
    (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=2), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 2, padding="same"), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 9, 9)),
    (lambda: nn.BatchNorm2d(4), (2, 4, 9, 9)),
    (lambda: nn.BatchNorm2d(4, affine=False, momentum=None), (2, 4, 9, 9)),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 9, 9)),
    (lambda: nn.LayerNorm(9), (2, 4, 9)),
    (lambda: nn.LayerNorm((4, 9), elementwise_affine=False), (2, 4, 9)),
    (lambda: nn.ReLU(), (2, 4)),
    (lambda: nn.ReLU(inplace=True), (2, 4)),
    (lambda: nn.ReLU6(), (2, 4)),
    (lambda: nn.ReLU6(inplace=True), (2, 4)),
    (lambda: nn.SiLU(), (2, 4)),
    (lambda: nn.SiLU(inplace=True), (2, 4)),
    (lambda: nn.GELU(), (2, 4)),
    (lambda: nn.GELU("tanh"), (2, 4)),
    (lambda: nn.Hardswish(), (2, 4)),
    (lambda: nn.Hardswish(inplace=True), (2, 4)),
    (lambda: nn.Sigmoid(), (2, 4)),
    (lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 9, 9)),
    (lambda: nn.AdaptiveAvgPool2d((1, 1)), (4, 9, 9)),
    (lambda: nn.AdaptiveAvgPool2d([1, None]), (2, 4, 9, 9)),
    (lambda: nn.AdaptiveAvgPool2d((3, None)), (2, 4, 9, 9)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[repr(layer()) for layer, _ in LAYERS])
def test_each_kind_of_layer(layer, shape):
    both_ways(nn.Sequential(layer(), layer(), nn.Sequential(layer(), layer())).eval(), *shape)


def test_every_kind_is_tested():
    assert {type(layer()) for layer, _ in LAYERS} == set(shortcuts.KINDS)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_tiny", "vit_b_16"]
)
def test_networks(name):
    both_ways(get_model(name), 1, 3, 224, 224)


def test_the_second_of_a_kind_is_called_the_short_way(long_ways):
    """Channels and groups may differ."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU(),
    ).eval()  # fmt: skip
    recorded = both_ways(model, 1, 4, 8, 8)
    assert long_ways[:4] == [model, *model[:3]]  # and then the trace without shortcuts
    assert long_ways[4:8] == [model, *model[:3]]
    assert [op.args[8] for op in recorded.ops if op.name == "aten.convolution"] == [1, 4]
    assert [op.module for op in recorded.ops] == list("012345")


def test_pooling_of_another_layout():
    """There the result is put back into that layout, by an operation of its own."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.AdaptiveAvgPool2d(1) for _ in range(3))

        def forward(self, x):
            other = (x * 2).to(memory_format=torch.channels_last)
            return self.first(x) + self.second(other) + self.third(x)

    for shape in ((2, 4, 9, 9), (2, 1, 9, 9), (2, 4, 1, 1)):  # of the last two both layouts are contiguous
        recorded = both_ways(Both(), *shape)
        assert [op.name for op in recorded.ops if op.module == "second"] != ["aten.mean"]


@pytest.mark.parametrize("size", [np.array([1, 1]), torch.tensor([1, 1]), True, (1, True), (1, None)], ids=repr)
def test_pooling_to_sizes_of_other_kinds(size):
    outcome_both_ways(nn.Sequential(*(nn.AdaptiveAvgPool2d(each) for each in (1, size, (1, 1), size))), 2, 4, 9, 9)


def test_nothing_is_set_on_torchs_classes_while_a_model_runs():
    """Python forgets what it knows of a class when one of its attributes is set."""
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append([dict(vars(kind)) for kind in (nn.Module, nn.ReLU)])
            return x

    model = nn.Sequential(nn.ReLU(), Watching())
    both_ways(model, 1, 4)
    assert all(
        table == dict(vars(kind)) for tables in seen for kind, table in zip((nn.Module, nn.ReLU), tables, strict=True)
    )
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


def test_layers_that_are_compiled_run_as_they_are_and_stay_compiled():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)))
    plain = told(trace(model, torch.zeros(1, 4, 8, 8)))
    model[2].compile(backend="eager")
    compiled = model[2]._compiled_call_impl
    assert told(both_ways(model, 1, 4, 8, 8)) == plain
    assert model[2]._compiled_call_impl is compiled


def copied(module):
    """A copy that has the same table, as replicas for several devices have."""
    copy = type(module).__new__(type(module))
    vars(copy).update(vars(module))
    return copy


def with_stride(conv):
    conv.stride = (2, 2)
    return conv


@pytest.mark.parametrize(
    ("layer", "of", "names"),
    [
        (nn.Conv2d(4, 4, 3), lambda layer: with_stride(copied(layer)), ["aten.convolution"]),
        (nn.ReLU(), lambda layer: with_forward(copied(layer)), ["aten.mul"]),
        (nn.LSTM(8, 8), lambda layer: with_forward(copy.copy(layer)), ["aten.mul"]),
        (nn.ReLU(), lambda layer: pickle.loads(pickle.dumps(layer)), ["aten.relu"]),
        (nn.LSTM(8, 8), lambda layer: with_forward(pickle.loads(pickle.dumps(layer))), ["aten.mul"]),
    ],
)
def test_copies_that_a_forward_makes_of_layers_run_themselves(layer, of, names):
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return of(self.layer)(x)

    x = torch.zeros(1, 4, 8, 8)
    recorded = trace(Copies(), x)
    assert [op.name for op in recorded.ops] == names
    assert recorded.outputs[0].shape == Copies()(x).shape


class Own(nn.ReLU):
    def forward(self, x):
        return x + 1


class Ours(nn.ReLU):
    pass


OPTIONS = [
    (nn.Conv2d, {"padding": 1}, {"padding": (1, 0)}),
    (nn.Conv2d, {"padding": 2}, {"padding": 2, "dilation": 2}),
    (nn.Conv2d, {"padding": 1}, {"padding": 1, "stride": 2}),
    (nn.Conv2d, {"padding": 1}, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, {"padding": 1}, {"padding": (1.0, 1)}),
    (nn.Conv2d, {"padding": 1}, {"padding": 1, "stride": 1.0}),
    (nn.Conv2d, {"padding": 1}, {"padding": 1, "stride": True}),
    (nn.Conv2d, {"padding": 1}, {"padding": 1, "dtype": torch.float64}),
    (nn.BatchNorm2d, {}, {"eps": 0.1}),
    (nn.BatchNorm2d, {}, {"momentum": 0.5}),
    (nn.BatchNorm2d, {}, {"momentum": None}),
    (nn.BatchNorm2d, {}, {"track_running_stats": False}),
    (nn.LayerNorm, {}, {"eps": 0.1}),
    (nn.LayerNorm, {}, {"normalized_shape": (8, 8)}),
    (nn.ReLU, {}, {"inplace": True}),
    (nn.ReLU6, {}, {"inplace": True}),
    (nn.SiLU, {}, {"inplace": True}),
    (nn.Hardswish, {}, {"inplace": True}),
    (nn.GELU, {}, {"approximate": "tanh"}),
]
FIRST = {nn.Conv2d: (4, 4, 3), nn.BatchNorm2d: (4,), nn.LayerNorm: (8,)}


@pytest.mark.parametrize(("kind", "some", "other"), OPTIONS)
def test_options(kind, some, other):
    first = FIRST.get(kind, ())
    make = [
        kind(*(() if "normalized_shape" in options else first), **options)
        for options in (some, some, other, other, some)
    ]
    outcome_both_ways(nn.Sequential(*make).eval(), 2, 4, 8, 8)


@pytest.mark.parametrize("attribute", ["min_val", "max_val"])
def test_limits_that_are_set_from_outside(attribute):
    layers = [nn.ReLU6() for _ in range(4)]
    setattr(layers[2], attribute, 3.0)
    recorded = both_ways(nn.Sequential(*layers), 1, 4)
    assert len({(op.args[1], op.args[2]) for op in recorded.ops}) == 2


def with_hook(layer):
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def with_forward(layer):
    layer.forward = lambda x: x * 3
    return layer


def masked(layer):
    parametrize.register_parametrization(layer, "weight", Mask(torch.ones_like(layer.weight)))
    return layer


@pytest.mark.parametrize(
    "other",
    [
        lambda: Own(),
        lambda: Ours(),
        lambda: with_hook(nn.ReLU()),
        lambda: with_pre_hook(nn.ReLU()),
        lambda: with_forward(nn.ReLU()),
        lambda: masked(nn.Conv2d(4, 4, 1)),
        lambda: with_hook(nn.Conv2d(4, 4, 1)),
        lambda: nn.Conv2d(4, 4, 1, bias=False),
        lambda: nn.Conv2d(4, 4, 1, stride=2),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 5, padding="same")),
        lambda: nn.BatchNorm2d(4, affine=False),
    ],
)
def test_a_layer_that_does_something_else_than_those_before(other):
    first = [nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    both_ways(nn.Sequential(*first, *copy.deepcopy(first), other(), *copy.deepcopy(first)).eval(), 1, 4, 8, 8)


def test_attributes_that_are_lists():
    layers = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    layers[1].stride, layers[2].padding = [2, 2], [1, 1]
    both_ways(nn.Sequential(*layers), 1, 4, 8, 8)


def test_global_hooks_run(long_ways):
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    handle = register_module_forward_hook(lambda module, args, out: out)
    try:
        both_ways(model, 1, 4)
    finally:
        handle.remove()
    assert long_ways[:3] == [model, *model]


class InForward(nn.Module):
    """Runs four like layers, the last two of them within something."""

    def __init__(self, within):
        super().__init__()
        self.within, self.layers = within, nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x):
        x = self.layers[1](self.layers[0](x))
        return self.within(lambda x: self.layers[3](self.layers[2](x)), x)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + result if func is F.conv2d or getattr(func, "__name__", "") == "conv2d" else result


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.convolution.default else result


def doubled(run, x):
    with Doubling():
        return run(x)


def counted(run, x):
    with Counting():
        return run(x)


def narrowed(run, x):
    with torch.autocast("cpu", torch.bfloat16):
        return run(x)


def mapped(run, x):
    return torch.vmap(run, in_dims=0)(x[:, None])


def empty(run, x):
    return run(x[:, :, :0])


def keyword(run, x):
    return run(nn.ReLU()(input=x))


@pytest.mark.parametrize("within", [doubled, counted, narrowed, mapped, empty, keyword])
def test_what_a_forward_sets_up_around_layers(within):
    operations, *_ = outcome_both_ways(InForward(within), 2, 3, 4, 4)
    assert operations


class Running(nn.Module):
    """Runs a function on its layers and the input."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(self.layers, x)


def force(layers, x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((y * y + layers[1](layers[0](y))).sum(), y)[0]


def gradient_of_a_closure(layers, x):
    layers[0](x)
    return torch.func.grad(lambda z: (z * layers[1](x)).sum())(x)


def dual(layers, x):
    layers[0](x)
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layers[1](forward_ad.make_dual(x, x * 2))).tangent + 1


def conjugate(layers, x):
    return layers[1](torch.fft.fft2(layers[0](x)).conj().imag)


def training(layers, x):
    for layer in layers:
        x = layer.train()(x)
    return x


def of_no_tensor(layers, x):
    layers[1](x)
    try:
        return layers[0](None)
    except TypeError:
        return layers[2](x)


def without_modes(layers, x):
    layers[0](x)
    with _disable_current_modes(), Counting():
        return layers[1](torch.zeros_like(x, device="meta"))


def tiled(layer):
    layer._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)
    return layer


def with_weight(layer, *shape):
    layer.weight = nn.Parameter(torch.ones(shape))
    return layer


def with_groups(layer, groups):
    layer.groups = groups
    return layer


def shadowed(layers, x):
    x = layers[0](x)
    layers[1].__dict__["weight"] = layers[1].weight * 2
    return layers[1](x)


def with_buffer(layer, name, value):
    delattr(layer, name)
    layer.register_buffer(name, torch.tensor(value))
    return layer


def without_bias_then_weight():
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    first.weight, second.bias = None, None
    weight = second.weight
    del second.weight
    second.weight = weight
    return first, second


UNUSUAL = {
    "gradients, SiLU": lambda: Running(force, nn.SiLU(), nn.SiLU()),
    "gradients, Conv2d": lambda: Running(force, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
    "torch.func.grad": lambda: Running(gradient_of_a_closure, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
    "forward mode": lambda: Running(dual, nn.SiLU(), nn.SiLU()),
    "conjugate": lambda: Running(conjugate, nn.ReLU(), nn.ReLU()),
    "another mode alone": lambda: Running(without_modes, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
    "batch norm of 1 channel": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(1)),
    "batch norm of 4 channels": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4)),
    "batch norm of 1 value": lambda: nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(3, track_running_stats=False),
    ),
    "scale of 1 channel": lambda: nn.Sequential(nn.BatchNorm2d(3), with_weight(nn.BatchNorm2d(3), 1)),
    "training": lambda: Running(training, nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
    "no tensor": lambda: Running(of_no_tensor, nn.ReLU(), nn.ReLU(), nn.ReLU()),
    "_conv_forward": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), tiled(nn.Conv2d(3, 3, 3, padding=1))),
    "groups": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), with_groups(nn.Conv2d(3, 3, 1), 1.0)),
    "shadowed weight": lambda: Running(shadowed, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
    "padding by the weight": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 3, padding="same"), with_weight(nn.Conv2d(3, 3, 3, padding="same"), 3, 3, 5, 5)
    ),
    "an option is a buffer": lambda: nn.Sequential(nn.BatchNorm2d(3), with_buffer(nn.BatchNorm2d(3), "eps", 1e-3)),
    "weight or bias": lambda: nn.Sequential(*without_bias_then_weight()),
    "dtypes": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1).double()),
    "complex": lambda: nn.Sequential(nn.Sigmoid(), nn.Conv2d(3, 3, 1, dtype=torch.complex64)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, as forward mode is first used
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_as_usual(name):
    outcome_both_ways(UNUSUAL[name]().eval(), 2, 3, 8, 8)


@pytest.mark.parametrize("owner", [nn.Conv2d, nn.Module])
def test_classes_that_somebody_has_patched(owner, monkeypatch):
    name = "_conv_forward" if owner is nn.Conv2d else "_call_impl"
    before = getattr(owner, name)

    @functools.wraps(before)
    def patched(self, *args):
        result = before(self, *args)
        return result * 2 if getattr(self, "special", False) else result

    monkeypatch.setattr(owner, name, patched)
    layers = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    layers[1].special = True
    recorded = both_ways(nn.Sequential(*layers), 1, 3, 8, 8)
    assert [op.name for op in recorded.ops] == ["aten.convolution", "aten.convolution", "aten.mul", "aten.convolution"]


def test_weights_that_a_forward_puts_in(long_ways):
    class Fast(nn.Module):
        """A layer's weight is what another makes of the input."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            y = self.first(x)
            del self.second.weight
            self.second.weight = y.mean((0, 2, 3)).view(3, 1, 1, 1).expand(3, 3, 1, 1)
            return self.second(y)

    recorded = both_ways(Fast(), 1, 3, 4, 4)
    assert not recorded.ops[-1].args[1].is_constant


def test_a_layer_with_one_tensor_twice_teaches_nothing():
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    norms[0].bias = norms[0].weight
    recorded = both_ways(nn.Sequential(*norms).eval(), 1, 4, 3, 3)
    assert [[v.name for v in op.args[1:3]] for op in recorded.ops] == [
        ["0.weight", "0.weight"], ["1.weight", "1.bias"], ["2.weight", "2.bias"],
    ]  # fmt: skip


def test_what_does_not_fit_is_told_as_before():
    assert "in module '1'" in outcome_both_ways(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)), 1, 3, 4, 4)
