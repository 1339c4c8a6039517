"""Where activation quantizers belong: behind every value that feeds a multiplication and is wider than wanted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from micronet_eval.costs import Formula, cost_of
from micronet_eval.precision import bit_widths, data_inputs, keeps_width
from micronet_eval.structure import StructureError
from micronet_eval.trace import Example, Value, trace


def multiplied_nodes(
    graph_module: fx.GraphModule, example_input: Example, bits: int, formulas: Mapping[str, Formula]
) -> list[str]:
    """Names of the graph nodes whose values have to be quantized so that no multiplication sees more than `bits`.

    A value is quantized where it is computed, before operations that only move or select values: a residual sum is
    quantized once, for all that read it. Raises StructureError where such a value exists only inside one layer.
    """
    return list(readers(graph_module, example_input, bits, formulas))


def readers(
    graph_module: fx.GraphModule, example_input: Example, bits: int, formulas: Mapping[str, Formula]
) -> dict[str, set[str]]:
    """The same nodes, in graph order, and for each the paths of the modules that multiply with its value."""
    recorded = trace(graph_module, example_input)
    widths = bit_widths(recorded)
    wanted: dict[str, set[str]] = {}
    for op in recorded.ops:
        cost = cost_of(op, formulas)
        if cost is None or cost.mults == 0:
            continue
        for value in op.inputs:
            if not value.is_constant and value.dtype.is_floating_point and widths[value] > bits:
                for node in _sources(value, recorded.nodes, widths, bits):
                    wanted.setdefault(node, set()).add(op.module)
    return {node.name: wanted[node.name] for node in graph_module.graph.nodes if node.name in wanted}


def _sources(value: Value, nodes: Mapping[Value, str], widths: Mapping[Value, int], bits: int) -> set[str]:
    """The nodes, as far up as moves and selections go, at which `value` can be quantized."""
    producer = value.producer
    if producer is not None and keeps_width(producer):
        wide = [v for v in data_inputs(producer) if widths[v] > bits and not v.is_constant]
        try:
            if found := set().union(*(_sources(v, nodes, widths, bits) for v in wide)):
                return found
        except StructureError:
            pass  # further up it lies inside a layer; here it may not
    if value in nodes:
        return {nodes[value]}
    where = producer.module if producer is not None else "input"
    raise StructureError(
        f"a value computed inside {where!r} feeds a multiplication, but no quantizer can be set inside that layer"
    )
