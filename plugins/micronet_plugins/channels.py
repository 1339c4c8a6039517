"""Pruners that remove whole channels and all that depends on them, each with its own importance.

The channels are ranked over the whole network; those with the lowest scores go.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Pruner
from micronet_eval.structure import Mask, copied, first_input, quantizers_of
from micronet_eval.trace import trace
from micronet_plugins.coupling import Group, Side, dependency_graph, groups_of, lowest, need_torch_pruning
from micronet_plugins.magnitude import set_mask
from micronet_plugins.scheduled import labelled, loss_of
from micronet_plugins.weights import (
    CONVOLUTIONS,
    calibration_data,
    grouped,
    hooked,
    parametrizations_of,
    weight_of,
)


class Channels(Pruner):
    """What the pruners of channels share: the options, the ranking, the removal."""

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the model's parameters to remove, at most")
    limit: float = Field(0.9, gt=0, lt=1, description="largest share of its channels that one layer may lose")
    keep: tuple[str, ...] = Field((), description="paths of layers whose outputs stay; * stands for anything")

    @abstractmethod
    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        """How much each unit of each group matters, higher is more; None for a group that is to be left alone."""

    def model_post_init(self, context: Any) -> None:
        need_torch_pruning()

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        if not isinstance(context.example_input, Tensor):
            raise InputError("channels are removed of models with one input, an image or a vector")
        model = copied(model).eval()
        masked = _without_masks(model)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        model.requires_grad_(True)
        graph = dependency_graph(model, context.example_input)
        groups = groups_of(graph, model, context.example_input, self.keep)
        scores = self.importance(model, groups, context)
        ranked = {group: score for group, score in zip(groups, scores, strict=True) if score is not None}
        if not ranked:
            raise InputError("the model has no channels that this pruner can rank and remove")
        total = sum(p.numel() for p in model.parameters())
        for group, units in zip(ranked, lowest(ranked, self.ratio * total, self.limit), strict=True):
            if units:
                graph.get_pruning_group(group.root, group.prune, group.channels(units)).prune()
        try:
            trace(model, context.example_input)
        except InputError as error:
            raise InputError(
                "without the channels the model no longer runs, because its forward has sizes written into it; "
                f"name the layers in front of that place in 'keep': {error}"
            ) from error
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
            parameter.grad = None
        for path in masked:
            layer = model.get_submodule(path)
            set_mask(model, layer, weight_of(layer) != 0)
        return model


def _without_masks(model: nn.Module) -> list[str]:
    """Makes masked weights plain ones with zeros; gives the paths of their layers. Raises InputError if quantized."""
    masked = []
    for path, layer in list(model.named_modules()):
        if not parametrize.is_parametrized(layer):
            continue
        masks = parametrizations_of(layer)
        if masks is None or not all(isinstance(mask, Mask) for mask in masks):
            raise InputError(f"layer {path!r} is quantized already; put the pruner before the quantizer")
        parametrize.remove_parametrizations(layer, "weight")
        masked.append(path)
    if quantizers_of(model):
        raise InputError("the model's activations are quantized already; put the pruner before the quantizer")
    return masked


def _relative(scores: Tensor) -> Tensor:
    """Scores divided by their mean: comparable between layers of different sizes, as DepGraph normalises."""
    return scores / scores.mean().clamp(min=1e-300)


def _of_unit_norm(scores: Tensor) -> Tensor:
    """Scores divided by their Euclidean norm: comparable between layers, as Molchanov et al. 2017 normalise."""
    return scores / scores.norm().clamp(min=1e-300)


class ChannelMagnitude(Channels):
    """Removes the channels with the smallest weights: the norm of all weights that would go with them.

    Li et al. 2017, arXiv 1608.08710, over groups as in DepGraph, arXiv 2301.12900: (sum |w|^p)^(1/p) over the weights
    that write the channels and those that read them, relative to the group's mean. Needs no data.
    """

    norm: Literal[1, 2] = Field(2, description="p: 1 for the sum of magnitudes, 2 for the Euclidean norm")

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        return [_relative(group_norm(group, self.norm)) for group in groups]


def group_norm(group: Group, p: int) -> Tensor:
    """(sum of |w|^p over all weights of convolutions and linear layers that go with a unit)^(1/p): [units]."""
    sides = [side for side in group.sides if not side.is_norm]
    powers = [group.sum(side, side.by_channel(weight_of(side.layer).abs() ** p)) for side in sides]
    return torch.stack(powers).sum(0) ** (1 / p)


class Taylor(Channels):
    """Removes the channels without which the loss would change least, to first order.

    Molchanov et al. 2017, arXiv 1611.06440, and 2019, arXiv 1906.10771: the root of the mean over batches of (sum of
    a x dL/da)^2, a the channel where it is read; that sum is the one of w x dL/dw over the weights that read it.
    Divided by its Euclidean norm over the group, as in 2017: else a wide last stage goes first, whole. For trained
    networks; a few batches are enough.
    """

    batches: int = Field(4, gt=0, description="batches of training data for gradients")

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        sums = [torch.zeros(len(group.units), dtype=torch.float64) for group in groups]
        for inputs, labels in labelled(context, self.batches, "taylor"):
            model.zero_grad()
            loss_of(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
            for group, total in zip(groups, sums, strict=True):
                total += first_order(group).square()
        return [_of_unit_norm(total.sqrt()) for total in sums]


def first_order(group: Group) -> Tensor:
    """The change of the loss, to first order and with the sign reversed, when a unit is set to zero: [units]."""
    change = torch.zeros(len(group.units), dtype=torch.float64)
    for side in group.sides:
        weight = side.layer.weight
        if not side.is_output and weight.grad is not None:
            change += group.sum(side, side.by_channel(weight * weight.grad))
    return change


class BNScale(Channels):
    """Removes the channels that batch norm scales least (network slimming).

    Liu et al. 2017, arXiv 1708.06519: |gamma| of the batch norms on the channels, their mean where several are; one
    threshold for all. Groups without a norm are left alone. For networks trained with a penalty on gamma.
    """

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        return [norm_scales(group) for group in groups]


def norm_scales(group: Group) -> Tensor | None:
    """The mean |gamma| of each unit over the norms in the group: [units]; None without a norm."""
    sides = [side for side in group.sides if side.is_norm and getattr(side.layer, "weight", None) is not None]
    if not sides:
        return None
    scales = [group.sum(side, side.by_channel(weight_of(side.layer).abs())) for side in sides]
    channels = [group.sum(side, torch.ones(side.total, dtype=torch.float64)) for side in sides]
    return torch.stack(scales).sum(0) / torch.stack(channels).sum(0)


class FPGM(Channels):
    """Removes the filters nearest to the geometric median of their layer: those that the others can replace.

    He et al. 2019, arXiv 1811.00250: the sum of a filter's Euclidean distances to all filters of its layer, relative to
    the group's mean. Needs no data; unlike `magnitude` it keeps small filters that are unlike the others.
    """

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        return [_relative(distances(group)) for group in groups]


def distances(group: Group) -> Tensor:
    """The sum of Euclidean distances from each unit's filters to all filters of their layer: [units]."""
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for side in group.sides:
        if side.is_output and not side.is_norm:
            filters = grouped(side.layer, weight_of(side.layer).double()).flatten(2).flatten(0, 1)
            apart = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
            total += group.sum(side, apart.sum(1))
    return total


