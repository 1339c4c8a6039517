"""The layers that strategies work on, and their weights as matrices, whatever kind of layer it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from micronet_eval.errors import InputError
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask, build_layer, describe, original_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
DOT_PRODUCTS = (*CONVOLUTIONS, nn.Linear)


def dot_products(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions, transposed convolutions and linear layers of a model by their paths.

    Raises InputError where there is none.
    """
    found: dict[str, nn.Module] = {p: m for p, m in model.named_modules() if isinstance(m, DOT_PRODUCTS)}
    if not found:
        raise InputError("the model has no convolution and no linear layer, so there is nothing to remove")
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as it is used, masks applied, without gradient."""
    return cast(Tensor, layer.weight).detach()


def parametrizations_of(layer: nn.Module) -> ParametrizationList | None:
    """What makes the weight out of the `original` that is trained, in order; None for a plain weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return cast(ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)["weight"])


def sharing(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers of a model whose weight is that of `layer`, itself among them."""
    weight = original_of(layer, "weight")
    return [other for other in dot_products(model).values() if original_of(other, "weight") is weight]


def is_quantized(layer: nn.Module) -> bool:
    """Whether anything but masks makes the weight."""
    return any(not isinstance(p, Mask) for p in parametrizations_of(layer) or ())


def grouped(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as [groups, outputs of a group, inputs of a group, positions of the kernel]."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):  # inputs x outputs of a group
        return tensor.reshape(groups, -1, tensor.shape[1], math.prod(tensor.shape[2:])).transpose(1, 2)
    return tensor.reshape(groups, -1, tensor.shape[1], math.prod(tensor.shape[2:]))


def ungrouped(layer: nn.Module, tensor: Tensor) -> Tensor:
    """The inverse of `grouped`; the two inner dimensions may come as one."""
    groups, outputs = tensor.shape[:2]
    shape = weight_of(layer).shape
    kernel = math.prod(shape[2:])
    tensor = tensor.reshape(groups, outputs, -1, kernel)
    return (tensor.transpose(1, 2) if isinstance(layer, TRANSPOSED) else tensor).reshape(shape)


def second_moments(model: nn.Module, context: Context, batches: int, strategy: str) -> dict[str, Tensor]:
    """Of each layer that runs the sum of x x^T over calibration data: [groups, d, d], d inputs of one output value.

    The d inputs are in the order of `grouped`'s two inner dimensions. Raises InputError where a layer is quantized
    or a sum is not finite.
    """
    sums: dict[str, Tensor] = {}

    def watch(
        path: str, layer: nn.Module, description: dict[str, Any]
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        if is_quantized(layer):
            raise InputError(
                f"{strategy}: layer {path!r} is quantized already; put the sparsifier before the quantizer"
            )
        pick = _inputs_of_outputs(layer, description)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            outputs = pick(args[0])
            columns = outputs.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)
            x = columns.reshape(getattr(module, "groups", 1), -1, columns[0].numel())
            moment = x @ x.transpose(1, 2)
            sums[path] = sums[path] + moment if path in sums else moment

        return hook

    described = [(path, layer, describe(layer)) for path, layer in dot_products(model).items()]
    hooks = [layer.register_forward_pre_hook(watch(path, layer, d)) for path, layer, d in described if d is not None]
    was_training = model.training
    try:
        with torch.no_grad(), parametrize.cached():
            for inputs in context.calibration(batches):
                model.eval()(inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for path, moment in sums.items():
        if not bool(torch.isfinite(moment).all()):
            raise InputError(
                f"{strategy}: the squares of what layer {path!r} reads are not finite; train the model first"
            )
    return {path: moment.double() for path, moment in sums.items()}


def upper_factor_of_inverse(h: Tensor) -> Tensor:
    """U with H^-1 = U^T U, [..., d, d]. Raises InputError where H is not positive definite."""
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(
            "what a layer reads has second moments that cannot be inverted; raise damping, take more batches, or train "
            "the model first"
        ) from error


def _inputs_of_outputs(layer: nn.Module, description: dict[str, Any]) -> nn.Module:
    """The layer with the identity as its weight: its outputs are the inputs that each output value is a sum of.

    So padding, strides, dilation, groups and transposition are torch's own.
    """
    weight = weight_of(layer)
    groups, _, inputs, kernel = grouped(layer, weight).shape
    size = inputs * kernel
    width = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    picks = build_layer({**description, width: groups * size, "bias": False})
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device).expand(groups, size, size)
    picks.weight = nn.Parameter(ungrouped(picks, identity), requires_grad=False)
    return picks
