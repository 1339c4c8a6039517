"""Layers as chains: rotate in, core, rotate out; found in a model, cut to lower ranks, given new directions.

A chain starts as one convolution or linear layer. Whatever is done later to the core's directions merges into the
rotations beside it: three layers stay three.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from micronet_eval.structure import is_leaf, layer_type
from micronet_eval.trace import Example, trace
from micronet_plugins.low_rank import factor_layer
from micronet_plugins.weights import hooked

Layer = nn.Conv2d | nn.Linear
LOST = "lost_saliency"
"""Attribute of a chain's Sequential: what its input and output directions lost, pooled over rounds."""
ONE_PLACE = "is_one_place"
"""Attribute of a chain's Sequential: whether it stands in the place of one layer, so that it may become another number
of layers."""

Ranks = tuple[int, int]
"""How many input and output directions of the core there are."""
Form = tuple[bool, bool]
"""Whether there is a rotation in, and one out."""


@dataclass(frozen=True)
class Chain:
    """One to three layers at a path, of which only `core` may have a kernel larger than 1.

    Where no layer has such a kernel and nothing pads, the bias of the first layer is an extra input that is always 1,
    and is rotated with the inputs. Elsewhere an extra input would not be 1 where a convolution pads; the bias is the
    last layer's, and stays as it is.
    """

    path: str
    layers: tuple[Layer, ...]
    core_at: int
    is_one_place: bool

    @property
    def core(self) -> Layer:
        return self.layers[self.core_at]

    @property
    def core_path(self) -> str:
        return self.path if len(self.layers) == 1 else f"{self.path}.{self.core_at}"

    @property
    def kernel(self) -> int:
        """Kernel positions of the core."""
        return math.prod(self.core.weight.shape[2:])

    @property
    def has_extra_input(self) -> bool:
        first = self.layers[0]
        return first.bias is not None and self.kernel == 1 and not _pads(first)

    @property
    def core_has_extra_input(self) -> bool:
        return self.has_extra_input and self.core_at == 0

    @property
    def sizes(self) -> Ranks:
        """Inputs, with the extra one, and outputs of the whole chain."""
        return self.layers[0].weight.shape[1] + self.has_extra_input, self.layers[-1].weight.shape[0]

    @property
    def ranks(self) -> Ranks:
        """Input directions, with the extra one, and output directions of the core."""
        return self.core.weight.shape[1] + self.core_has_extra_input, self.core.weight.shape[0]

    @property
    def form(self) -> Form:
        return self.core_at > 0, self.core_at < len(self.layers) - 1

    @property
    def parameters(self) -> int:
        return sum(p.numel() for layer in self.layers for p in layer.parameters())

    def weight(self) -> Tensor:
        """The core's weight as (outputs, inputs, kernel positions) in double precision, with the extra input last."""
        return _matrix(self.core, self.core_has_extra_input)

    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """Rotate in (input directions x inputs) and rotate out (outputs x output directions), where there are any."""
        rotate_in = _matrix(self.layers[0], self.has_extra_input)[..., 0] if self.form[0] else None
        return rotate_in, _matrix(self.layers[-1], False)[..., 0] if self.form[1] else None

    def cheapest(self, ranks: Ranks) -> tuple[int, Form]:
        """Parameters and form of the cheapest chain of these ranks.

        A rotation that costs more than it saves is not made: the core then keeps the original directions on that side.
        A Sequential that does not say that it stands in the place of one layer keeps its layers, since it may be the
        architecture's own, or come from a file.
        """
        costs = self.costs(self.ranks_of_core(ranks))
        forms = costs if self.is_one_place else (self.form,)
        best = min(forms, key=costs.__getitem__)
        return costs[best] + (0 if (bias := self._bias()) is None else bias.numel()), best

    def may_lose(self, side: int) -> bool:
        """Whether fewer input (0) or output (1) directions cost less, in some form that the chain may take.

        Without a kernel the core has as many on both sides.
        """
        return self.is_one_place or self.form[side] or self.kernel == 1

    def costs(self, ranks: Ranks) -> dict[Form, int]:
        """Parameters of a chain of these ranks by its form, without a bias that is no extra input."""
        (i, o), (a, g), k = self.sizes, ranks, self.kernel
        return {
            (False, False): i * k * o,
            (True, False): i * a + a * k * o,
            (False, True): i * k * g + g * o,
            (True, True): i * a + a * k * g + g * o,
        }

    def ranks_of_core(self, ranks: Ranks) -> Ranks:
        """No side can have more directions than the other one times the kernel positions."""
        a = min(ranks[0], self.kernel * ranks[1])
        return a, min(ranks[1], self.kernel * a)

    def rebuilt(self, rotate_in: Tensor | None, core: Tensor, rotate_out: Tensor | None) -> nn.Module:
        """The chain of these matrices, as one layer or a Sequential."""
        extra, like = self.has_extra_input, self.core
        matrices = [m for m in (rotate_in, core, rotate_out) if m is not None]
        core_at, moves_at = int(rotate_in is not None), 0 if self.kernel == 1 else int(rotate_in is not None)
        mover = self.layers[0] if self.kernel == 1 else self.core
        biases = [layer.bias for layer in self.layers if layer.bias is not None]  # one at most
        made = []
        for at, matrix in enumerate(matrices):
            bias = matrix.reshape(len(matrix), -1)[:, -1] if extra and at == 0 else None
            if bias is not None:
                matrix = matrix[:, :-1]
            kernel = () if isinstance(like, nn.Linear) else like.kernel_size if at == core_at else (1, 1)
            layer = factor_layer(mover, matrix.reshape(*matrix.shape[:2], *kernel), at == moves_at)
            if bias is None and at == len(matrices) - 1:
                bias = self._bias()
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype).clone(), biases[0].requires_grad)
            made.append(layer)
        return made[0] if len(made) == 1 else nn.Sequential(*made)

    def _bias(self) -> Tensor | None:
        """The bias that is no extra input."""
        return None if self.has_extra_input else self.layers[-1].bias


