"""Narrower accumulators for layers whose weights and inputs are integers."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import fx, nn

from micronet_eval.accumulators import accumulator_bits
from micronet_eval.dotted import WIDEST
from micronet_eval.errors import InputError
from micronet_eval.formats import accumulator, integer_sums
from micronet_eval.strategy import Context, Quantizer
from micronet_eval.structure import StructureError, accumulator_nodes, copied, quantizers_of, quiet, set_accumulators
from micronet_plugins.fixed_point import FixedPointStrategy
from micronet_plugins.weights import dot_products


class Accumulators(Quantizer):
    """Layers sum in the fewest bits that hold all sums of calibration data, `headroom` more, and wrap around beyond.

    Two's-complement integers may overflow on the way: if the whole sum fits, it is right. Additions that accumulate
    then count these bits in the place of 32, each layer's own. Put it behind a quantizer of weights and activations
    (fixed-point, affine, lsq) and the training behind that; where no activation is quantized, `fixed-point` comes first
    by its defaults. A sum that does not fit goes wrong, and quality tells.
    """

    headroom: int = Field(1, ge=0, le=16, description="bits more than the sums of calibration data need")
    batches: int = Field(16, gt=0, description="batches of training data whose sums are looked at")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model).eval() if quantizers_of(model) else FixedPointStrategy().apply(model, context)
        assert isinstance(model, fx.GraphModule)  # as it has quantizers of activations
        reasons = [reason for path in dot_products(model) if (reason := _set(model, path))]
        if not (nodes := accumulator_nodes(model)):
            raise InputError(f"accumulators: no layer can have one: {reasons[0]}")
        seen = _Sums(model)
        with torch.no_grad():
            for inputs in context.calibration(self.batches):
                seen.run(inputs)
        bits = dict.fromkeys(nodes.values(), 2)
        for node, path in nodes.items():
            low, high = seen.found[node.name]
            bits[path] = min(max(bits[path], accumulator_bits(low, high) + self.headroom), WIDEST - 1)
        for node, path in nodes.items():
            node.update_arg(4, bits[path])
        model.recompile()
        return quiet(model)


def _set(model: fx.GraphModule, path: str) -> str:
    """Gives a layer an accumulator, or says why it cannot have one."""
    try:
        set_accumulators(model, {path: WIDEST - 1})
    except StructureError as error:
        return str(error)
    return ""


class _Sums(fx.Interpreter):
    """Runs a graph, and finds by node the least and the largest sum of integers."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.found: dict[str, tuple[int, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is accumulator:
            x, input_step, weight_step, bias, _, dim = self.fetch_args_kwargs_from_env(n)[0]
            sums, _ = integer_sums(x, input_step, weight_step, bias, dim)
            low, high = self.found.get(n.name, (0, 0))
            self.found[n.name] = min(low, int(sums.min())), max(high, int(sums.max()))
        return super().run_node(n)