class HRank(Channels):
    """Removes the channels whose feature maps have the lowest rank on average.

    Lin et al. 2020, arXiv 2002.10179: the mean rank of a channel's map over examples, here of the maps that
    convolutions read, or else of those that the group's layers write, relative to the group's mean. A vector has rank
    0 or 1. For convolutions on images; a few hundred examples are enough.
    """

    batches: int = Field(4, gt=0, description="batches of training data for feature maps")

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        chosen = [_watched(group) for group in groups]
        sums: dict[tuple[nn.Module, bool], Tensor] = {
            (side.layer, side.is_output): torch.zeros(()) for sides in chosen for side in sides
        }

        def watch(layer: nn.Module, is_output: bool) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
                maps = output if is_output else first_input(args, kwargs)
                if not bool(torch.isfinite(maps).all()):
                    raise InputError("hrank: feature maps are not finite; train the model first")
                sums[layer, is_output] = sums[layer, is_output] + ranks(maps, layer)

            return hook

        hooks = [layer.register_forward_hook(watch(layer, is_output), with_kwargs=True) for layer, is_output in sums]
        with hooked(model, hooks):
            for inputs in calibration_data(context, self.batches, "hrank"):
                model(inputs)
        ran = [[side for side in sides if sums[side.layer, side.is_output].dim()] for sides in chosen]
        return [
            _relative(torch.stack([g.sum(s, sums[s.layer, s.is_output]) for s in sides]).sum(0)) if sides else None
            for g, sides in zip(groups, ran, strict=True)
        ]


def _watched(group: Group) -> list[Side]:
    """The sides of a group whose maps count: what convolutions read, or else what the group's layers write."""
    readers = [side for side in group.sides if not side.is_output and isinstance(side.layer, CONVOLUTIONS)]
    return readers or [side for side in group.sides if side.is_output]


def ranks(maps: Tensor, layer: nn.Module) -> Tensor:
    """The sum over examples of the rank of each channel's map: [channels] of [batch, channels, ...]."""
    if isinstance(layer, nn.Linear | nn.LayerNorm):
        maps = maps.movedim(-1, 1)  # channels last
    if maps.dim() < 4:
        return (maps != 0).reshape(*maps.shape[:2], -1).any(2).double().sum(0)
    return torch.linalg.matrix_rank(maps.flatten(3)).double().sum(0)


class RandomChannels(Channels):
    """Removes channels at random: the control to compare the others with."""

    def importance(self, model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(context.seed)
        return [torch.rand(len(group.units), generator=generator) for group in groups]
