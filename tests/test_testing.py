"""The conformance kit: every bundled strategy passes it, and it catches strategies that are broken on purpose."""

import copy
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize

from micronet_eval import plugins
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.strategy import Pruner, Quantizer, Sparsifier
from micronet_eval.structure import Mask, copied, leaves, replace
from micronet_eval.testing import check_pruner, check_quantizer, check_sparsifier, checks

OPTIONS = {"low-rank": {"parameters": 900}}
"""Options without a default, or whose default is not for networks as small as those of the checks."""

BUNDLED = [
    pytest.param(check, id=f"{kind} {name}: {which}")
    for kind in ("pruner", "sparsifier", "quantizer")
    for name, entry in plugins.registered(kind).items()
    if name not in ("torchao", "brevitas") or find_spec(name)
    for which, check in checks(entry.thing(**OPTIONS.get(name, {})))
]


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # in torchao's own code
@pytest.mark.parametrize("check", BUNDLED)
def test_a_bundled_strategy(check):
    check()


# --- broken on purpose ------------------------------------------------------------------------------------------------


def weights(model):
    return [layer for _, layer in leaves(model) if isinstance(layer, nn.Conv2d | nn.Linear)]


class Halves(Sparsifier):
    """Zeros half of each weight, at random."""

    share: float = Field(0.5, gt=0, lt=1, description="share of zeros")

    def apply(self, model, context):
        model = copied(model)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in weights(model):
            mask = torch.rand(layer.weight.shape, generator=generator) > self.share
            parametrize.register_parametrization(layer, "weight", Mask(mask))
        return model


class Fixed(Quantizer):
    """Weights of 8 bits."""

    def apply(self, model, context):
        model = copied(model)
        for layer in weights(model):
            parametrize.register_parametrization(layer, "weight", FixedPointQuantizer(8, -6))
        return model


class Splits(Pruner):
    """Two thin linear layers in the place of one."""

    def apply(self, model, context):
        model = copy.deepcopy(model)
        for path, layer in list(leaves(model)):
            if isinstance(layer, nn.Linear) and layer.out_features * layer.in_features > 20:
                outputs, inputs = layer.weight.shape
                thin = nn.Sequential(nn.Linear(inputs, 1, bias=False), nn.Linear(1, outputs))
                replace(model, path, thin)
        return model


def test_what_holds_passes():
    check_sparsifier(Halves)
    check_sparsifier(Halves(share=0.9))
    check_quantizer(Fixed)
    check_pruner(Splits)


class Draws(Halves):
    """Another mask each time."""

    calls: ClassVar[int] = 0

    def apply(self, model, context):
        type(self).calls += 1
        torch.manual_seed(type(self).calls)
        model = copied(model)
        for layer in weights(model):
            parametrize.register_parametrization(layer, "weight", Mask(torch.rand(layer.weight.shape) > 0.5))
        return model


class InPlace(Halves):
    """Zeros the weights that it was given."""

    def apply(self, model, context):
        with torch.no_grad():
            for layer in weights(model):
                layer.weight[layer.weight < 0] = 0
        return super().apply(model, context)


class LeavesAHook(Halves):
    """Leaves a hook in the model that it was given."""

    def apply(self, model, context):
        weights(model)[0].register_forward_hook(lambda layer, inputs, output: output * 2)
        return super().apply(model, context)


class TrainingMode(Halves):
    """Leaves the model that it was given in training mode."""

    def apply(self, model, context):
        model.train()
        return super().apply(model, context)


class Peeks(Halves):
    """Looks at the test data."""

    def apply(self, model, context):
        plugins.lookup("task", "digits").dataset(None, "test")
        return super().apply(model, context)


class WithoutMask(Halves):
    """Zeros that nothing holds."""

    def apply(self, model, context):
        model = copied(model)
        with torch.no_grad():
            for layer in weights(model):
                layer.weight[layer.weight < 0] = 0
        return model


class DoesNothing(Halves):
    """Returns the model as it is."""

    def apply(self, model, context):
        return copied(model)


class ReturnsNothing(Halves):
    """Forgets to return."""

    def apply(self, model, context):
        super().apply(model, context)


class Undocumented(Halves):
    share: float = 0.5


class Guesses(Halves):
    """Takes any option."""

    model_config = ConfigDict(extra="allow")


class TakesAnything(Halves):
    """An option without a type."""

    share: object = Field(0.5, description="share")

    def apply(self, model, context):
        return Halves().apply(model, context)


class Rounded(Fixed):
    """Rounds once, without a quantizer."""

    def apply(self, model, context):
        model = copied(model)
        with torch.no_grad():
            for layer in weights(model):
                layer.weight.copy_((layer.weight * 64).round() / 64)
        return model


class NoGradient(nn.Module):
    def forward(self, x):
        return (x.detach() * 64).round() / 64


class Stuck(Splits):
    """No gradient reaches the weights."""

    def apply(self, model, context):
        model = super().apply(model, context)
        for layer in weights(model):
            layer.weight.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
        for _, layer in leaves(model):
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
                layer.bias.requires_grad_(False)
                layer.track_running_stats, layer.momentum = True, 0.0
        return model


class Scaled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 1.0


class Unpackable(Splits):
    """A layer that no file can describe."""

    def apply(self, model, context):
        model = super().apply(model, context)
        for path, layer in list(leaves(model)):
            if isinstance(layer, nn.Linear):
                replace(model, path, Scaled(layer))
        return model


class Picky(Halves):
    """Refuses every network."""

    def apply(self, model, context):
        from micronet_eval.errors import InputError

        raise InputError("none is good enough")


@pytest.mark.parametrize(
    ("check", "strategy", "message"),
    [
        (check_sparsifier, Draws, "another result each time"),
        (check_sparsifier, InPlace, "changes"),
        (check_sparsifier, LeavesAHook, "changes what"),
        (check_sparsifier, TrainingMode, "changes the"),
        (check_sparsifier, Peeks, "asks a task for its test data"),
        (check_sparsifier, WithoutMask, "zeros of the plain network do not last"),
        (check_sparsifier, DoesNothing, "nonzeros afterwards"),
        (check_sparsifier, ReturnsNothing, "returned NoneType"),
        (check_sparsifier, Undocumented, "docstring|description"),
        (check_sparsifier, Guesses, "takes an option that it does not have"),
        (check_sparsifier, TakesAnything, "takes any value"),
        (check_sparsifier, Picky, "refuses the plain network: none is good enough"),
        (check_quantizer, Rounded, "nothing in the plain network is narrower"),
        (check_pruner, Stuck, "cannot be trained afterwards"),
        (check_pruner, Unpackable, "cannot be packed"),
        (check_pruner, Halves, "is no pruner"),
    ],
)
def test_what_is_broken_is_caught(check, strategy, message):
    with pytest.raises(AssertionError, match=message):
        check(strategy)
