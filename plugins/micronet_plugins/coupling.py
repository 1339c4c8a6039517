"""Which channels of a network can be removed, and what goes with them.

Found by torch-pruning's dependency graph (DepGraph: Fang et al. 2023, arXiv 2301.12900): the outputs of a layer, the
norms behind it, the inputs of what reads it, and, through additions and concatenations, other layers.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from micronet_eval.conditional import paths_of, taking
from micronet_eval.errors import InputError
from micronet_eval.structure import describe, submodule
from micronet_eval.trace import tensors_in, trace
from micronet_plugins.weights import (
    CONVOLUTIONS,
    DOT_PRODUCTS,
    TRANSPOSED,
    dot_products,
    grouped,
    hooked,
    matching,
    read_elsewhere,
    ungrouped,
    weight_of,
)


@dataclass(frozen=True, eq=False)
class Side:
    """The inputs or outputs of a layer that go with units of a group: channel `channels[i]` with unit `units[i]`.

    A norm and a depthwise convolution have outputs only: their inputs are the same.
    """

    layer: Any
    is_output: bool
    channels: Tensor
    units: Tensor

    @property
    def is_norm(self) -> bool:
        return not isinstance(self.layer, DOT_PRODUCTS)

    @property
    def total(self) -> int:
        """All channels of that side of the layer."""
        if self.is_norm:
            names = ("num_features", "num_channels", "normalized_shape")
            channels = next(getattr(self.layer, name) for name in names if hasattr(self.layer, name))
            return int(channels if isinstance(channels, int) else channels[-1])
        groups, outputs, inputs, _ = grouped(self.layer, weight_of(self.layer)).shape
        return groups * (outputs if self.is_output else inputs)

    def by_channel(self, values: Tensor) -> Tensor:
        """Sums values of the weight's shape over all that belongs to a channel: [total], in float64."""
        if self.is_norm:
            return values.detach().double()
        by_group = grouped(self.layer, values.detach().double())
        return by_group.sum((2, 3) if self.is_output else (1, 3)).flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are coupled: `units[i]` are the output channels of the layer `root` that go together."""

    root: nn.Module
    prune: Callable[..., Any]
    units: list[list[int]]
    sides: list[Side]

    def channels(self, units: Sequence[int]) -> list[int]:
        """The root's output channels that units consist of, in order."""
        return sorted(channel for unit in units for channel in self.units[unit])

    def sum(self, side: Side, values: Tensor) -> Tensor:
        """Sums `values` [total of the side] over the channels of each unit: [units]."""
        return torch.zeros(len(self.units), dtype=values.dtype).index_add(0, side.units, values[side.channels])


def need_torch_pruning() -> None:
    """Raises InputError where torch-pruning is not installed: when a pruner is made, long before it is applied."""
    if find_spec("torch_pruning") is None:
        mend = "pip install 'micronet-eval[prune]'"
        raise InputError(f"removing channels needs torch-pruning; install it with: {mend}")


def dependency_graph(model: nn.Module, example_input: Tensor) -> Any:
    """torch-pruning's dependency graph, over all paths of a conditional model.

    Raises InputError where torch-pruning cannot follow the model.
    """
    import torch_pruning

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(
                model, example_input, forward_fn=all_outputs, verbose=False
            )
    except Exception as error:  # whatever its walk over a forward that it cannot follow raises
        raise InputError(
            "torch-pruning cannot follow the model; low-rank and eigendamage prune without it: "
            f"{type(error).__name__}: {error}"
        ) from error


