"""The Fisher matrix of single layers in Kronecker-factored form, and its corrected eigenvalues.

For one example, the gradient of a layer's weight at kernel position k is sum_t g_t a_(t,k)^T over output positions t,
with g the gradient at the output and a the input that the kernel position meets. Martens and Grosse 2015 (K-FAC, arXiv
1503.05671) and Grosse and Martens 2016 (KFC for convolutions, arXiv 1602.01407) approximate its second moment by a
Kronecker product of

    A = E[mean over k of sum over t of a a^T]   (inputs x inputs)
    G = E[mean over t of g g^T]                 (outputs x outputs)

KFC takes A over inputs x kernel positions. Here it is over input channels alone, pooled over kernel positions, since
its eigenvectors become a 1x1 convolution, which turns all kernel positions alike. For linear layers and 1x1
convolutions both are the same. George et al. 2018 (EKFAC, arXiv 1806.03884) replace the eigenvalues of the product by
the second moments of the gradient along its eigenvectors; there each kernel position has its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from micronet_eval.errors import InputError
from micronet_eval.structure import first_input

CHUNK = 16
"""Examples that are differentiated at a time. The model is in evaluation mode, so that examples do not see each other
and the result is that of the whole batch; memory for activations is that of a chunk."""

Layer = nn.Conv2d | nn.Linear
Visit = Callable[[Tensor, Tensor, float, int], None]
"""Is shown a layer's input, the gradient at its output, the weight of the pass and how many examples run in it."""


@dataclass(frozen=True)
class Batch:
    """Calibration data: examples, a label or a draw from [0, 1) for each, and the batch's weight in the average."""

    inputs: Tensor
    labels: Tensor
    weight: float

    @property
    def is_drawn(self) -> bool:
        return self.labels.is_floating_point()


@dataclass(frozen=True)
class Factors:
    """A (inputs x inputs) and G (outputs x outputs)."""

    inputs: Tensor
    outputs: Tensor

    def damped(self, damping: float) -> Factors:
        """Each factor plus the root of `damping`, as a share of its mean eigenvalue, times the identity.

        This is the split of Martens and Grosse, section 6.3, for a damping of the product that is a share of its mean
        eigenvalue *(ours)*: layers differ by orders of magnitude, and so does a network before and after training.
        """
        share = damping**0.5
        inputs, outputs = (
            factor + share * _mean_eigenvalue(factor) * torch.eye(len(factor)).to(factor)
            for factor in (self.inputs, self.outputs)
        )
        return Factors(inputs, outputs)


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of A and of G as columns, and eigenvalues of shape (outputs, inputs, kernel positions)."""

    inputs: Tensor
    outputs: Tensor
    eigenvalues: Tensor

    def rotate(self, weight: Tensor) -> Tensor:
        """A weight of shape (outputs, inputs, kernel positions) in the eigenbasis."""
        return torch.einsum("or,oik,is->rsk", self.outputs.to(weight), weight, self.inputs.to(weight))


def batches_of(data: Sequence[tuple[Tensor, Tensor]], momentum: float, true_fisher: bool, seed: int) -> list[Batch]:
    """Batches with the weights of a moving average whose last value counts 1 - momentum, before normalisation.

    The weights are divided by their sum, as Adam does it, so that the first batch does not rule over a few. For the
    true Fisher each example has a draw that picks its label from the model's own output; else it has its own label.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [momentum ** (len(data) - 1 - i) for i in range(len(data))]
    return [
        Batch(inputs, torch.rand(len(inputs), generator=generator) if true_fisher else labels, weight / sum(weights))
        for (inputs, labels), weight in zip(data, weights, strict=True)
    ]


