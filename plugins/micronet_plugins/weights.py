"""The layers that strategies work on, and their weights as matrices, whatever kind of layer it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from micronet_eval.conditional import paths_of, taking
from micronet_eval.errors import InputError
from micronet_eval.strategy import Context
from micronet_eval.structure import Mask, build_layer, describe, first_input, original_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
DOT_PRODUCTS = (*CONVOLUTIONS, nn.Linear)


def dot_products(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions, transposed convolutions and linear layers of a model by their paths.

    Raises InputError where there is none, or a weight is no tensor of its own, or not finite.
    """
    found: dict[str, nn.Module] = {p: m for p, m in model.named_modules() if isinstance(m, DOT_PRODUCTS)}
    if not found:
        raise InputError("the model has no convolution and no linear layer, so there is nothing to remove")
    for path, layer in found.items():
        if (weight := _trained(layer)) is None:
            raise InputError(
                f"layer {path!r} computes its weight out of other tensors, as weight norm and torch.nn.utils.prune do; "
                "remove that first"
            )
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"the weights of layer {path!r} are not finite; train the model first")
    return found


def _trained(layer: nn.Module) -> Tensor | None:
    """The one tensor that the weight is, or is made of by parametrizations; None where there is none."""
    if (on_it := parametrizations_of(layer)) is not None:
        return getattr(on_it, "original", None)
    return {**layer._parameters, **layer._buffers}.get("weight")


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as it is used, masks applied, without gradient."""
    return cast(Tensor, layer.weight).detach()


def parametrizations_of(layer: nn.Module, name: str = "weight") -> ParametrizationList | None:
    """What makes the weight out of the `original` that is trained, in order; None for a plain weight."""
    if not parametrize.is_parametrized(layer, name):
        return None
    return cast(ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)[name])


def by_weight(model: nn.Module) -> dict[str, nn.Module]:
    """As `dot_products`, each weight once: of layers that share one the first."""
    first: dict[int, str] = {}
    layers = dot_products(model)
    for path, layer in layers.items():
        first.setdefault(id(original_of(layer, "weight")), path)
    return {path: layers[path] for path in first.values()}


def matching(what: str, patterns: Iterable[str], paths: Collection[str]) -> set[str]:
    """The paths that match one of the patterns. Raises InputError for a pattern that matches none; `what` has them."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            raise InputError(f"{what}: no layer's path matches {pattern!r}; * stands for anything")
        found.update(matches)
    return found


