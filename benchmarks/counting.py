"""Counters of operations side by side, each at its best setting: what they need, and what they return."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import side_by_side

MODELS = {
    "ResNet-50": ("torchvision:resnet50", (1, 3, 224, 224)),
    "EfficientNet-B0": ("torchvision:efficientnet_b0", (1, 3, 224, 224)),
    "ViT-B/16": ("torchvision:vit_b_16", (1, 3, 224, 224)),
    "PyramidNet-272": ("pyramidnet", (1, 3, 32, 32)),
}
OURS, FORWARD, META = "micronet-eval", "forward", "meta forward"
FLOP_COUNTER, FVCORE = "FlopCounterMode", "fvcore"
RACES = 11
"""Rounds of two counters."""


def build(name: str) -> nn.Module:
    """A model of MODELS in evaluation mode."""
    from torchvision.models import get_model

    from micronet_eval import plugins

    of, _, target = MODELS[name][0].rpartition(":")
    torch.manual_seed(0)
    model: nn.Module = get_model(target) if of else plugins.lookup("architecture", target)()
    return model.eval()


def counter(name: str, which: str) -> Callable[[], float | None]:
    """A counter on a model: a function that gives MACs. Raises ImportError where it is not installed."""
    if which in (META, FLOP_COUNTER):
        with torch.device("meta"):
            on_meta, meta_x = build(name), torch.zeros(MODELS[name][1])
        return lambda: (_forward if which == META else _flop_counter)(on_meta, meta_x)
    model, x = build(name), torch.zeros(MODELS[name][1])
    if which in (OURS, FORWARD):
        return lambda: (_ours if which == OURS else _forward)(model, x)
    return PEERS[which](model, x)


def race(name: str, other: str) -> str:
    """Seconds in each round, and MACs, of ours and another on a model, as JSON; null where that is not installed.

    In a process with nothing else, as who counts has one counter: some leave much behind, on the heap, in the caches
    and in torch, that the next one pays for.
    """
    run = {OURS: quiet(counter(name, OURS))}
    try:
        run[other] = quiet(counter(name, other))
    except ImportError:
        return "null"
    seconds = side_by_side(run, RACES)
    return json.dumps({"seconds": seconds, "macs": {which: run[which]() for which in seconds}})


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

OTHERS = (FORWARD, META, FLOP_COUNTER, *PEERS)
"""All that ours is raced with."""
