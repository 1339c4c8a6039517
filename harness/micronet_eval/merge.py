"""Batch norm in evaluation is a fixed scale and shift: merged into the layer before it where that is exact.

The merge is really made, so what is counted is what runs.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from micronet_eval.storage import through_views
from micronet_eval.structure import Mask, ScaleShift, replace
from micronet_eval.trace import Op, Trace, Value, trace

_DOT_PRODUCTS = ("aten.convolution", "aten.addmm", "aten.mm")
_SAME = ("aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.view", "aten._unsafe_view")
_MERGES_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def merged(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A copy of `model` without batch norm: merged backward where exact, else a ScaleShift (2 values a channel).

    A model without batch norm is returned as it is.

    Exact means: the convolution or linear layer in front feeds nothing but this batch norm, each of the two runs
    once, and the weight is free to be scaled (not quantized). Masked weights keep their zeros.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    recorded = trace(model, example_input)
    for norm_path, layer_path in _mergeable_on_all_paths(model, recorded):
        norm = model.get_submodule(norm_path)
        assert isinstance(norm, _BatchNorm)
        _merge(model.get_submodule(layer_path), norm)
        replace(model, norm_path, nn.Identity())
    return without_batch_norm(model)


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Makes every batch norm of `model` a ScaleShift, merging nothing; changes the model and returns it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            if not path:
                return _scale_shift(module)
            replace(model, path, _scale_shift(module))
    return model


def _mergeable_on_all_paths(model: nn.Module, recorded: Trace) -> list[tuple[str, str]]:
    """The pairs of `_mergeable` that are pairs on each path of a conditional model on which one of the two runs."""
    parts = list(recorded.by_path().values())
    ran = [{op.module for op in part.ops} for part in parts]
    found = [_mergeable(model, part) for part in parts]
    return [
        pair
        for pair in dict.fromkeys(pair for pairs in found for pair in pairs)
        if all(pair in pairs or not modules.intersection(pair) for pairs, modules in zip(found, ran, strict=True))
    ]


def _mergeable(model: nn.Module, recorded: Trace) -> list[tuple[str, str]]:
    """Pairs of a batch norm's path and the path of the layer that it merges into."""
    runs: dict[str, int] = {}
    for op in recorded.ops:
        if op.name in _DOT_PRODUCTS or "batch_norm" in op.name:
            runs[op.module] = runs.get(op.module, 0) + 1
    users = recorded.users()
    reads = Counter(through_views(v) for op in recorded.ops for v in op.inputs if v.is_constant)
    pairs = []
    for op in recorded.ops:
        if "batch_norm" not in op.name or runs[op.module] != 1:
            continue
        layer = _only_source(op.args[0], users, recorded.outputs)
        norm = model.get_submodule(op.module)
        if layer is None or runs[layer.module] != 1 or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        own = model.get_submodule(layer.module)
        weight = through_views(layer.args[2 if layer.name == "aten.addmm" else 1])
        alone = parametrize.is_parametrized(own) or (weight.producer is None and reads[weight] == 1)
        if alone and _can_scale(own):
            pairs.append((op.module, layer.module))
    return pairs


def _only_source(value: Value, users: dict[Value, list[Op]], outputs: tuple[Value, ...]) -> Op | None:
    """The dot product that made `value`, if nothing else reads what lies between."""
    while value.producer is not None and len(users[value]) == 1 and value not in outputs:
        op = value.producer
        if op.name in _DOT_PRODUCTS:
            return op
        if op.name not in _SAME or op.out.shape != op.inputs[0].shape:
            return None
        value = op.inputs[0]
    return None


def _can_scale(layer: nn.Module) -> bool:
    if not isinstance(layer, _MERGES_INTO):
        return False
    if not parametrize.is_parametrized(layer):
        return True
    return list(layer.parametrizations) == ["weight"] and all(  # type: ignore[arg-type]
        isinstance(p, Mask)
        for p in layer.parametrizations["weight"]  # type: ignore[index]
    )


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """weight / sqrt(var + eps) and bias - mean * scale, in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()


def _merge(layer: nn.Module, norm: _BatchNorm) -> None:
    scale, shift = _scale_and_shift(norm)
    with torch.no_grad():
        masked = parametrize.is_parametrized(layer)
        weight = layer.parametrizations["weight"].original if masked else layer.weight  # type: ignore[index,union-attr]
        assert isinstance(weight, Tensor)
        dtype = weight.dtype
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
        if layer.bias is not None:
            shift = shift + layer.bias.double() * scale  # type: ignore[operator]
        layer.bias = nn.Parameter(shift.to(dtype))


def _scale_shift(norm: _BatchNorm) -> ScaleShift:
    scale, shift = _scale_and_shift(norm)
    layer = ScaleShift(norm.num_features)
    layer.weight = nn.Parameter(scale.to(layer.weight.dtype))
    layer.bias = nn.Parameter(shift.to(layer.bias.dtype))
    return layer