def all_outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The tensors that a model returns, on each of its paths."""
    outputs: list[Tensor] = []
    for path in paths_of(model):
        with taking(model, path):
            outputs += tensors_in(model(inputs))
    return outputs


def groups_of(graph: Any, model: nn.Module, example_input: Tensor, keep: Sequence[str] = ()) -> list[Group]:
    """All that can be removed. The model's own outputs stay, and those of layers at paths that match `keep`.

    So do channels that the forward gives other places than torch-pruning says: by flip, roll or a shuffle that it does
    not know, or as those of several heads of attention. That is seen only where the model draws no random numbers.
    """
    layers = dot_products(model)
    kept = {*output_layers(model, example_input), *matching("option 'keep'", keep, layers)}
    ignored = [layer for path, layer in layers.items() if path in kept]
    places = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = Counter(id(tensor) for module in places for tensor in _tensors(module))
    owners.update(read_elsewhere(model, example_input, layers.values()))
    whole = {m: _is_fixed(m) or any(owners[id(tensor)] > 1 for tensor in _tensors(m)) for m in places}
    found = graph.get_all_groups(ignored_layers=ignored, root_module_types=DOT_PRODUCTS)
    groups = [group for each in found if (group := _group(graph, whole, each)) is not None]
    inputs = example_input
    if inputs.is_floating_point():
        inputs = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0), dtype=inputs.dtype)
    with hooked(model, []):
        expected, again = (all_outputs(model, inputs) for _ in range(2))
        if not all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in zip(expected, again, strict=True)):
            return groups  # a model that draws numbers says something else each time
        return _movable(model, inputs, groups, expected)


def _movable(model: nn.Module, inputs: Tensor, groups: Sequence[Group], expected: Sequence[Tensor]) -> list[Group]:
    """The groups whose units can change places on all sides without a change of what the model returns."""
    if not groups:
        return []
    moves = [move for group in groups for move in _moves(group)]
    for side, order in moves:
        _move(side, order)
    found = all_outputs(model, inputs)
    for side, order in moves:
        _move(side, order.argsort())
    if all((a.double() - b.double()).norm() <= 1e-4 * b.double().norm() for a, b in zip(found, expected, strict=True)):
        return list(groups)
    half = len(groups) // 2
    return [g for part in (groups[:half], groups[half:]) if half for g in _movable(model, inputs, part, expected)]


def _moves(group: Group) -> list[tuple[Side, Tensor]]:
    """For each side from where its channels come when units take the places of others with as many channels."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([torch.bincount(side.units, minlength=len(group.units)) for side in group.sides], 1)
    kinds = counts.unique(dim=0, return_inverse=True)[1]  # type: ignore[no-untyped-call]
    source = torch.arange(len(group.units))
    for kind in range(int(kinds.max()) + 1):
        alike = (kinds == kind).nonzero()[:, 0]
        source[alike] = alike[torch.randperm(len(alike), generator=generator)]
    moves = []
    for side, count in zip(group.sides, counts.T, strict=True):
        by_unit = (side.units * side.total + side.channels).argsort()
        channels, units = side.channels[by_unit], side.units[by_unit]
        start = count.cumsum(0) - count
        order = torch.arange(side.total)
        order[channels] = channels[start[source[units]] + torch.arange(len(units)) - start[units]]
        moves.append((side, order))
    return moves


def _move(side: Side, order: Tensor) -> None:
    """Lets the channel `order[i]` of a side come to place i."""
    if side.is_norm:
        for tensor in _tensors(side.layer):
            if tensor.dim():
                tensor.copy_(tensor[..., order])
        return
    weight, dim = grouped(side.layer, weight_of(side.layer)), 1 if side.is_output else 2
    channels = weight.movedim(dim, 1)
    moved = channels.flatten(0, 1)[order].view_as(channels).movedim(1, dim)
    side.layer.weight.copy_(ungrouped(side.layer, moved))
    if side.is_output and side.layer.bias is not None:
        side.layer.bias.copy_(side.layer.bias[order])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that a module holds itself."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def output_layers(model: nn.Module, example_input: Tensor) -> set[str]:
    """The paths of the layers whose outputs become the model's without another such layer between them."""
    found, seen = set(), set()
    waiting = list(trace(model, example_input).outputs)
    while waiting:
        op = waiting.pop().producer
        if op is None or op in seen:
            continue
        seen.add(op)
        if isinstance(submodule(model, op.module), DOT_PRODUCTS):
            found.add(op.module)
        else:
            waiting += op.inputs
    return found


