"""What the quantizers of weights have in common: weights one way, all other parameters and activations another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.formats import ActivationQuantizer, AffineQuantizer, FixedPointQuantizer
from micronet_eval.merge import is_norm, merged, without_batch_norm
from micronet_eval.placement import multiplied_nodes
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import (
    OF_INPUT,
    StructureError,
    copied,
    layer_type,
    original_of,
    quantizers_of,
    set_quantizers,
    traced,
)
from micronet_plugins.calibration import Observed, affine_format, exponent_of, observe
from micronet_plugins.weights import DOT_PRODUCTS

Granularity = Literal["tensor", "channel", "group"]


def _more_than_1(bits: int) -> int:
    if bits == 1:
        raise ValueError("an activation has 0 bits (left as it is) or 2 and more")
    return bits


ActivationBits = Annotated[int, AfterValidator(_more_than_1)]


class WeightQuantizer(Quantizer):
    """Quantizes weights (parameters of 2 dimensions and more) by `quantizer`, all else in fixed point."""

    rest_bits: int = Field(16, ge=2, le=24, description="bits of biases and all other parameters, in fixed point")
    activation_bits: ActivationBits = Field(
        8, ge=0, le=16, description="bits of an activation that is multiplied; 0 leaves activations as they are"
    )
    activations: Literal["all", "layers"] = Field(
        "all",
        description="which: all that are multiplied, or each that a convolution or linear layer reads, in front of it: "
        "residual sums keep their width",
    )
    batches: int = Field(4, gt=0, description="batches of training data for calibration")
    keep_batch_norm: bool = Field(
        False, description="batch norm and biases stay as they are, for training; quantizer `biases` goes behind it"
    )

    @property
    def wants_batch_norm(self) -> bool:
        return self.keep_batch_norm

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        try:
            unmerged = _unmerged(model, context) if self.keep_batch_norm else set()
            model = copied(model).eval()
            if not self.keep_batch_norm:
                model = without_batch_norm(model)
            if self.activation_bits:
                model = traced(model)
            self.quantize_weights(model, context)
            if not self.keep_batch_norm:
                quantize_rest(model, self.rest_bits)
            if self.activation_bits:
                self.quantize_activations(model, context)
            if self.keep_batch_norm and (more := _unmerged(model, context) - unmerged):
                raise InputError(
                    f"quantizer: keep_batch_norm: batch norm {sorted(more)[0]!r} could not be merged into weights that "
                    "are quantized so; take lsq, affine or gptq, a scale for each channel, symmetric, no powers of "
                    "two, and no transposed convolutions"
                )
        except StructureError as error:
            raise InputError(f"quantizer: {error}; activation_bits = 0 leaves activations as they are") from error
        return model.eval()

    def quantize_weights(self, model: nn.Module, context: Context) -> None:
        """Puts a quantizer on every weight; tied weights share one."""
        quantize_each(weights_of(model), self.quantizer)

    @abstractmethod
    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        """The parametrization for a weight."""

    def places(self, graph: fx.GraphModule, context: Context) -> list[str]:
        """Where activations are quantized."""
        if self.activations == "all":
            return nodes_to_quantize(graph, context, self.activation_bits)
        if not (places := list(input_places(graph))):
            raise InputError('quantizer: activations = "layers": the model has no convolution and no linear layer')
        return places

    def quantize_activations(self, model: nn.Module, context: Context) -> None:
        """Fixed point with the exponent of the smallest squared error."""
        graph = traced(model)
        set_fixed_point(graph, self.places(graph, context), self.activation_bits)
        for name, seen in observe(model, context, self.batches).items():
            quantizer = quantizers_of(model)[name]
            if isinstance(quantizer, FixedPointQuantizer):
                quantizer.exponent.fill_(exponent_of(seen, quantizer.bits, "mse"))


class ToolkitQuantizer(WeightQuantizer):
    """Weights of some layers as another toolkit quantizes them, bit for bit; others to nearest, 8 bits per channel."""

    layers: ClassVar[tuple[type[nn.Module], ...]]
    """What the toolkit quantizes."""

    @abstractmethod
    def quantized(self, layer: nn.Module) -> tuple[nn.Module, Tensor]:
        """What rounds a layer's weight to the toolkit's values, and these. Raises InputError where it is not there."""

    def quantize_weights(self, model: nn.Module, context: Context) -> None:
        shared: dict[int, nn.Module] = {}
        for module in list(model.modules()):
            if layer_type(module) not in self.layers or id(original_of(module, "weight")) in shared:
                continue
            quantizer, values = self.quantized(module)
            set_weight(module, "weight", values)
            shared[id(original_of(module, "weight"))] = quantizer
        quantize_each(weights_of(model), self.quantizer, shared)

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        weight = getattr(layer, name)
        return AffineQuantizer(affine_format(weight, 8, (1, *weight.shape[1:])))


def _unmerged(model: nn.Module, context: Context) -> set[str]:
    """The paths of batch norms that do not merge. Raises InputError where there is no batch norm."""
    norms = {path for path, module in model.named_modules() if is_norm(module)}
    if not norms:
        raise InputError("quantizer: keep_batch_norm: the model has no batch norm, or it is merged already")
    later = merged(model, context.example_input)
    return {path for path in norms if not isinstance(later.get_submodule(path), nn.Identity)}


def set_fixed_point(graph: fx.GraphModule, places: Iterable[str], bits: int) -> None:
    """Sets fixed-point quantizers, not yet calibrated."""
    set_quantizers(graph, {place: FixedPointQuantizer(bits) for place in places})


def nodes_to_quantize(graph: fx.GraphModule, context: Context, bits: int) -> list[str]:
    """The nodes that feed a multiplication of more than `bits` bits once batch norm is merged.

    Behind batch norm, where it merges: what goes into it will not be there any more.
    """
    example = context.example_input
    later = traced(merged(graph, example))
    wanted = set(multiplied_nodes(later, example, bits, context.formulas))
    return [_behind_batch_norm(graph, later, node).name for node in graph.graph.nodes if node.name in wanted]


def input_places(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """The places in front of convolutions and linear layers, each with its layer."""
    calls = [(node, graph.get_submodule(str(node.target))) for node in graph.graph.nodes if node.op == "call_module"]
    return {f"{node.name}{OF_INPUT}": layer for node, layer in calls if isinstance(layer, DOT_PRODUCTS)}


def _behind_batch_norm(graph: fx.GraphModule, merged_graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm that alone reads a node and is merged, or else the node."""
    last = node
    while len(last.users) == 1:
        (last,) = last.users
        if last.op != "call_module":
            break
        module = graph.get_submodule(str(last.target))
        if is_norm(module):
            return last if isinstance(merged_graph.get_submodule(str(last.target)), nn.Identity) else node
        if not isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
            break
    return node