def chains(model: nn.Module, apart: Collection[str] = ()) -> list[Chain]:
    """The convolutions without groups and the linear layers of a model, and the Sequentials that they became.

    The layers of the Sequentials at the paths `apart` are each a chain of their own (see `called_apart`). Left out are
    layers under a parametrization, such as a mask; layers and weights that stand at several places; and a model that is
    a layer itself.
    """
    places = Counter(
        id(thing)
        for _, module in model.named_modules(remove_duplicate=False)
        for thing in (module, *(p for p in module._parameters.values() if p is not None))
    )

    def fits(layer: nn.Module) -> bool:
        things = (layer, *layer.parameters())
        return _is_plain(layer) and all(places[id(thing)] == 1 for thing in things)

    return [
        Chain(path, layers, _core_at(layers), len(layers) == 1 or getattr(model.get_submodule(path), ONE_PLACE, False))
        for path, layers in _candidates(model, apart)
        if all(map(fits, layers))
    ]


def called_apart(model: nn.Module, example_input: Example) -> list[str]:
    """The paths of Sequentials that look like chains, but of which a layer runs without the others.

    What a forward does between layers that it calls itself need not be linear.
    """
    wholes = {p: m for p, m in model.named_modules() if type(m) is nn.Sequential and _is_chain(list(m))}
    if not wholes:
        return []
    calls: Counter[nn.Module] = Counter()
    watched = {part for whole in wholes.values() for part in (whole, *whole)}
    handles = [part.register_forward_pre_hook(lambda part, args: calls.update([part])) for part in watched]
    with hooked(model, handles):
        trace(model, example_input)
    return [path for path, whole in wholes.items() if any(calls[layer] != calls[whole] for layer in whole)]