def _group(graph: Any, whole: Mapping[nn.Module, bool], found: Any) -> Group | None:
    """A group of the graph as units that can go one by one; None where a layer in it would not survive that.

    `whole` are all modules of the model, and whether they have to stay so: what is packed at several places or read
    by others stays. Grouped layers need as many channels in each of their groups: channels at the same position of each
    are one unit.
    """
    if any(isinstance(item.dep.target.module, nn.Parameter) for item in found.items):
        return None  # a parameter outside of layers keeps its shape when it is packed
    items = [item for item in found.items if item.dep.target.module in whole]
    if any(whole[item.dep.target.module] for item in items):
        return None
    channels = len(found[0].idxs)
    groups = math.lcm(*(_groups_to_keep(item.dep.target.module) for item in items))
    if channels % groups:
        return None
    count = channels // groups
    sides = [
        Side(
            item.dep.target.module,
            graph.is_out_channel_pruning_fn(item.dep.handler),
            torch.tensor(item.idxs),
            torch.tensor(item.root_idxs) % count,
        )
        for item in items
    ]
    units = [list(range(unit, channels, count)) for unit in range(count)]
    group = Group(found[0].dep.target.module, found[0].dep.handler, units, sides)
    if not all(_goes_alone(graph, group, chosen) for chosen in _halves(count)):
        group = _merged(graph, group)
        if not all(_goes_alone(graph, group, chosen) for chosen in _halves(len(group.units))):
            return None
    if not all(_is_sound(side) and _is_balanced(side, len(group.units)) for side in group.sides):
        return None
    if not any(side.is_output and not side.is_norm and not _is_depthwise(side.layer) for side in group.sides):
        return None  # no layer makes these channels: they are those of the model's input
    return group


def _halves(count: int) -> Iterator[list[int]]:
    """The units whose number has a 1 at each binary digit: of any two, one is without the other in some list."""
    for digit in range((count - 1).bit_length()):
        yield [unit for unit in range(count) if unit >> digit & 1]


def _goes_alone(graph: Any, group: Group, units: Sequence[int]) -> bool:
    """Whether torch-pruning removes with these units what the group says, and nothing more."""
    said = {(s.layer, s.is_output): s.channels[torch.isin(s.units, torch.tensor(units))].tolist() for s in group.sides}
    done = _removed_with(graph, group, group.channels(units))
    return {side: set(channels) for side, channels in said.items() if channels} == {s: set(c) for s, c in done.items()}


def _removed_with(graph: Any, group: Group, channels: list[int]) -> dict[tuple[nn.Module, bool], list[int]]:
    """The channels that torch-pruning removes together with some of the root's, by layer and side."""
    layers = {side.layer for side in group.sides}
    items = graph.get_pruning_group(group.root, group.prune, channels).items
    sides = [(item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)) for item in items]
    return {side: item.idxs for side, item in zip(sides, items, strict=True) if side[0] in layers}


def _merged(graph: Any, group: Group) -> Group:
    """The group with as one unit what torch-pruning removes together, as the two halves of a gated linear unit."""
    unit_of = {channel: unit for unit, channels in enumerate(group.units) for channel in channels}
    first = list(range(len(group.units)))
    for channels in group.units:
        joined = {first[unit_of[channel]] for channel in _removed_with(graph, group, channels)[group.root, True]}
        first = [min(joined) if unit in joined else unit for unit in first]
    units = [group.channels([u for u, other in enumerate(first) if other == unit]) for unit in sorted({*first})]
    parts: dict[tuple[nn.Module, bool], list[tuple[int, int]]] = {}
    for unit, channels in enumerate(units):
        for side, removed_channels in _removed_with(graph, group, channels).items():
            parts.setdefault(side, []).extend((channel, unit) for channel in removed_channels)
    return Group(group.root, group.prune, units, [Side(*side, *torch.tensor(part).T) for side, part in parts.items()])