def factors(model: nn.Module, layers: Mapping[str, bool], batches: Sequence[Batch]) -> dict[str, Factors]:
    """The factors of the layers at these paths; True stands for a layer whose bias is an extra input that is always 1.

    A layer that does not act exactly once in a forward pass, or has no gradient, is left out. `model` is in evaluation
    mode, and its parameters require no gradient. Raises InputError where its output is not (examples, classes), or a
    factor is not finite.
    """
    found: dict[str, Factors] = {}
    calls: Counter[str] = Counter()

    def visit(path: str) -> Visit:
        layer = _layer(model, path)

        def add(x: Tensor, g: Tensor, weight: float, examples: int) -> None:
            grads = output_gradients(layer, g, examples)
            taps = inputs_at(layer, x, g, layers[path], examples)
            a = _gram(*taps) * (weight / len(taps))
            b = _gram(grads) * (weight / grads.shape[2])
            now = found.get(path)
            found[path] = Factors(a, b) if now is None else Factors(now.inputs.add_(a), now.outputs.add_(b))
            calls[path] += 1

        return add

    passes = _backward(model, {path: visit(path) for path in layers}, batches)
    for path, of_layer in found.items():
        if not bool(torch.isfinite(of_layer.inputs.sum() + of_layer.outputs.sum())):
            raise InputError(
                f"eigendamage: inputs or gradients of layer {path!r} are too large to square, or no numbers; "
                "train the model, or estimate batch norm's statistics, before pruning"
            )
    return {path: found[path] for path in layers if calls[path] == passes}


def eigenbases(
    model: nn.Module,
    layers: Mapping[str, bool],
    factors: Mapping[str, Factors],
    batches: Sequence[Batch],
    damping: float,
) -> dict[str, Eigenbasis]:
    """The eigenvectors of the damped factors, with corrected eigenvalues plus the damping."""
    bases = {path: _eigenbasis(_layer(model, path), factors[path].damped(damping)) for path in factors}

    def visit(path: str) -> Visit:
        layer, basis = _layer(model, path), bases[path]

        def add(x: Tensor, g: Tensor, weight: float, examples: int) -> None:
            grads, taps = output_gradients(layer, g, examples), inputs_at(layer, x, g, layers[path], examples)
            for k, squares in enumerate(_rotated_squares(basis, grads, taps)):
                basis.eigenvalues[:, :, k].add_(squares, alpha=weight)

        return add

    _backward(model, {path: visit(path) for path in bases}, batches)
    for path, basis in bases.items():
        floor = damping * _mean_eigenvalue(factors[path].inputs) * _mean_eigenvalue(factors[path].outputs)
        basis.eigenvalues.add_(floor)
    return bases


def inputs_at(layer: Layer, x: Tensor, g: Tensor, extra: bool, examples: int) -> list[Tensor]:
    """What each kernel position meets, as (examples, inputs, output positions); with a row of ones where `extra`."""
    if isinstance(layer, nn.Linear):
        taps = [x.reshape(len(x), -1, layer.in_features).transpose(1, 2)]
    else:
        x = pad(x, layer._reversed_padding_repeated_twice)
        spans = [s * (n - 1) + 1 for s, n in zip(layer.stride, g.shape[2:], strict=True)]
        taps = [
            x[:, :, i : i + spans[0] : layer.stride[0], j : j + spans[1] : layer.stride[1]].flatten(2)
            for i in range(0, layer.dilation[0] * layer.kernel_size[0], layer.dilation[0])
            for j in range(0, layer.dilation[1] * layer.kernel_size[1], layer.dilation[1])
        ]
    taps = [_by_example(tap, examples) for tap in taps]
    return [torch.cat([tap, torch.ones_like(tap[:, :1])], 1) for tap in taps] if extra else taps


def output_gradients(layer: Layer, g: Tensor, examples: int) -> Tensor:
    """The gradient at a layer's output as (examples, outputs, output positions)."""
    if isinstance(layer, nn.Linear):
        return _by_example(g.reshape(len(g), -1, layer.out_features).transpose(1, 2), examples)
    return _by_example(g.flatten(2), examples)


