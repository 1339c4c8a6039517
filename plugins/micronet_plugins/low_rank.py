"""Low-rank pruning: each convolution becomes rotate in, core, rotate out, at ranks chosen under one global threshold.

The rotations are the leading eigenvectors of the weight's two unfoldings (Tucker-2 by HOSVD: De Lathauwer et al.
2000; for networks Kim et al. 2016, arXiv 1511.06530). It looks at the weights only; EigenDamage adds the curvature of
the loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from micronet_eval.costs import cost_of
from micronet_eval.errors import InputError
from micronet_eval.strategy import Context, Pruner
from micronet_eval.structure import Mask, copied, layer_type, leaves, quantizers_of, replace
from micronet_eval.trace import Example, Op, trace
from micronet_plugins.weights import matching, parametrizations_of


class LowRank(Pruner):
    """Replaces layers by rotate in, core, rotate out, keeping the directions with most energy for their cost."""

    parameters: int = Field(gt=0, description="parameters that the whole model shall have, at most")
    macs: int | None = Field(None, gt=0, description="multiply-accumulates an example that it shall have, at most")
    keep: tuple[str, ...] = Field((), description="paths of layers to leave as they are; * stands for anything")

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        model = copied(model)
        _check_weights(model)
        total = sum(p.numel() for p in model.parameters())
        ops = trace(model, context.example_input).ops
        kept = matching("low-rank: option 'keep'", self.keep, [path for path, _ in leaves(model)])
        layers = [f for f in factorizations(model, ops) if f.path not in kept]
        if not layers:
            raise InputError(
                "low-rank: the model has no convolution without groups and no linear layer that can be factored; "
                "layers that are kept or used several times are not, nor is a layer that is the whole model"
            )
        fixed = total - sum(f.parameters(f.full) for f in layers)
        weight = 0.0
        if self.macs is not None:
            paths = {f.path for f in layers}
            costs = [cost_of(op, context.formulas) for op in ops if op.module not in paths]
            weight = self._price_of_macs(layers, fixed, sum(cost.macs for cost in costs if cost))
        replaced = {}
        for layer, ranks in zip(layers, self._ranks(layers, fixed, weight), strict=True):
            if layer.is_smaller(ranks):
                replaced[layer.path] = layer.build(ranks)
                replace(model, layer.path, replaced[layer.path])
        check_runs("low-rank", model, replaced, context.example_input, "name it in 'keep', or ")
        return model

    def _ranks(self, layers: Sequence[Factorization], fixed: int, weight: float) -> list[tuple[int, ...]]:
        """The ranks of all layers at the lowest threshold that keeps to the parameters."""

        def size(threshold: float) -> int:
            return fixed + sum(f.parameters(f.ranks(threshold, weight)) for f in layers)

        threshold = _smallest(lambda t: size(t) <= self.parameters)
        if threshold is None:
            raise InputError(f"low-rank: {self.parameters:,} parameters cannot be reached; rank 1 everywhere is more")
        return [f.ranks(threshold, weight) for f in layers]

    def _price_of_macs(self, layers: Sequence[Factorization], fixed: int, fixed_macs: int) -> float:
        """How many parameters a multiply-accumulate has to weigh, so that both limits are kept.

        `fixed` parameters and `fixed_macs` are those of all else, which stays.
        """
        assert self.macs is not None
        wanted = self.macs

        def macs(weight: float) -> int:
            ranks = self._ranks(layers, fixed, weight)
            return fixed_macs + sum(f.macs(r) for f, r in zip(layers, ranks, strict=True))

        weight = 0.0 if macs(0.0) <= wanted else _smallest(lambda w: macs(w) <= wanted)
        if weight is None:
            raise InputError(
                f"low-rank: {wanted:,} MACs cannot be reached at {self.parameters:,} parameters; {fixed_macs:,} of the "
                "model's are in operations that stay as they are"
            )
        return weight


def _check_weights(model: nn.Module) -> None:
    """Raises InputError where activations are quantized, or a weight is made by something else than a mask."""
    if quantizers_of(model):
        raise InputError("low-rank: the model is quantized already; put the pruner before the quantizer")
    for path, layer in model.named_modules():
        made_by = [type(p).__name__ for p in parametrizations_of(layer) or () if not isinstance(p, Mask)]
        if made_by:
            raise InputError(
                f"low-rank: the weight of layer {path!r} is made by {made_by[0]}; put the pruner before the quantizer, "
                "or remove what is none first: torch.nn.utils.parametrize.remove_parametrizations"
            )


def check_runs(
    strategy: str, model: nn.Module, replaced: Mapping[str, nn.Module], example_input: Example, mend: str = ""
) -> None:
    """Raises InputError where the model does not run with the layers that were replaced, by their paths.

    Then its forward reads an attribute that the layers before had.
    """
    try:
        trace(model, example_input)
    except InputError as error:
        cause = error.__cause__  # tells of which object which attribute is missing
        path = next((path for path, layer in replaced.items() if layer is getattr(cause, "obj", None)), None)
        what = "an attribute of a layer" if path is None else f"{getattr(cause, 'name', '')!r} of layer {path!r}"
        raise InputError(
            f"{strategy}: the model's forward reads {what} that became several; {mend}take it from the input or from "
            f"next(self.parameters()): {error}"
        ) from error


def _smallest(holds: Callable[[float], bool]) -> float | None:
    """The smallest number, to a millionth of itself, from which on `holds`; None where it never does. By bisection."""
    low, high = -60.0, 60.0  # powers of two
    if not holds(2.0**high):
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(2.0**middle) else (middle, high)
    return 2.0**high


@dataclass(frozen=True)
class Factorization:
    """A layer and its directions, as pairs of an orthonormal basis and the share of energy along each of its columns.

    A kernel larger than 1 has two ranks, of input and output directions. Without a kernel the core is diagonal and
    merges into a rotation: there is one rank, of directions on the smaller side. `positions` says how many input
    positions the layer sees, and at how many output positions it is applied, in all its calls.
    """

    path: str
    layer: nn.Conv2d | nn.Linear
    positions: tuple[int, int]
    directions: tuple[tuple[Tensor, Tensor], ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.layer.weight.shape[1], self.layer.weight.shape[0]

    @property
    def kernel(self) -> int:
        return math.prod(self.layer.weight.shape[2:])

    @property
    def full(self) -> tuple[int, ...]:
        return self.sizes if self.kernel > 1 else (min(self.sizes),)

    def factors(self, ranks: tuple[int, ...]) -> tuple[int, int, int]:
        """Weights of rotate in, core and rotate out."""
        inputs, outputs = self.sizes
        if self.kernel == 1:
            return 0, inputs * ranks[0], ranks[0] * outputs
        return inputs * ranks[0], self.kernel * ranks[0] * ranks[1], ranks[1] * outputs

    def is_smaller(self, ranks: tuple[int, ...]) -> bool:
        """Whether the factors have fewer weights than the layer, so that it is replaced."""
        return sum(self.factors(ranks)) < self.layer.weight.numel()

    def parameters(self, ranks: tuple[int, ...]) -> int:
        """Weights and biases, of the factors or of the layer as it is, whichever it will be."""
        weights = sum(self.factors(ranks)) if self.is_smaller(ranks) else self.layer.weight.numel()
        return weights + (0 if self.layer.bias is None else self.layer.bias.numel())

    def macs(self, ranks: tuple[int, ...]) -> int:
        """Multiply-accumulates, of the factors or of the layer as it is, whichever it will be."""
        before, after = self.positions
        if not self.is_smaller(ranks):
            return after * self.layer.weight.numel()
        rotate_in, core, rotate_out = self.factors(ranks)
        return before * rotate_in + after * (core + rotate_out)

    def ranks(self, threshold: float, weight: float) -> tuple[int, ...]:
        """How many directions carry at least `threshold` energy for their cost; never none.

        The cost of a direction is its parameters at the full other rank, plus `weight` times its multiply-accumulates.
        """
        inputs, outputs = self.sizes
        price = 1 + weight * self.positions[1]
        if self.kernel == 1:
            costs: tuple[int, ...] = (inputs + outputs,)
        else:
            costs = (inputs + self.kernel * outputs, outputs + self.kernel * inputs)
        return tuple(
            min(max(int((energy >= threshold * cost * price).sum()), 1), full)
            for (_, energy), cost, full in zip(self.directions, costs, self.full, strict=True)
        )

    def build(self, ranks: tuple[int, ...]) -> nn.Sequential:
        """The factors as layers; the core is the weight in the rotated basis, the best there is for these rotations."""
        weight = self.layer.weight.detach().double()
        bases = [basis[:, :rank] for (basis, _), rank in zip(self.directions, ranks, strict=True)]
        if self.kernel > 1:
            rotate_in, rotate_out = bases
            core = torch.einsum("os,oihw,ir->srhw", rotate_out, weight, rotate_in)
            factors = [rotate_in.T[:, :, None, None], core, rotate_out[:, :, None, None]]
        else:
            matrix, basis, inputs_are_fewer = weight.flatten(1), bases[0], self.sizes[0] < self.sizes[1]
            factors = [basis.T, matrix @ basis] if inputs_are_fewer else [basis.T @ matrix, basis]
            factors = [factor.reshape(*factor.shape, *weight.shape[2:]) for factor in factors]
        core_at = len(factors) // 2 if self.kernel > 1 else 0
        layers = [factor_layer(self.layer, factor, i == core_at) for i, factor in enumerate(factors)]
        if (bias := self.layer.bias) is not None:
            layers[-1].bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return nn.Sequential(*layers)


def factor_layer(layer: nn.Conv2d | nn.Linear, weight: Tensor, is_core: bool) -> nn.Conv2d | nn.Linear:
    """A layer without bias for one factor, trained if the layer was; the core has its stride, padding and dilation."""
    outputs, inputs = weight.shape[:2]
    made: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        made = nn.Linear(inputs, outputs, bias=False)
    else:
        moves = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation} if is_core else {}
        made = nn.Conv2d(inputs, outputs, tuple(weight.shape[2:]), bias=False, **moves)  # type: ignore[arg-type]
    # A clone, since a 1x1 kernel out of a transposed matrix counts as contiguous, but has strides of channels last, for
    # which a convolution may round differently.
    weight = weight.to(layer.weight.dtype).clone(memory_format=torch.contiguous_format)
    made.weight = nn.Parameter(weight, layer.weight.requires_grad)
    return made


def factorizations(model: nn.Module, ops: Iterable[Op]) -> list[Factorization]:
    """All convolutions without groups and linear layers that run in these operations, with their directions.

    Left out is a model that is a layer itself. Raises InputError where a weight is not finite.
    """
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for op in ops:
        if op.name in ("aten.convolution", "aten.addmm", "aten.mm"):
            x = op.inputs[0] if op.name == "aten.convolution" else op.out
            before[op.module] += x.numel // x.shape[1]
            after[op.module] += op.out.numel // op.out.shape[1]
    owners = Counter(id(p) for _, m in model.named_modules(remove_duplicate=False) for p in m.parameters(recurse=False))
    found = []
    for path, layer in leaves(model):
        if any(owners[id(p)] > 1 for p in layer.parameters()):
            continue  # what stands, or is read, at several places stays
        is_conv = layer_type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if path and path in after and (is_conv or layer_type(layer) is nn.Linear):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            weight = layer.weight.detach().double()
            if not bool(weight.isfinite().all()):
                raise InputError(f"low-rank: weights of layer {path!r} are NaN or infinite; train the model again")
            sides = (1, 0) if weight[0, 0].numel() > 1 else (int(weight.shape[1] < weight.shape[0]),)
            directions = tuple(_directions(weight.movedim(side, 0).flatten(1)) for side in sides)
            found.append(Factorization(path, layer, (before[path], after[path]), directions))
    return found


def _directions(unfolding: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions of the rows' space, columns sorted by energy, and each one's share of all energy."""
    energy, vectors = torch.linalg.eigh(unfolding @ unfolding.T)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    return vectors * signs(vectors), energy / energy.sum().clamp(min=1e-300)


def signs(basis: Tensor) -> Tensor:
    """For each column the sign of its largest entry; times it, a basis is the same on every machine."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)
