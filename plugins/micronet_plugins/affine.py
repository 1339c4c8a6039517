"""Integers with a scale and a zero point, for weights and activations (Jacob et al. 2018, arXiv 1712.05877)."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import fx, nn

from micronet_eval.formats import Affine, AffineQuantizer
from micronet_eval.strategy import Context
from micronet_eval.structure import QUANTIZERS, original_of, quantizers_of, replace, set_quantizers, traced
from micronet_eval.trace import trace
from micronet_plugins.calibration import Calibration, Observed, affine_format, observe
from micronet_plugins.layerwise import (
    Granularity,
    WeightQuantizer,
    blocks_of,
    input_places,
    quantize_each,
    weights_of,
)
from micronet_plugins.weights import DOT_PRODUCTS, dot_products, matching


class ScaledQuantizer(WeightQuantizer):
    """Activations in integers with a scale, one for the tensor."""

    first_last_bits: int | None = Field(
        None,
        ge=2,
        le=8,
        description='bits of weights in the first and the last layer and, where `activations = "layers"`, of what they '
        "read; without it those of all others",
    )
    layer_bits: dict[str, Annotated[int, Field(ge=2, le=8)]] = Field(
        {},
        description='bits of the weights of some layers, by patterns of their paths, as { "7.*" = 2 }; of several that '
        "match the last one counts",
    )

    def quantize_weights(self, model: nn.Module, context: Context) -> None:
        others = {id(original_of(layer, "weight")): self._of_first_last() for layer in self._first_last(model, context)}
        layers = dot_products(model) if self.layer_bits else {}
        for pattern, bits in self.layer_bits.items():
            of_layers = self.model_copy(update={"weight_bits": bits})
            found = matching("quantizer: option 'layer_bits'", [pattern], layers)
            others |= {id(original_of(layers[path], "weight")): of_layers for path in found}
        quantize_each(
            weights_of(model),
            lambda layer, name: others.get(id(original_of(layer, name)), self).quantizer(layer, name),
        )

    def quantize_activations(self, model: nn.Module, context: Context) -> None:
        graph = traced(model)
        places = self.places(graph, context)
        first_last, other = self._first_last(graph, context), self._of_first_last()
        read_there = {place for place, layer in input_places(graph).items() if layer in first_last}
        # What the scales shall be can be observed only once the quantizers are in their places.
        unknown = Affine(0, 2**self.activation_bits - 1, (), torch.ones(1))
        set_quantizers(graph, {place: AffineQuantizer(unknown) for place in places})
        rectified = _only_rectified(graph)
        for place, seen in observe(graph, context, self.batches).items():
            if place in places:
                seen = _positive(seen) if place in rectified else seen
                quantizer = (other if place in read_there else self).activation_quantizer(seen)
                replace(graph, f"{QUANTIZERS}.{place}", quantizer)

    def _first_last(self, model: nn.Module, context: Context) -> set[nn.Module]:
        """The layers that run first and last, on each path of a conditional model, if they have bits of their own."""
        found: set[nn.Module] = set()
        for part in trace(model, context.example_input).by_path().values() if self.first_last_bits else ():
            layers = [layer for op in part.ops if isinstance(layer := model.get_submodule(op.module), DOT_PRODUCTS)]
            found |= {*layers[:1], *layers[-1:]}
        return found

    def _of_first_last(self) -> ScaledQuantizer:
        bits = self.first_last_bits
        return self if bits is None else self.model_copy(update={"weight_bits": bits, "activation_bits": bits})

    @abstractmethod
    def activation_quantizer(self, seen: Observed) -> AffineQuantizer:
        """The quantizer of an activation, whose format has no blocks."""


_RECTIFIES = (nn.ReLU, nn.ReLU6)


def _only_rectified(graph: fx.GraphModule) -> set[str]:
    """The nodes whose values nothing but a ReLU reads: they need no sign, as it drops what is negative."""

    def rectifies(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(graph.get_submodule(str(node.target)), _RECTIFIES)
        return node.target in (torch.relu, nn.functional.relu, nn.functional.relu6, "relu")

    names = {f"{QUANTIZERS}.{name}": name for name in quantizers_of(graph)}
    quantized = [node for node in graph.graph.nodes if node.target in names]
    return {names[str(node.target)] for node in quantized if node.users and all(map(rectifies, node.users))}


def _positive(seen: Observed) -> Observed:
    """What is left of the values behind a ReLU."""
    return dataclasses.replace(seen, low=0.0, high=max(seen.high, 0.0), sample=seen.sample.clamp(min=0))


class AffineStrategy(ScaledQuantizer):
    """Integers with scales: per tensor, channel or group; symmetric or with zero points; activations per tensor.

    value = (integer - zero point) x scale. A scale is 32 bits to store, a zero point the bits of a weight. A scale that
    is no power of two (by calibration hardly one is) costs one multiplication an output, and one more for every group
    that an output sums over. Activations that are never negative, or that only a ReLU reads, have no sign and no zero
    point. Use it where fixed point loses too much: at few bits, per channel, in layers whose channels differ in range.
    """

    weight_bits: int = Field(8, ge=2, le=16, description="bits of a weight")
    granularity: Granularity = Field("channel", description="what shares a scale: tensor, channel or group")
    group_size: int = Field(32, gt=0, description="inputs (each with its kernel) of one output that share a scale")
    symmetric: bool = Field(True, description="no zero points")
    calibration: Calibration = Field("max", description="range of weights: sigma, max or mse (least squared error)")
    activation_calibration: Calibration = Field("mse", description="range of activations: sigma, max or mse")
    sigmas: float = Field(6, gt=0, description="for sigma: mean -+ so many standard deviations")

    def quantizer(self, layer: nn.Module, name: str) -> nn.Module:
        weight = getattr(layer, name)
        blocks = blocks_of(layer, weight, self.granularity, self.group_size)
        return AffineQuantizer(
            affine_format(weight, self.weight_bits, blocks, self.symmetric, self.calibration, self.sigmas)
        )

    def activation_quantizer(self, seen: Observed) -> AffineQuantizer:
        return AffineQuantizer(
            activation_format(seen, self.activation_bits, self.symmetric, self.activation_calibration, self.sigmas)
        )


def activation_format(seen: Observed, bits: int, symmetric: bool, calibration: Calibration, sigmas: float) -> Affine:
    """The format of an activation from what was seen; no zero point where nothing is negative."""
    ends = torch.tensor([seen.low, seen.high], dtype=torch.float64)
    values = ends if calibration == "max" else seen.sample
    if calibration == "mse":
        values = torch.cat([values, ends])
    found = affine_format(values, bits, (len(values),), symmetric or seen.low >= 0, calibration, sigmas)
    return Affine(found.low, found.high, (), found.scales, found.zero_points)