def _is_fixed(layer: nn.Module) -> bool:
    """Whether a layer cannot lose channels, or could not be packed afterwards."""
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        # torch-pruning takes the second for a depthwise one.
        return isinstance(layer, TRANSPOSED) or layer.groups == layer.out_channels != layer.in_channels
    holds = any(True for _ in layer.parameters()) or any(True for _ in layer.buffers())
    has_channels = holds or isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    return has_channels and describe(layer) is None


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.out_channels == layer.in_channels


def _groups_to_keep(layer: nn.Module) -> int:
    """The groups of a layer, 1 for a depthwise convolution: there a channel goes with its group."""
    if isinstance(layer, CONVOLUTIONS):
        return 1 if _is_depthwise(layer) else layer.groups
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else 1


def _is_sound(side: Side) -> bool:
    """Whether the channels are some of the layer's, each once; torch-pruning loses count in some concatenations."""
    return len(set(side.channels.tolist())) == len(side.channels) and int(side.channels.max()) < side.total


def _is_balanced(side: Side, count: int) -> bool:
    """Whether each unit takes as many outputs from each group of a grouped layer, of inputs the same positions."""
    groups = _groups_to_keep(side.layer)
    if groups == 1:
        return True
    size = side.total // groups
    place = side.channels // size if side.is_output else side.channels % size
    counts = torch.bincount(side.units * side.total + place, minlength=count * side.total).view(count, side.total)
    if side.is_output:
        return bool((counts[:, :groups] == counts[:, :1]).all())
    return bool(((counts == 0) | (counts == groups)).all())


def lowest(scores: Mapping[Group, Tensor], most: float, limit: float) -> list[list[int]]:
    """Of each group the units to remove: the lowest scores of all that together take at most `most` parameters.

    No group loses more than `limit` of its units, or all. Raises InputError where that leaves clearly too many.
    """
    candidates: list[tuple[float, int, int]] = []
    for owner, (group, score) in enumerate(scores.items()):
        count = min(int(limit * len(group.units)), len(group.units) - 1)
        candidates += [(score[unit].item(), owner, unit) for unit in score.argsort(stable=True)[:count].tolist()]
    candidates.sort()

    def first(count: int) -> list[list[int]]:
        units: list[list[int]] = [[] for _ in scores]
        for _, owner, unit in candidates[:count]:
            units[owner].append(unit)
        return units

    fits, too_many = 0, len(candidates) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if removed(zip(scores, first(middle), strict=True)) <= most:
            fits = middle
        else:
            too_many = middle
    reached = removed(zip(scores, first(fits), strict=True))
    if fits == len(candidates) and reached < 0.97 * most:
        raise InputError(
            f"{most:,.0f} parameters shall go, but only {reached:,} are in channels that may; "
            "lower 'ratio', raise 'limit' or keep fewer layers"
        )
    return first(fits)


def removed(lost: Iterable[tuple[Group, Sequence[int]]]) -> int:
    """The parameters that go with these units of groups, exactly."""
    gone: dict[nn.Module, list[int]] = {}
    for group, units in lost:
        marked = torch.zeros(len(group.units), dtype=torch.bool)
        marked[list(units)] = True
        for side in group.sides:
            gone.setdefault(side.layer, [0, 0])[side.is_output] += int(marked[side.units].sum())
    return sum(_parameters_lost(layer, inputs, outputs) for layer, (inputs, outputs) in gone.items())


def _parameters_lost(layer: Any, inputs: int, outputs: int) -> int:
    """The parameters that a layer loses with so many inputs and outputs."""
    if getattr(layer, "weight", None) is None:
        return 0
    bias = 0 if layer.bias is None else outputs
    if not isinstance(layer, DOT_PRODUCTS):
        return outputs + bias
    groups, all_outputs, all_inputs, kernel = grouped(layer, weight_of(layer)).shape
    if groups > 1 and all_outputs == all_inputs == 1:
        return outputs * kernel + bias
    left = (groups * all_outputs - outputs) * (groups * all_inputs - inputs) * kernel // groups
    return groups * all_outputs * all_inputs * kernel - left + bias
