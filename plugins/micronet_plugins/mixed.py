"""Mixed precision: bits layer by layer, by how much the outputs change (as in ZeroQ, arXiv 2001.00281)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from micronet_eval.costs import cost_of
from micronet_eval.errors import InputError
from micronet_eval.formats import FixedPointQuantizer
from micronet_eval.merge import without_batch_norm
from micronet_eval.placement import readers
from micronet_eval.precision import LINEAR
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import StructureError, copied, original_of, quantizers_of, traced
from micronet_eval.trace import trace
from micronet_plugins.calibration import Observed, exponent_of, observe
from micronet_plugins.layerwise import least_error, quantize_rest, set_fixed_point, weights_of


class Mixed(Quantizer):
    """Fixed point with bit-widths chosen layer by layer, by sensitivity, under a mean bit-width.

    The sensitivity of a layer at b bits is the Kullback-Leibler divergence of the model's outputs from those of the
    unquantized model, with this layer alone at b bits and all others at the most. From the most bits on, the step with
    least sensitivity for the bits that it saves is taken, until the mean is reached; what is left over is given back.
    For `math` a layer's inputs have the bits of its weights, because the wider of the two counts. Steps are powers of
    two. Use it where one bit-width for all is given by the one layer that cannot do with less.
    """

    bits: float = Field(6, ge=2, le=24, description="mean bits: of a weight (storage), of a multiplication (math)")
    weigh: Literal["storage", "math"] = Field(
        "storage", description="what the mean is over: weights or multiplications"
    )
    fewest: int = Field(2, ge=2, le=24, description="fewest bits of a layer")
    most: int = Field(8, ge=2, le=24, description="most bits of a layer")
    activation_bits: int = Field(8, ge=2, le=24, description="bits of activations that no layer's choice decides")
    rest_bits: int = Field(16, ge=2, le=24, description="bits of biases and all other parameters")
    batches: int = Field(4, gt=0, description="batches of training data for calibration and sensitivity")

    @model_validator(mode="after")
    def _in_order(self) -> Mixed:
        if not self.fewest <= self.bits <= self.most:
            raise ValueError(f"bits = {self.bits:g} is not from fewest = {self.fewest} to most = {self.most}")
        return self

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        original = without_batch_norm(copied(model)).eval()
        try:
            graph = traced(copied(original))
            groups = self._prepare(graph, context)
        except StructureError as error:
            raise InputError(f"mixed: {error}") from error
        batches = list(context.calibration(self.batches))
        with torch.no_grad():
            wanted = [F.log_softmax(original(x), -1) for x in batches]
        tables = [self._sensitivities(graph, group, batches, wanted) for group in groups]
        chosen = allocate(tables, [group.weight for group in groups], self.bits)
        for group, bits in zip(groups, chosen, strict=True):
            group.set_bits(bits)
        return graph.eval()

    def _prepare(self, graph: fx.GraphModule, context: Context) -> list[_Group]:
        """Quantizes everything, weights at the most bits; gives what is to have a bit-width of its own."""
        mults = _multiplications(graph, context)
        paths = {module: path for path, module in graph.named_modules()}
        groups: dict[str, _Group] = {}  # by the path of the layer
        tied: dict[int, tuple[FixedPointQuantizer, _Group]] = {}
        for module, name in weights_of(graph):
            path, weight, original = paths[module], getattr(module, name), id(original_of(module, name))
            if original not in tied:
                group = groups.setdefault(path, _Group())
                seen, quantizer = Observed.of(weight), least_error(weight, self.most)
                group.quantizers.append((quantizer, seen))
                group.weight += weight.numel() if self.weigh == "storage" else 0
                tied[original] = quantizer, group
            quantizer, groups[path] = tied[original]
            parametrize.register_parametrization(module, name, quantizer, unsafe=True)
        if self.weigh == "math":
            for path in groups:
                groups[path].weight += mults.get(path, 0)
        quantize_rest(graph, self.rest_bits)
        found = readers(graph, context.example_input, self.activation_bits, context.formulas)
        set_fixed_point(graph, found, self.activation_bits)
        for node, seen in observe(graph, context, self.batches).items():
            of_node = quantizers_of(graph)[node]
            if node in found and isinstance(of_node, FixedPointQuantizer):
                of_node.exponent.fill_(exponent_of(seen, of_node.bits, "mse"))
                if self.weigh == "math":
                    _join(groups, found[node], of_node, seen)
        return list(dict.fromkeys(groups.values()))

    def _sensitivities(
        self, graph: nn.Module, group: _Group, batches: list[Tensor], wanted: list[Tensor]
    ) -> dict[int, float]:
        """The divergence from the outputs that are wanted, by the bits of one group; all others stay as they are."""
        found = {}
        for bits in range(self.most, self.fewest - 1, -1):
            group.set_bits(bits)
            with torch.no_grad(), parametrize.cached():
                outputs = [F.log_softmax(graph(x), -1) for x in batches]
            found[bits] = sum(
                F.kl_div(o.double(), w.double(), reduction="sum", log_target=True).item()
                for o, w in zip(outputs, wanted, strict=True)
            )
        group.set_bits(self.most)
        return found


@dataclass(eq=False)
class _Group:
    """Quantizers, and what each saw, that share one bit-width; its weight is that of its bits in the mean."""

    weight: float = 0
    quantizers: list[tuple[FixedPointQuantizer, Observed]] = field(default_factory=list)

    def set_bits(self, bits: int) -> None:
        for quantizer, seen in self.quantizers:
            quantizer.bits = bits
            quantizer.exponent.fill_(exponent_of(seen, bits, "mse"))


def _multiplications(graph: fx.GraphModule, context: Context) -> dict[str, float]:
    """The multiplications of the dot products in each module, by its path."""
    found: dict[str, float] = {}
    for op in trace(graph, context.example_input).ops:
        if op.name in LINEAR and (cost := cost_of(op, context.formulas)):
            found[op.module] = found.get(op.module, 0) + cost.mults
    return found


def _join(groups: dict[str, _Group], paths: set[str], quantizer: FixedPointQuantizer, seen: Observed) -> None:
    """Adds the quantizer of a value to the group of the layers that read it, which become one."""
    reading = list(dict.fromkeys(groups[path] for path in sorted(paths) if path in groups))
    if not reading:
        return
    first, *others = reading
    first.quantizers.append((quantizer, seen))
    for other in others:
        first.weight += other.weight
        first.quantizers += other.quantizers
    for path, group in groups.items():
        if group in others:
            groups[path] = first


def allocate(tables: Sequence[Mapping[int, float]], weights: Sequence[float], mean: float) -> list[int]:
    """Bits for each table (bits -> loss), so that their mean by `weights` is at most `mean`; greedy.

    Down: the step that adds least loss for the bits it saves. Then up again with what is left over: the step that saves
    most loss for its bits. A weight of 0 keeps the most bits.
    """
    bits = [max(table) for table in tables]
    budget = mean * sum(weights) * (1 + 1e-12)

    def used() -> float:
        return sum(b * w for b, w in zip(bits, weights, strict=True))

    def slope(step: tuple[int, int]) -> float:
        i, to = step
        return (tables[i][to] - tables[i][bits[i]]) / ((bits[i] - to) * weights[i])

    while used() > budget:
        downward = [(i, to) for i, table in enumerate(tables) for to in table if to < bits[i] and weights[i]]
        if not downward:
            raise InputError(f"mixed: a mean of {mean:g} bits cannot be reached")
        i, to = min(downward, key=slope)
        bits[i] = to
    while True:
        upward = [
            (i, to)
            for i, table in enumerate(tables)
            for to in table
            if to > bits[i] and table[to] < table[bits[i]] and used() + (to - bits[i]) * weights[i] <= budget
        ]
        if not upward:
            return bits
        i, to = max(upward, key=slope)
        bits[i] = to