def _by_example(x: Tensor, examples: int) -> Tensor:
    """(batch, channels, positions) with one in the batch an example, where a model merged tokens or frames into it.

    As (examples, tokens) are merged; where tokens come first, those of other examples are taken for its own.
    """
    batch, channels, _ = x.shape
    if batch == examples or batch % examples:
        return x
    return x.reshape(examples, batch // examples, channels, -1).transpose(1, 2).flatten(2)


def _rotated_squares(basis: Eigenbasis, grads: Tensor, taps: Sequence[Tensor]) -> Iterator[Tensor]:
    """Squares of the examples' gradients in the eigenbasis, summed: (outputs, inputs) for one kernel position each.

    Each side is rotated before or after summing over output positions, whichever takes fewer multiplications. One
    example after the other, so that its gradient stays cached: those of a batch, of all weights, would not.
    """
    outputs_first = grads.shape[2] < len(taps) * taps[0].shape[1]
    inputs_first = grads.shape[2] < grads.shape[1]
    if outputs_first:
        grads = _turned(basis.outputs, grads)
    for tap in taps:
        total = torch.zeros_like(basis.eigenvalues[:, :, 0], memory_format=torch.contiguous_format)
        for grad, met in zip(grads, _turned(basis.inputs, tap) if inputs_first else tap, strict=True):
            gradient = grad @ met.T
            if not inputs_first:
                gradient = gradient @ basis.inputs
            if not outputs_first:
                gradient = basis.outputs.T @ gradient
            total.addcmul_(gradient, gradient)
        yield total


def _turned(basis: Tensor, x: Tensor) -> Tensor:
    """Channels of (examples, channels, positions) in a basis: one product of matrices, not one for each example."""
    examples, channels, positions = x.shape
    turned = basis.T @ x.transpose(0, 1).reshape(channels, -1)
    return turned.view(channels, examples, positions).transpose(0, 1)


def _eigenbasis(layer: Layer, factors: Factors) -> Eigenbasis:
    inputs, outputs = (torch.linalg.eigh(f.double())[1].to(f.dtype) for f in (factors.inputs, factors.outputs))
    return Eigenbasis(inputs, outputs, inputs.new_zeros(len(outputs), len(inputs), layer.weight[0, 0].numel()))


def _gram(*parts: Tensor) -> Tensor:
    """Products of channels summed over examples and positions, and over parts."""
    flat = (part.transpose(0, 1).reshape(part.shape[1], -1) for part in parts)
    return torch.stack([matrix @ matrix.T for matrix in flat]).sum(0)


def _mean_eigenvalue(factor: Tensor) -> float:
    return float(factor.diagonal().mean())


def _layer(model: nn.Module, path: str) -> Layer:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer


def _backward(model: nn.Module, visits: Mapping[str, Visit], batches: Sequence[Batch]) -> int:
    """Shows each layer's inputs and output gradients of all batches to its visitor; returns how many passes it took.

    The gradient is that of the summed cross entropy, so that each example has its own.
    """
    passes = 0
    with _watched(model, visits) as running:
        for batch in batches:
            for inputs, labels in zip(*(torch.split(t, CHUNK) for t in (batch.inputs, batch.labels)), strict=True):
                running[:] = [(batch.weight / len(batch.inputs), len(inputs))]
                logits = model(inputs)
                if not isinstance(logits, Tensor) or logits.dim() != 2:
                    raise InputError("eigendamage needs a model whose output is (examples, classes)")
                if not batch.is_drawn and (most := int(labels.max())) >= logits.shape[1]:
                    raise InputError(f"eigendamage: label {most} has no output; the model has {logits.shape[1]}")
                with torch.no_grad():
                    below = logits.softmax(1).cumsum(1) < labels[:, None] if batch.is_drawn else None
                    target = labels if below is None else below.sum(1).clamp(max=logits.shape[1] - 1)
                if logits.requires_grad:
                    cross_entropy(logits, target, reduction="sum").backward()  # type: ignore[no-untyped-call]
                passes += 1
    return passes


@contextmanager
def _watched(model: nn.Module, visits: Mapping[str, Visit]) -> Iterator[list[tuple[float, int]]]:
    """Hooks on layers, for as long as it lasts; gives the place for weight and examples of the running pass."""
    running: list[tuple[float, int]] = []

    def hook(visit: Visit) -> Callable[..., Tensor]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = first_input(args, kwargs).detach()
            if not output.requires_grad:  # the first on its way: here gradients begin
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda g: visit(x, g, *running[0]))  # type: ignore[no-untyped-call]
            return output

        return watch

    handles = [
        model.get_submodule(path).register_forward_hook(hook(visit), with_kwargs=True) for path, visit in visits.items()
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