def refitted(weight: Tensor, scales: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Tucker-2 decomposition of a rotated weight (outputs, inputs, kernel positions) at the ranks of what is kept.

    Gives two orthonormal bases, of inputs and of outputs, and the core. It lowers the squared error weighed by
    `scales` of inputs x outputs, by higher-order orthogonal iteration (De Lathauwer et al. 2000b) from the kept
    directions (indices of inputs and of outputs) on: each step is the best for its side, so the error is never larger
    than that of dropping the other directions.
    """
    root_in, root_out = (scale.sqrt() for scale in scales)
    scaled = weight * root_in[None, :, None] * root_out[:, None, None]
    basis_in, basis_out = (torch.eye(len(s), dtype=weight.dtype)[:, k] for s, k in zip(scales, kept, strict=True))
    for _ in range(SWEEPS):
        half = torch.einsum("oik,ia->oak", scaled, basis_in)
        basis_out = _leading(half.flatten(1), basis_out.shape[1])
        half = torch.einsum("oik,og->igk", scaled, basis_out)
        basis_in = _leading(half.flatten(1), basis_in.shape[1])
    core = torch.einsum("oik,og,ia->gak", scaled, basis_out, basis_in)
    basis_in, unscale_in = torch.linalg.qr(basis_in / root_in[:, None])
    basis_out, unscale_out = torch.linalg.qr(basis_out / root_out[:, None])
    return basis_in, torch.einsum("gak,hg,ba->hbk", core, unscale_out, unscale_in), basis_out


SWEEPS = 2


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, as columns."""
    if matrix.shape[0] > matrix.shape[1]:
        q, r = torch.linalg.qr(matrix)
        return q @ _leading(r, rank)
    return torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:].flip(1)


def _candidates(module: nn.Module, apart: Collection[str], prefix: str = "") -> Iterator[tuple[str, tuple[Layer, ...]]]:
    """All convolutions and linear layers with their paths; together where they are a chain."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if is_leaf(child):
            if isinstance(child, Layer):
                yield path, (child,)
        elif type(child) is nn.Sequential and path not in apart and _is_chain(list(child)):
            yield path, tuple(child)  # type: ignore[arg-type]
        else:
            yield from _candidates(child, apart, path)


def _is_chain(layers: Sequence[nn.Module]) -> bool:
    """Whether layers are a core and rotations, with nothing between them that is not linear."""
    kinds = {layer_type(layer) for layer in layers}
    if len(layers) not in (2, 3) or kinds not in ({nn.Conv2d}, {nn.Linear}) or not all(map(_is_plain, layers)):
        return False
    parts: list[Layer] = list(layers)  # type: ignore[arg-type]
    kernels = [math.prod(layer.weight.shape[2:]) for layer in parts]
    moving = kernels.index(max(kernels))  # the first, where all are 1
    biased = [at for at, layer in enumerate(parts) if layer.bias is not None]
    at_end = [len(parts) - 1]
    return (
        all(at == moving or (kernels[at] == 1 and _stays(layer)) for at, layer in enumerate(parts))
        and (len(parts) < 3 or moving == (1 if kernels[moving] > 1 else 0))
        and (biased in ([], at_end) or (biased == [0] and kernels[moving] == 1 and not _pads(parts[0])))
    )


def _core_at(layers: Sequence[Layer]) -> int:
    kernels = [math.prod(layer.weight.shape[2:]) for layer in layers]
    return kernels.index(max(kernels)) if max(kernels) > 1 else len(layers) // 2


def _is_plain(layer: nn.Module) -> bool:
    if parametrize.is_parametrized(layer):
        return False
    if layer_type(layer) is nn.Linear:
        return True
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _pads(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and any(layer._reversed_padding_repeated_twice)


def _stays(layer: Layer) -> bool:
    """Whether a 1x1 convolution takes every position as it is."""
    return isinstance(layer, nn.Linear) or (not _pads(layer) and set(layer.stride) == {1})


def _matrix(layer: Layer, with_bias: bool) -> Tensor:
    weight = layer.weight.detach().double()
    weight = weight.reshape(*weight.shape[:2], -1)
    if not with_bias or layer.bias is None:
        return weight
    return torch.cat([weight, layer.bias.detach().double()[:, None, None]], 1)