def sharing(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """All modules that hold the weight of `layer`, itself and embeddings among them, each with its name there."""
    weight = original_of(layer, "weight")
    modules = [module for module in model.modules() if not isinstance(module, ParametrizationList)]
    return [(module, name) for module in modules for name, tensor in _trained_in(module) if tensor is weight]


def _trained_in(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """A module's own tensors by name, those under parametrizations as they are trained."""
    yield from module._parameters.items()
    yield from module._buffers.items()
    made = cast(nn.ModuleDict, module.parametrizations) if parametrize.is_parametrized(module) else nn.ModuleDict()
    for name, on_it in made.items():
        yield name, getattr(on_it, "original", None)


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


def calibration_data(context: Context, batches: int, strategy: str) -> list[Tensor]:
    """The inputs of so many batches of training data. Raises InputError where there is none."""
    if not (data := list(context.calibration(batches))):
        raise InputError(f"{strategy}: there is no training data to calibrate on")
    return data


def run_watched(
    model: nn.Module, batches: Iterable[Tensor], watch: Mapping[nn.Module, Callable[[Tensor], None]]
) -> None:
    """Runs the model in evaluation mode, each layer of `watch` telling what it reads."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        watch[module](first_input(args, kwargs))

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in watch]
    with hooked(model, hooks), parametrize.cached():
        for inputs in batches:
            model(inputs)


@contextmanager
def hooked(model: nn.Module, hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Evaluation mode without gradients; the hooks are gone afterwards."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def read_elsewhere(model: nn.Module, inputs: Tensor, layers: Collection[nn.Module]) -> set[int]:
    """The weights of layers, by the identity of the trained tensor, that more than calls of these layers read.

    Such are a table that is the embedding, too, and a weight that a function takes: what is best for the layers'
    outputs alone is not for the model.
    """
    readers = _Readers()

    def begin(layer: nn.Module, args: Any) -> None:
        readers.running.append(id(original_of(layer, "weight")))

    def end(layer: nn.Module, args: Any, output: Any) -> None:
        readers.running.pop()

    hooks = [layer.register_forward_pre_hook(begin) for layer in layers]
    hooks += [layer.register_forward_hook(end) for layer in layers]
    with hooked(model, hooks), readers:
        for path in paths_of(model):
            with taking(model, path):
                model(inputs)
    return readers.found & {id(original_of(layer, "weight")) for layer in layers}


class _Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors that operations read, without the weights of the layers that are `running`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[int] = []
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= {id(item) for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)} - {*self.running}
        return func(*args, **(kwargs or {}))


def watchable(model: nn.Module, inputs: Tensor) -> dict[str, list[nn.Module]]:
    """The layers whose inputs tell all that a weight is for, by the first path of their weight.

    They are of torch's own kinds, and all that read the weight; a table that is the embedding, too, has none. Layers
    that share a weight multiply by it in the same way, not transposed or in other groups.
    """
    found: dict[str, list[nn.Module]] = {}
    for path, layer in by_weight(model).items():
        same = [x for x, _ in sharing(model, layer) if isinstance(x, DOT_PRODUCTS) and describe(x) is not None]
        found[path] = [x for x in same if _use(x) == _use(same[0])]
    elsewhere = read_elsewhere(model, inputs, [layer for layers in found.values() for layer in layers])
    return {path: same for path, same in found.items() if same and id(original_of(same[0], "weight")) not in elsewhere}


def _use(layer: nn.Module) -> tuple[bool, int]:
    return isinstance(layer, TRANSPOSED), getattr(layer, "groups", 1)


def second_moments(model: nn.Module, context: Context, batches: int, strategy: str) -> dict[str, Tensor]:
    """Of each weight that `watchable` layers use the sum of x x^T over calibration data, by their first path.

    [groups, d, d], d inputs of one output value in the order of `grouped`'s two inner dimensions. Without weights that
    something else reads, too. Raises InputError where there are no data or no such layers, a layer is quantized, or a
    sum is not finite.
    """
    sums: dict[str, Tensor] = {}

    def watch(path: str, layer: nn.Module) -> Callable[[Tensor], None]:
        if is_quantized(layer):
            raise InputError(
                f"{strategy}: layer {path!r} is quantized already; put the sparsifier before the quantizer"
            )
        pick = _inputs_of_outputs(layer)

        def add(x: Tensor) -> None:
            columns = pick(x).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)
            x = columns.reshape(getattr(layer, "groups", 1), -1, columns[0].numel())
            moment = x @ x.transpose(1, 2)
            sums[path] = sums[path] + moment if path in sums else moment

        return add

    data = calibration_data(context, batches, strategy)
    watched = {layer: watch(path, layer) for path, layers in watchable(model, data[0]).items() for layer in layers}
    run_watched(model, data, watched)
    if not sums:
        raise InputError(
            f"{strategy}: no layer's inputs can be seen, as none is of torch's own kind, runs, and alone reads its "
            "weight; take the sparsifier 'magnitude', which needs none"
        )
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


def _inputs_of_outputs(layer: nn.Module) -> nn.Module:
    """The layer with the identity as its weight: its outputs are the inputs that each output value is a sum of.

    So padding, strides, dilation, groups and transposition are torch's own.
    """
    weight = weight_of(layer)
    groups, _, inputs, kernel = grouped(layer, weight).shape
    size = inputs * kernel
    width = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    picks = build_layer({**(describe(layer) or {}), width: groups * size, "bias": False})
    identity = torch.eye(size, dtype=weight.dtype, device=weight.device).expand(groups, size, size)
    picks.weight = nn.Parameter(ungrouped(picks, identity), requires_grad=False)
    return picks