def quantize_each(
    parameters: Iterable[tuple[nn.Module, str]],
    quantizer_for: Callable[[nn.Module, str], nn.Module],
    done: Mapping[int, nn.Module] = MappingProxyType({}),
) -> None:
    """Puts a quantizer on each parameter; masks stay in force, and tied parameters share one quantizer.

    `done` are quantizers that parameters have already, by the identity of the trained tensor.
    """
    shared = dict(done)
    for module, name in parameters:
        original = id(original_of(module, name))
        if original not in shared:
            shared[original] = quantizer_for(module, name)
        on_it = module.parametrizations[name] if parametrize.is_parametrized(module, name) else ()  # type: ignore[index]
        if not any(parametrization is shared[original] for parametrization in on_it):
            parametrize.register_parametrization(module, name, shared[original], unsafe=True)


def quantize_rest(model: nn.Module, bits: int) -> None:
    """Parameters of fewer than 2 dimensions in fixed point, at the exponents of the smallest squared error."""
    quantize_each(rest_of(model), lambda module, name: least_error(getattr(module, name), bits))


def least_error(values: Tensor, bits: int) -> FixedPointQuantizer:
    """Fixed point at the exponent of the smallest squared error."""
    return FixedPointQuantizer(bits, exponent_of(Observed.of(values), bits, "mse"))


def parameters_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter as its module and name there, those under parametrizations by the name that they go by.

    No learned scales.
    """
    found: list[tuple[nn.Module, str]] = []
    for path, module in model.named_modules():
        if "parametrizations" in path.split(".") or isinstance(module, ActivationQuantizer):
            continue  # scales that are learned belong to a format
        found += [(module, name) for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            found += [(module, name) for name in module.parametrizations]
    return found


def weights_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters of 2 dimensions and more."""
    return [(m, n) for m, n in parameters_of(model) if getattr(m, n).dim() >= 2 and getattr(m, n).numel()]


def rest_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Those of fewer."""
    return [(m, n) for m, n in parameters_of(model) if getattr(m, n).dim() < 2 and getattr(m, n).numel()]


def blocks_of(layer: nn.Module, weight: Tensor, granularity: Granularity, group_size: int = 0) -> tuple[int, ...]:
    """How many elements of a weight share a scale, dimension by dimension.

    A channel is an output: dimension 0, or 1 of a transposed convolution without groups. A group is `group_size`
    inputs of one output, each with its whole kernel.
    """
    shape = tuple(weight.shape)
    if granularity == "tensor":
        return shape
    transposed = issubclass(layer_type(layer), nn.modules.conv._ConvTransposeNd) and layer.groups == 1
    outputs, inputs = (1, 0) if transposed else (0, 1)
    blocks = list(shape)
    blocks[outputs] = 1
    if granularity == "group":
        blocks[inputs] = min(group_size, shape[inputs])
    return tuple(blocks)


def set_weight(layer: nn.Module, name: str, values: Tensor) -> None:
    """Gives a weight other values, behind its parametrizations."""
    with torch.no_grad():
        original_of(layer, name).copy_(values)
