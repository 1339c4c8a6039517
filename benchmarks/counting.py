"""Counters of operations side by side, each at its best setting: what they need, and what they return."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MODELS = {
    "ResNet-50": ("torchvision:resnet50", (1, 3, 224, 224)),
    "EfficientNet-B0": ("torchvision:efficientnet_b0", (1, 3, 224, 224)),
    "ViT-B/16": ("torchvision:vit_b_16", (1, 3, 224, 224)),
    "PyramidNet-272": ("pyramidnet", (1, 3, 32, 32)),
}
OURS, FORWARD, META, FVCORE = "micronet-eval", "forward", "meta forward", "fvcore"


def build(name: str) -> nn.Module:
    """A model of MODELS in evaluation mode."""
    from torchvision.models import get_model

    from micronet_eval import plugins

    of, _, target = MODELS[name][0].rpartition(":")
    torch.manual_seed(0)
    model: nn.Module = get_model(target) if of else plugins.lookup("architecture", target)()
    return model.eval()


def counters(name: str) -> dict[str, Callable[[], float | None] | None]:
    """Every counter on one model: a function that gives MACs; None where it is not installed."""
    shape = MODELS[name][1]
    x, model = torch.zeros(shape), build(name)
    with torch.device("meta"):
        on_meta, meta_x = build(name), torch.zeros(shape)
    found: dict[str, Callable[[], float | None] | None] = {
        OURS: lambda: _ours(model, x),
        FORWARD: lambda: _forward(model, x),
        META: lambda: _forward(on_meta, meta_x),
        "FlopCounterMode": lambda: _flop_counter(on_meta, meta_x),
    }
    for package, make in PEERS.items():
        try:
            found[package] = make(model, x)
        except ImportError:
            found[package] = None
    return found


def quiet(count: Callable[[], float | None]) -> Callable[[], float | None]:
    """The same without what it prints; None where it fails on the model."""

    def run() -> float | None:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            return count()

    return run


def _ours(model: nn.Module, x: Tensor) -> float:
    from micronet_eval import score

    return score(model, x).math.macs


def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)


def _flop_counter(model: nn.Module, x: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def _fvcore(model: nn.Module, x: Tensor) -> Callable[[], float]:
    from fvcore.nn import FlopCountAnalysis

    def count() -> float:
        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return analysis.tracer_warnings("none").total()

    return count


def _ptflops(model: nn.Module, x: Tensor) -> Callable[[], float]:
    from ptflops import get_model_complexity_info

    options: dict[str, Any] = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return lambda: get_model_complexity_info(model, tuple(x.shape[1:]), backend="pytorch", **options)[0]


def _thop(of: str) -> Callable[[nn.Module, Tensor], Callable[[], float]]:
    """Both packages install a module of this name: only one of them can be there."""

    def make(model: nn.Module, x: Tensor) -> Callable[[], float]:
        import thop

        if ("ultralytics-thop" if thop.__version__.startswith("2") else "thop") != of:
            raise ImportError(of)
        return lambda: thop.profile(model, inputs=(x,), verbose=False)[0]

    return make


def _calflops(model: nn.Module, x: Tensor) -> Callable[[], float]:
    from calflops import calculate_flops

    options = {"output_as_string": False, "print_results": False, "print_detailed": False}
    return lambda: calculate_flops(model=model, input_shape=tuple(x.shape), **options)[1]


def _torchinfo(model: nn.Module, x: Tensor) -> Callable[[], float]:
    from torchinfo import summary

    return lambda: summary(model, input_data=x, verbose=0).total_mult_adds


def _torchprofile(model: nn.Module, x: Tensor) -> Callable[[], float]:
    from torchprofile import profile_macs

    return lambda: profile_macs(model, x)


PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], float]]] = {
    FVCORE: _fvcore,
    "ptflops": _ptflops,
    "thop": _thop("thop"),
    "ultralytics-thop": _thop("ultralytics-thop"),
    "calflops": _calflops,
    "torchinfo": _torchinfo,
    "torchprofile": _torchprofile,
}
