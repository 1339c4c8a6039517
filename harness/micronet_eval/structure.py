"""The structure of a model: layers described as data, layers replaced, quantizers set into the graph.

A compressed model is its registered architecture plus what changed in it. The changes are found by comparing the two,
so a pruner needs no bookkeeping: whatever it builds out of the layers below can be packed and built again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from micronet_eval.conditional import conditional_of
from micronet_eval.errors import InputError
from micronet_eval.formats import ActivationQuantizer, AffineQuantizer, FixedPointQuantizer, SignQuantizer, accumulator

QUANTIZERS = "quantizers"
"""The submodule that holds a model's activation quantizers, each under the name of its place in the graph."""

OF_INPUT = ":input"
"""Behind the name of a node: the quantizer stands in front of it, for what this node alone reads."""


class StructureError(ValueError):
    """A description of a layer, or a place in a graph, that does not fit the model."""


class ScaleShift(nn.Module):
    """One multiplication and one addition an element, per channel (dimension 1): a batch norm that cannot be merged."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.dim() - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return str(self.num_features)


class Mask(nn.Module):
    """A parametrization that holds the zeros of a sparse weight in place while the rest is trained."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.Identity, ScaleShift,
    )
}  # fmt: skip
"""The layers that a replacement may consist of, alone or in a Sequential."""


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of random weights, which has no effect on the meta device but takes seconds there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and (drawn := args[0] if args else kwargs["tensor"]).is_meta:
            return drawn
        return func(*args, **kwargs)


_DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built in here have their parameters on the meta device: shapes, but no values."""
    with torch.device("meta"), _NoDraws():
        yield


# --- layers as data ---------------------------------------------------------------------------------------------------


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, seen through parametrizations."""
    return parametrize.type_before_parametrizations(module)


def original_of(layer: nn.Module, name: str) -> Tensor:
    """The trained tensor behind a parameter's parametrizations."""
    if parametrize.is_parametrized(layer, name):
        original = layer.parametrizations[name].original  # type: ignore[index,union-attr]
        assert isinstance(original, Tensor)
        return original
    parameter: Tensor = getattr(layer, name)
    return parameter


def describe(module: nn.Module) -> dict[str, Any] | None:
    """A layer of LAYERS, or a Sequential of them, as plain data; None for everything else."""
    kind = layer_type(module)
    children = dict(module.named_children())
    children.pop("parametrizations", None)
    if children:
        # Tracing turns a Sequential into a bare Module with the same children.
        if kind not in (nn.Sequential, nn.Module) or list(children) != [str(i) for i in range(len(children))]:
            return None
        layers = [describe(child) for child in children.values()]
        return None if None in layers else {"type": "Sequential", "layers": layers}
    if LAYERS.get(kind.__name__) is not kind:
        return None
    options: dict[str, Any] = {"type": kind.__name__}
    for name, parameter in _options(kind).items():
        value = getattr(module, name)
        if name == "bias":
            value = value is not None
        if isinstance(value, tuple):
            value = list(value)
        if value != parameter.default:
            options[name] = value
    return options


def _options(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The options of a layer that a file may have; an Identity takes any, and uses none."""
    elsewhere = ("device", "dtype", "args", "kwargs")
    return {name: told for name, told in inspect.signature(kind).parameters.items() if name not in elsewhere}


def build_layer(description: dict[str, Any]) -> nn.Module:
    """The layer that `describe` described. Raises StructureError where the description is not of that form."""
    if not isinstance(description, dict):
        raise StructureError(f"{description!r} describes no layer")
    options = dict(description)
    kind = options.pop("type", None)
    if kind == "Sequential":
        layers = options.pop("layers", None)
        if not isinstance(layers, list):
            raise StructureError(f"a Sequential has a list of layers, not {layers!r}")
        if options:
            raise StructureError(f"a Sequential has no option {min(options)!r} in a file")
        return nn.Sequential(*(build_layer(layer) for layer in layers))
    if not isinstance(kind, str) or kind not in LAYERS:
        raise StructureError(f"no layer type {kind!r}; known: Sequential, {', '.join(LAYERS)}")
    if unknown := options.keys() - _options(LAYERS[kind]).keys():
        raise StructureError(f"a {kind} has no option {min(unknown)!r} in a file")
    try:
        layer = LAYERS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise StructureError(f"a {kind} cannot be built from {options}: {error}") from error
    if isinstance(layer, _BatchNorm) and layer.running_mean is None:
        raise StructureError(f"a {kind} without running statistics computes across the examples of a batch")
    return layer


_HOOKS: dict[type, str] = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
"""Hooks that make a weight out of other tensors before each call."""


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing: torch gives the copy of a parametrized module the class of the original.

    Raises InputError for the weight_norm and spectral_norm that are no parametrizations: they cannot be packed, and
    torch cannot copy them once they ran with gradients.
    """
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if name := _HOOKS.get(type(hook)):
                raise InputError(f"layer {path!r} has {name}; remove it first: torch.nn.utils.remove_{name}(layer)")
    model = copy.deepcopy(model)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)
            attributes = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, attributes)
    return model


CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Kinds of modules that are no layers, but hold them."""


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    """The class and options of a module and of what it holds, without parametrizations."""
    held = [(name, _kinds(child)) for name, child in module.named_children() if name != "parametrizations"]
    return layer_type(module), module.extra_repr(), held


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing and comparing take a module as a whole: torch's own layers, and the ones defined here."""
    kind = layer_type(module)
    own = kind is ScaleShift or issubclass(kind, ActivationQuantizer)
    return own or (kind.__module__.startswith("torch.nn") and kind not in CONTAINERS)


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model with their paths."""
    if is_leaf(module):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from leaves(child, f"{prefix}.{name}" if prefix else name)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts `layer` at `path`. Raises StructureError where there is no such place."""
    parent, _, name = path.rpartition(".")
    owner = submodule(model, parent)
    if owner is None or name not in dict(owner.named_children()):
        raise StructureError(f"the architecture has no module {path!r}")
    setattr(owner, name, layer)


def changes(architecture: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which layers of `architecture` are other layers in `model`: path -> description."""
    changed = {}
    for path, layer in leaves(architecture):
        now = submodule(model, path)
        if now is None:
            continue  # never used, so tracing dropped it
        before, after = describe(layer), describe(now)
        if before != after or (after is None and _kinds(layer) != _kinds(now)):
            if after is None:
                raise StructureError(
                    f"module {path!r} became a {layer_type(now).__name__}, which cannot be packed; "
                    f"use layers of: Sequential, {', '.join(LAYERS)}"
                )
            changed[path] = after
    return changed


# --- the graph --------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def traced(model: nn.Module) -> fx.GraphModule:
    """The model as a graph whose nodes are its layers and functional operations; shares the model's parameters.

    Raises StructureError where the model's Python code depends on the values or shapes of tensors, as that of a
    conditional model does.
    """
    if isinstance(model, fx.GraphModule):
        return model
    if conditional_of(model) is not None:
        raise StructureError(
            "activation quantizers cannot be set into a model with several paths; use FixedPointQuantizer in its code"
        )
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # fx raises many kinds, all meaning that the forward cannot be traced
        raise StructureError(f"activation quantizers need a traceable model, and this is not one: {error}") from error
    return quiet(fx.GraphModule(model, graph, type(model).__name__))


def quiet(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same module, which leaves it to whoever catches an error to tell it: torch.fx would print the code, too."""
    type(graph_module).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return graph_module


def set_quantizers(graph_module: fx.GraphModule, quantizers: Mapping[str, ActivationQuantizer]) -> None:
    """Sets each quantizer behind the node of its name: all that used the node's value use the quantized one.

    A name that ends in OF_INPUT sets it in front of the node, whose first argument it rounds; what else uses that value
    reads it as it was. Raises StructureError for a name that is no node, and for a node without a first argument.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes if node.op != "output"}
    if not hasattr(graph_module, QUANTIZERS):
        graph_module.add_module(QUANTIZERS, nn.Module())
    for name, quantizer in quantizers.items():
        node, path = nodes.get(name.removesuffix(OF_INPUT)), f"{QUANTIZERS}.{name}"
        if node is None:
            raise StructureError(f"the graph has no node {name!r} to quantize")
        in_front, graph = name.endswith(OF_INPUT), graph_module.graph
        source = first_input(node.args, node.kwargs) if in_front else node
        if not isinstance(source, fx.Node):
            raise StructureError(f"the graph's node {node.name!r} has no first argument to quantize")
        graph_module.add_submodule(path, quantizer)
        with graph.inserting_before(node) if in_front else graph.inserting_after(node):
            quantized = graph.call_module(path, (source,))
        if not in_front:
            node.replace_all_uses_with(quantized, lambda user, q=quantized: user is not q)
        elif node.args:
            node.update_arg(0, quantized)
        else:
            node.update_kwarg("input", quantized)
    graph_module.recompile()
    quiet(graph_module)


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a layer reads, whether it is called with it by position or by name; None without either."""
    return args[0] if args else kwargs.get("input")


def quantizers_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a model by their places, named as for `set_quantizers`, in the order of setting."""
    holder = submodule(model, QUANTIZERS)
    children: Iterable[tuple[str, nn.Module]] = holder.named_children() if holder else ()
    return {name: child for name, child in children if isinstance(child, ActivationQuantizer)}


# --- accumulators -----------------------------------------------------------------------------------------------------

_PASSES = (nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout)
"""Layers that leave quantized values on their grid; other moves and selections are functions."""

_PASS = {torch.relu, nn.functional.relu, torch.flatten, nn.functional.max_pool2d, "relu", "flatten", "view", "reshape"}


def set_accumulators(graph_module: fx.GraphModule, bits: Mapping[str, int]) -> None:
    """Lets each layer of a path sum in two's-complement integers of so many bits, which wrap around.

    Raises StructureError for what is no convolution or linear layer, or has no integers as weights and as inputs.
    """
    wanted = [(*call, width) for path, width in bits.items() for call in accumulator_calls(graph_module, path)]
    for node, names, dim, width in wanted:
        if already := [user for user in node.users if user.target is accumulator]:
            already[0].update_arg(4, width)
            continue
        with graph_module.graph.inserting_after(node):
            total = graph_module.graph.call_function(accumulator)
        with graph_module.graph.inserting_before(total):
            tensors = [name and graph_module.graph.create_node("get_attr", name) for name in names]
        node.replace_all_uses_with(total)
        total.args = (node, *tensors, width, dim)
    graph_module.recompile()
    quiet(graph_module)


def accumulator_calls(
    graph_module: fx.GraphModule, path: str
) -> list[tuple[fx.Node, tuple[str, str, str | None], int]]:
    """For each use of a layer its node, the names of what an accumulator needs, and the dimension of the outputs.

    These are the steps of input and weight, and the bias. Raises StructureError as `set_accumulators`.
    """
    layer, nodes = submodule(graph_module, path), graph_module.graph.find_nodes(op="call_module", target=path)
    if layer is None or not nodes:
        raise StructureError(f"no layer {path!r} is there that could have an accumulator")
    dim, weight_step = _outputs_dim(path, layer), _weight_step(path, layer)
    bias = None if layer.bias is None else f"{path}.bias"
    return [(node, (_input_step(path, graph_module, node), weight_step, bias), dim) for node in nodes]


def accumulator_nodes(model: nn.Module) -> dict[fx.Node, str]:
    """The nodes of a graph that sum in narrower accumulators, in order, each with the path of its layer."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    return {node: str(node.args[0].target) for node in nodes if node.target is accumulator}


def accumulators_of(model: nn.Module) -> dict[str, int]:
    """The bits that layers sum in, by their paths: what `set_accumulators` was called with."""
    return {path: node.args[4] for node, path in accumulator_nodes(model).items()}  # type: ignore[misc]


def _step(quantizer: nn.Module) -> str:
    """The attribute of a quantizer that says its step; empty where it has none."""
    if isinstance(quantizer, FixedPointQuantizer):
        return "exponent"
    return "scale" if isinstance(quantizer, AffineQuantizer | SignQuantizer) else ""


def _weight_step(path: str, layer: nn.Module) -> str:
    parametrizations = submodule(layer, "parametrizations.weight")
    on_it = list(parametrizations.children()) if parametrizations is not None else []
    attribute = _step(on_it[-1]) if on_it else ""
    if not attribute:
        raise StructureError(f"the weights of {path!r} are no integers with a step, which an accumulator needs")
    weight: Tensor = getattr(layer, "weight")  # noqa: B009
    outputs, *terms = weight.shape
    blocks = getattr(on_it[-1], "blocks", ()) or (outputs, *terms)
    if blocks[0] not in (1, outputs) or list(blocks[1:]) != terms:
        raise StructureError(f"the outputs of {path!r} sum integers of several steps, which no accumulator can")
    return f"{path}.parametrizations.weight.{len(on_it) - 1}.{attribute}"


def _outputs_dim(path: str, layer: nn.Module) -> int:
    """Which dimension of the result holds the outputs, from the end."""
    for kind, dim in ((nn.Linear, -1), (nn.Conv1d, -2), (nn.Conv2d, -3), (nn.Conv3d, -4)):
        if issubclass(layer_type(layer), kind):
            return dim
    raise StructureError(f"{path!r} is no convolution or linear layer, of which an accumulator could be set")


def _input_step(path: str, graph_module: fx.GraphModule, node: fx.Node) -> str:
    """The step of the quantizer that the input of a layer comes from, through moves and selections."""
    source = first_input(node.args, node.kwargs)
    while isinstance(source, fx.Node):
        target = source.target
        if source.op == "call_module":
            module = graph_module.get_submodule(str(target))
            if attribute := _step(module):
                return f"{target}.{attribute}"
            passes = isinstance(module, _PASSES)
        else:
            passes = target in _PASS
        if not passes:
            break
        source = source.args[0] if source.args else None
    raise StructureError(f"what {path!r} multiplies is not quantized, so that no accumulator can be set")
