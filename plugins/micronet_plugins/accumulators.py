"""Narrower accumulators for layers whose weights and inputs are integers."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from micronet_eval.dotted import FEWEST, MOST, summed
from micronet_eval.errors import InputError
from micronet_eval.formats import accumulator, integer_sums
from micronet_eval.merge import is_norm
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import (
    StructureError,
    accumulator_calls,
    accumulator_nodes,
    copied,
    quantizers_of,
    set_accumulators,
    traced,
)
from micronet_eval.trace import trace
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.weights import dot_products, is_quantized


class Accumulators(Quantizer):
    """Layers sum in the fewest bits that hold all sums of calibration data, `headroom` more, and wrap around beyond.

    Two's-complement integers may overflow on the way: if the whole sum fits, it is right. Additions that accumulate
    then count these bits in the place of 32, each layer's own. Let it be the last stage, behind a quantizer of weights
    and activations (fixed-point, affine, lsq) and the training after that; where nothing is quantized, `fixed-point`
    comes first by its defaults. A sum that does not fit goes wrong, and quality tells. `overflow` lets a few not fit:
    in two networks for Fashion-MNIST one in ten thousand took a bit less in five or six layers of 14 and no accuracy,
    one in a thousand in nine layers, and 0.3 to 0.5 points of accuracy. Layers whose weights or inputs are no
    integers, or whose sums may reach 2^24, stay at 32 bits.
    """

    headroom: int = Field(1, ge=0, le=16, description="bits more than the sums of calibration data need")
    overflow: float = Field(0, ge=0, lt=1, description="share of a layer's sums that need not fit")
    batches: int = Field(16, gt=0, description="batches of training data whose sums are looked at")

    @property
    def goes_behind_another(self) -> bool:
        return True

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        try:
            graph = traced(self._quantized(model, context)).eval()
        except StructureError as error:
            raise InputError(f"accumulators: {error}") from error
        if kept := [path for path, module in graph.named_modules() if is_norm(module)]:
            raise InputError(
                f"accumulators: batch norm {kept[0]!r} is not merged yet, and could not be behind an accumulator; put "
                "quantizer biases in front"
            )
        reasons = _set_where_possible(graph, context)
        if not (nodes := accumulator_nodes(graph)):
            raise InputError(f"accumulators: no layer can have one: {reasons[0]}")
        seen = _Sums(graph)
        with torch.no_grad():
            for inputs in context.calibration(self.batches):
                seen.run(inputs)
        if not seen.widths:
            raise InputError("accumulators: there is no training data")
        bits = dict.fromkeys(nodes.values(), FEWEST)
        for node, path in nodes.items():
            needed = fewest_bits(seen.widths[node.name], self.overflow) + self.headroom
            bits[path] = min(max(bits[path], needed), MOST)
        set_accumulators(graph, bits)
        return graph

    @staticmethod
    def _quantized(model: nn.Module, context: Context) -> nn.Module:
        if quantizers_of(model):
            return copied(model)
        if any(map(is_quantized, dot_products(model).values())):
            raise InputError("accumulators: weights are quantized, but activations are not; quantize them, too")
        return FixedPointStrategy().apply(model, context)


def _set_where_possible(graph: fx.GraphModule, context: Context) -> list[str]:
    """Gives all layers that can have one an accumulator of the most bits; why the others cannot."""
    reasons: list[str] = []
    possible: dict[str, int] = {}
    for path in dot_products(graph):
        try:
            accumulator_calls(graph, path)
            possible[path] = MOST
        except StructureError as error:
            reasons.append(str(error))
    tried = cast(fx.GraphModule, copied(graph))
    set_accumulators(tried, possible)
    counted: Counter[str] = Counter()
    for op in trace(tried, context.example_input).ops:
        try:
            if (product := summed(op)) is not None:
                counted[product.op.module] += 1
        except InputError as error:
            reasons.append(str(error))
    uses = Counter(accumulator_nodes(tried).values())
    set_accumulators(graph, {path: MOST for path in possible if counted[path] == uses[path]})
    return reasons


def fewest_bits(widths: Tensor, overflow: float) -> int:
    """The fewest bits that all sums fit into but a share of `overflow`; `widths[n]` sums need n bits."""
    fit = widths.cumsum(0)  # into each number of bits
    return int((fit[-1] - fit <= overflow * fit[-1]).int().argmax())


def widths_of(sums: Tensor) -> Tensor:
    """How many whole numbers, of less than 2^53, need 0, 1, 2, ... 54 bits of two's complement."""
    sums = sums.double()
    magnitudes = torch.where(sums < 0, -1 - sums, sums)
    return torch.bincount(torch.frexp(magnitudes).exponent.flatten() + 1, minlength=55)


class _Sums(fx.Interpreter):
    """Runs a graph, and counts by node how many bits its sums of integers need."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.widths: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is accumulator:
            x, input_step, weight_step, bias, _, dim = self.fetch_args_kwargs_from_env(n)[0]
            sums, _ = integer_sums(x, input_step, weight_step, bias, dim)
            if not bool(sums.isfinite().all()):
                raise InputError(f"accumulators: the sums of {n.args[0]} are not finite")
            self.widths[n.name] = self.widths.get(n.name, 0) + widths_of(sums)
        return super().run_node(n)
