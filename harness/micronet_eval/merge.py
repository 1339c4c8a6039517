"""Batch norm in evaluation is a fixed scale and shift: merged into the layer before or behind it where that is exact.

The merge is really made, so what is counted is what runs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as replaced
from functools import cache
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from micronet_eval.errors import InputError
from micronet_eval.formats import SMALLEST_SCALE, AffineQuantizer, block_indices
from micronet_eval.precision import through_views
from micronet_eval.structure import Mask, ScaleShift, layer_type, original_of, replace
from micronet_eval.trace import Buffer, Example, Op, Trace, Value, changed, trace

_DOT_PRODUCTS = ("aten.convolution", "aten.addmm", "aten.mm")
_SAME = ("aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.view", "aten._unsafe_view")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MERGES_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)

Direction = Literal["backward", "forward"]
ScaleAndShift = tuple[Tensor, Tensor]
BOTH: tuple[Direction, ...] = ("backward", "forward")


def merged(model: nn.Module, example_input: Example, directions: Sequence[Direction] = BOTH) -> nn.Module:
    """A copy of `model` without batch norm: merged where that is exact, else a ScaleShift (2 values a channel).

    A model without batch norm is returned as it is.

    Exact means, backward: the convolution or linear layer in front feeds nothing but this batch norm, each of the two
    runs once, nothing else reads weight or bias, and the weight is free to be scaled: not quantized, or to integers
    with scales for each output, which take the factor (but for transposed convolutions). Forward: the batch norm feeds
    nothing but such a layer, not quantized, which pads nothing (padding comes after the shift). Masked weights keep
    their zeros.
    """
    if not any(is_norm(m) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    return _merge(model, trace(model, example_input), directions)


def _merge(model: nn.Module, recorded: Trace, directions: Sequence[Direction]) -> nn.Module:
    """`model` itself without batch norm; `recorded` is its trace, or that of a copy."""
    for norm_path, layer_path, direction in _mergeable_on_all_paths(_by_path(model), recorded, directions):
        norm, layer = model.get_submodule(norm_path), model.get_submodule(layer_path)
        assert isinstance(norm, _BatchNorm)
        _check_values({norm_path: norm, layer_path: layer})
        (_merge_backward if direction == "backward" else _merge_forward)(layer, norm)
        _replace_everywhere(model, norm, nn.Identity())
    return without_batch_norm(model, {op.module for op in recorded.ops if _is_normalized(op) and not _is_fixed(op)})


def merged_trace(model: nn.Module, example_input: Example) -> Trace:
    """The trace of `merged(model, example_input)`. Of plain models it is made from that of `model`, which runs once.

    There a merged weight is the original tensor, where the merge makes none of its values zero: which of them are zero
    is all that counts. Parametrized layers, linear layers and graphs are really merged, and traced again.
    """
    recorded = trace(model, example_input)
    modules = _by_path(model)
    if not any(map(is_norm, modules.values())):
        return recorded
    merges = _mergeable_on_all_paths(modules, recorded, BOTH)
    if isinstance(model, fx.GraphModule) or not _are_plain(recorded, {layer for _, layer, _ in merges}):
        return trace(_merge(copy.deepcopy(model), recorded, BOTH), example_input)
    return _Rewriting(modules, recorded).without_norms({norm: (layer, way) for norm, layer, way in merges})


def without_batch_norm(model: nn.Module, but: Container[str] = ()) -> nn.Module:
    """Makes every batch norm of `model` a ScaleShift, merging nothing; changes the model and returns it.

    Those with the paths of `but` stay: they are no fixed scale and shift, as the forward runs them in training mode.
    """
    for path, module in list(model.named_modules()):
        if is_norm(module) and path not in but:
            _check_values({path: module})
            if module is model:
                return _scale_shift(module)
            _replace_everywhere(model, module, _scale_shift(module))
    return model


def _check_values(together: Mapping[str, nn.Module]) -> None:
    """Raises InputError where only some of the tensors that are computed with together have values."""
    held = {
        _join(path, name): tensor
        for path, module in together.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if name != "num_batches_tracked"
    }
    missing = [name for name, tensor in held.items() if tensor.is_meta]
    if 0 < len(missing) < len(held):
        raise InputError(f"tensor {missing[0]!r} has no values, but what it is merged with has; it is missing")


def is_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a module is a fixed scale and shift and nothing else: a subclass or a hook may do more."""
    plain = type(module) in _NORMS and not module._forward_hooks and not module._forward_pre_hooks
    return plain and module._buffers.get("running_mean") is not None


def _is_normalized(op: Op) -> bool:
    return "batch_norm" in op.name


def _is_fixed(op: Op) -> bool:
    """Whether a batch norm runs with the statistics that it keeps, not with those of the batch."""
    return not op.named.get("training", False)


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in the place of `old` under every name that the model has for it."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            replace(model, path, new)


def _by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its names."""
    return dict(model.named_modules(remove_duplicate=False))


def _mergeable_on_all_paths(
    modules: Mapping[str, nn.Module], recorded: Trace, directions: Sequence[Direction]
) -> list[tuple[str, str, Direction]]:
    """What `_mergeable` finds, where it does so on each path of a conditional model on which one of the two runs."""
    parts, readers = list(recorded.by_path().values()), _readers(recorded)
    ran = [{op.module for op in part.ops} for part in parts]
    found = [list(_mergeable(modules, part, readers, directions)) for part in parts]
    return [
        merge
        for merge in dict.fromkeys(merge for merges in found for merge in merges)
        if all(merge in merges or not ran_here & {*merge[:2]} for merges, ran_here in zip(found, ran, strict=True))
    ]


def _mergeable(
    modules: Mapping[str, nn.Module], recorded: Trace, readers: _Readers, directions: Sequence[Direction]
) -> Iterator[tuple[str, str, Direction]]:
    """The paths of each batch norm that can be merged and of the layer that takes it; backward where both can."""
    runs = Counter(op.module for op in recorded.ops if op.name in _DOT_PRODUCTS or _is_normalized(op))
    users = recorded.users
    times = {op: time for time, op in enumerate(recorded.ops)}
    owners = Counter(modules.values())  # of a module, a parametrization among them
    for op in recorded.ops:
        norm = modules.get(op.module) if _is_normalized(op) and _is_fixed(op) else None
        if norm is None or not is_norm(norm):
            continue
        for direction in directions:
            find = _only_source if direction == "backward" else _only_reader
            layer = find(op, users, recorded.outputs)
            own = None if layer is None else modules.get(layer.module)
            if layer is None or own is None or runs[op.module] != 1 or runs[layer.module] != 1:
                continue
            if direction == "forward" and _is_overwritten(op.args[0], recorded, times[op], times[layer]):
                continue
            weight = through_views(layer.args[2 if layer.name == "aten.addmm" else 1])
            itself = parametrize.is_parametrized(own) or weight.producer is None
            leaves = (leaf for value in layer.inputs if value.is_constant for leaf in value.leaves())
            alone = all(readers[leaf] == {layer.module} for leaf in leaves)
            alone &= all(owners[p] == 1 for p in own.modules() if p is not own)
            if itself and alone and _can_scale(own, norm, direction):
                yield op.module, layer.module, direction
                break


_Readers = Mapping[Value, set[str | None]]
"""What the model keeps -> the modules whose operations read it or what is computed from it; None: it is returned."""


def _readers(recorded: Trace) -> _Readers:
    """On all paths of a conditional model."""
    read = [(op.module, v) for op in recorded.ops for v in op.inputs if v.data is not None]
    found: dict[Value, set[str | None]] = {}
    for module, value in (*read, *((None, v) for v in recorded.outputs if v.data is not None)):
        for leaf in (value,) if value.producer is None else value.leaves():
            found.setdefault(leaf, set()).add(module)
    return found


def _only_source(norm: Op, users: Mapping[Value, list[Op]], outputs: tuple[Value, ...]) -> Op | None:
    """The dot product that feeds `norm`, if nothing else reads what lies between."""
    value: Value = norm.args[0]
    while value.producer is not None and len(users[value]) == 1 and value not in outputs:
        op = value.producer
        if op.name in _DOT_PRODUCTS:
            return op
        if op.name not in _SAME or op.out.shape != op.inputs[0].shape:
            return None
        value = op.inputs[0]
    return None


def _only_reader(norm: Op, users: Mapping[Value, list[Op]], outputs: tuple[Value, ...]) -> Op | None:
    """The dot product without padding that `norm` feeds, if nothing else reads what lies between."""
    value = norm.out
    while len(users.get(value, ())) == 1 and value not in outputs:
        (op,) = users[value]
        if op.name in _DOT_PRODUCTS and op.args[1 if op.name == "aten.addmm" else 0] is value:
            unpadded = op.name != "aten.convolution" or not (any(op.args[4]) or op.args[6])
            return op if unpadded else None
        if op.name not in _SAME or op.out.shape != value.shape:
            return None
        value = op.out
    return None


def _is_overwritten(value: Value, recorded: Trace, norm: int, layer: int) -> bool:
    """Whether the memory of what goes into a norm is written before a layer runs, which would then read it there."""
    memory = recorded.buffers[value]
    return any(recorded.buffers[written] is memory for op in recorded.ops[norm + 1 : layer] for written in op.written)


def _can_scale(layer: nn.Module, norm: _BatchNorm, direction: Direction) -> bool:
    if layer_type(layer) not in _MERGES_INTO or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if not parametrize.is_parametrized(layer):
        return True
    if list(layer.parametrizations) != ["weight"]:  # type: ignore[arg-type]
        return False
    masks, quantizer = _parametrizations(layer)
    if quantizer is not None and (direction == "forward" or _scaled(layer, quantizer, norm) is None):
        return False
    return all(isinstance(p, Mask) for p in masks)


def _parametrizations(layer: nn.Module) -> tuple[list[nn.Module], AffineQuantizer | None]:
    """What is on the weight of a layer in front of a quantizer to integers with scales, and that, where it is last."""
    on_it = list(layer.parametrizations["weight"])  # type: ignore[index]
    last = on_it[-1]
    return (on_it[:-1], last) if isinstance(last, AffineQuantizer) else (on_it, None)


def _scaled(layer: nn.Module, quantizer: AffineQuantizer, norm: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """The scales of s W, those of W times |s|, and what its integers, those of W with the sign of s, come to.

    None where there are no such: outputs share a scale, there are zero points, the scales are bound to be powers of two
    or come out below the smallest, an integer has no counterpart of the other sign, or values are not known.
    """
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    blocks = quantizer.blocks or tuple(weight.shape)
    bound = quantizer.zero_point is not None or parametrize.is_parametrized(quantizer)
    if bound or blocks[0] != 1 or isinstance(layer, _TRANSPOSED) or weight.is_meta:
        return None
    where = block_indices(weight.shape, blocks)
    factor, _ = _scale_and_shift(norm)
    scales = quantizer.scale.detach()
    codes = (weight.double() / scales.double()[where]).round() * factor.sign().view(-1, *[1] * (weight.dim() - 1))
    scaled = (scales.double().view(len(factor), -1) * factor.abs()[:, None]).flatten()
    scaled = torch.where(scaled > 0, scaled, 1.0).to(scales.dtype)  # 1 beside integers that are all 0
    low, high = quantizer.range
    fit = (codes >= low) & (codes <= high)  # not where they are NaN
    return (scaled, codes * scaled.double()[where]) if bool(fit.all() & (scaled >= SMALLEST_SCALE).all()) else None


def _scale_and_shift(norm: _BatchNorm) -> ScaleAndShift:
    """weight / sqrt(var + eps) and bias - mean * scale, in float64."""
    return _scales_and_shifts([norm])[norm]


@torch.no_grad()
def _scales_and_shifts(norms: Iterable[_BatchNorm]) -> dict[_BatchNorm, ScaleAndShift]:
    """Those of each norm. Norms on one device are computed together: calling torch takes longer than computing."""
    on_device: dict[torch.device, list[_BatchNorm]] = {}
    for norm in dict.fromkeys(norms):
        assert norm.running_mean is not None
        on_device.setdefault(norm.running_mean.device, []).append(norm)
    found: dict[_BatchNorm, ScaleAndShift] = {}
    for together in on_device.values():
        means: list[Tensor] = [norm.running_mean for norm in together]  # type: ignore[misc]
        variances: list[Tensor] = [norm.running_var for norm in together]  # type: ignore[misc]
        affine = [(norm.weight, norm.bias) for norm in together]
        weights: list[Tensor] = [
            torch.ones_like(m) if w is None else w for (w, _), m in zip(affine, means, strict=True)
        ]
        biases: list[Tensor] = [
            torch.zeros_like(m) if b is None else b for (_, b), m in zip(affine, means, strict=True)
        ]
        sizes = [len(mean) for mean in means]
        mean, variance, weight, bias = (torch.cat(of).double() for of in (means, variances, weights, biases))
        eps = mean.new_tensor([norm.eps for norm in together])
        eps = eps.repeat_interleave(torch.tensor(sizes, device=eps.device), output_size=len(mean))
        scale = (variance + eps).rsqrt() * weight
        shift = bias - mean * scale
        pairs = zip(scale.split_with_sizes(sizes), shift.split_with_sizes(sizes), strict=True)
        found |= zip(together, pairs, strict=True)
    return found


def _merge_backward(layer: nn.Module, norm: _BatchNorm) -> None:
    """s (W x + b) + t = (s W) x + (s b + t)."""
    scale, shift = _scale_and_shift(norm)
    weight = _weight(layer)
    bias = _bias_behind(layer.bias, scale, shift)  # type: ignore[arg-type]
    quantizer = _parametrizations(layer)[1] if parametrize.is_parametrized(layer) else None
    with torch.no_grad():
        if quantizer is not None:
            found = _scaled(layer, quantizer, norm)
            assert found is not None
            scales, scaled = found
            quantizer.scale.copy_(scales)
        elif isinstance(layer, _TRANSPOSED):  # inputs x outputs of each group
            channels = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
            scaled = (_by_group(weight, layer) * channels).flatten(0, 1)
        else:
            scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_(scaled)
        layer.bias = nn.Parameter(bias.to(weight.dtype))


def _bias_behind(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """s b + t."""
    return shift if bias is None else shift + bias.detach().double() * scale


def _merge_forward(layer: nn.Module, norm: _BatchNorm) -> None:
    """W (s x + t) + b = (W s) x + (W t + b); the weights of a group of outputs meet the channels of that group."""
    scale, shift = _scale_and_shift(norm)
    weight = _weight(layer)
    bias = _bias_in_front(layer, shift)
    with torch.no_grad():
        weight.copy_((_by_group(weight, layer) * _by_input(scale, layer)).flatten(0, 1))
        layer.bias = nn.Parameter(bias.to(weight.dtype))


def _bias_in_front(layer: nn.Module, shift: Tensor) -> Tensor:
    """W t + b."""
    weight = layer.weight.detach()  # type: ignore[operator]
    taps = _by_group(weight, layer)
    # A channel's weights meet the same shift.
    sums = taps.flatten(3).sum(3) if taps.shape[3:].numel() > 1 else taps.reshape(taps.shape[:3])
    bias = (sums @ shift.view(len(sums), -1, 1)).flatten()
    return bias if layer.bias is None else bias + layer.bias.detach().double()  # type: ignore[operator]


def _by_input(channels: Tensor, layer: nn.Module) -> Tensor:
    """A value for each input channel, as the weight split into groups meets it."""
    return channels.view(getattr(layer, "groups", 1), 1, -1, *[1] * (_weight(layer).dim() - 2))


def _by_group(weight: Tensor, layer: nn.Module) -> Tensor:
    """The weight in float64, its first dimension split into groups."""
    groups = getattr(layer, "groups", 1)
    return weight.double().reshape(groups, -1, *weight.shape[1:])


def _weight(layer: nn.Module) -> Tensor:
    """The weight that may be scaled: of a masked one, the values behind the mask."""
    return original_of(layer, "weight")


def _scale_shift(norm: _BatchNorm) -> ScaleShift:
    scale, shift = _scale_and_shift(norm)
    layer = ScaleShift(norm.num_features)
    dtype = norm.running_var.dtype  # type: ignore[union-attr]
    layer.weight, layer.bias = nn.Parameter(scale.to(dtype)), nn.Parameter(shift.to(dtype))
    return layer


# --- in the trace -----------------------------------------------------------------------------------------------------


def _are_plain(recorded: Trace, layers: Container[str]) -> bool:
    """Whether these layers are convolutions whose weights and biases are parameters as they are."""
    ops = [op for op in recorded.ops if op.name in _DOT_PRODUCTS and op.module in layers]
    constants = (v for op in ops for v in op.args[1:3])
    return all(op.name == "aten.convolution" for op in ops) and all(v is None or v.name is not None for v in constants)


class _Rewriting:
    """Takes the batch norms out of a trace of the model that has `modules`, as if the merged model had run."""

    def __init__(self, modules: Mapping[str, nn.Module], recorded: Trace) -> None:
        self.modules, self.recorded = modules, recorded
        self.now: dict[Value, Value] = {}  # what is read in the place of a value
        self.buffers = dict(recorded.buffers)
        self.moved: dict[Buffer, Buffer] = {}
        self.folded = recorded.folded
        self.factors = _scales_and_shifts(norm for norm in modules.values() if is_norm(norm))
        self.shifts: dict[str, tuple[Value, Value]] = {}

    def without_norms(self, merges: Mapping[str, tuple[str, Direction]]) -> Trace:
        """`merges`: batch norm -> the layer that takes it, and in which direction; all others become ScaleShifts."""
        takes: dict[str, list[tuple[str, Direction]]] = {}  # in the order of execution: one in front, one behind
        for norm_path, (layer, way) in merges.items():
            takes.setdefault(layer, []).append((norm_path, way))
        ops: list[Op] = []
        for op in self.recorded.ops:
            if _is_normalized(op) and _is_fixed(op) and is_norm(norm := self.modules[op.module]):
                if op.module in merges:
                    self._skip(op)
                else:
                    ops += self._scale_and_shift(op, norm)
                self.folded -= _folded_by_a_norm()
                continue
            if op.module in takes and op.name == "aten.convolution":
                x = op.args[0]
                op.read((self.now.get(x, x), *self._merged(op, takes[op.module]), *op.args[3:]), op.kwargs)
            elif not self.now.keys().isdisjoint(op.inputs):
                op.read(self._current(op.args), self._current(op.kwargs))
            ops.append(op)
        return replaced(
            self.recorded,
            ops=tuple(ops),
            outputs=tuple(self.now.get(v, v) for v in self.recorded.outputs),
            folded=self.folded,
            buffers={value: self.moved.get(buffer, buffer) for value, buffer in self.buffers.items()},
        )

    def _current(self, item: Any) -> Any:
        return changed(item, Value, lambda value: self.now.get(value, value))

    def _constant(self, name: str, data: Tensor) -> Value:
        value = Value(tuple(data.shape), data.dtype, name, data)
        self.buffers[value] = Buffer(data.untyped_storage().nbytes())
        return value

    def _merged(self, op: Op, norms: Sequence[tuple[str, Direction]]) -> tuple[Value, Value]:
        """Weight and bias of the layer that runs `op`, behind the merges."""
        layer, weight = self.modules[op.module], op.args[1]
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        scales = []
        for path, way in norms:
            scale, shift = self.factors[self._norm(path)]
            exact = _bias_behind(bias, scale, shift) if way == "backward" else _bias_in_front(layer, shift)
            bias = exact.to(weight.dtype)
            scales.append(scale)
        assert bias is not None
        if weight.known is not None and not _keeps_zeros(weight, scales):
            layer = copy.deepcopy(layer)
            for path, way in norms:
                (_merge_backward if way == "backward" else _merge_forward)(layer, self._norm(path))
            assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
            weight, bias = self._constant(_join(op.module, "weight"), layer.weight.detach()), layer.bias
        return weight, self._constant(_join(op.module, "bias"), bias.detach())

    def _norm(self, path: str) -> _BatchNorm:
        norm = self.modules[path]
        assert isinstance(norm, _BatchNorm)
        return norm

    def _skip(self, op: Op) -> None:
        """What read the result of a merged batch norm reads what went into it, in whose memory it lies."""
        source = self._current(op.args[0])
        self.now[op.out] = source
        self.moved[self.buffers[op.out]] = self.buffers[source]

    def _scale_and_shift(self, op: Op, norm: _BatchNorm) -> list[Op]:
        """What a ScaleShift runs: two views of its parameters, which are folded, a product and a sum."""
        x = self._current(op.args[0])
        if op.module not in self.shifts:
            layer = _scale_shift(norm)
            self.shifts[op.module] = (
                self._constant(_join(op.module, "weight"), layer.weight.detach()),
                self._constant(_join(op.module, "bias"), layer.bias.detach()),
            )
        shape = [-1] + [1] * (len(x.shape) - 2)
        weight, bias = (self._viewed(constant, shape, op) for constant in self.shifts[op.module])
        product = Op("aten.mul", op.module, (x, weight), {}, func=torch.ops.aten.mul.Tensor, path=op.path)
        product.outputs = (Value(x.shape, x.dtype, None, None, product),)
        self.buffers[product.out] = Buffer(self.buffers[op.out].bytes)
        total = Op("aten.add", op.module, (product.out, bias), {}, func=torch.ops.aten.add.Tensor, path=op.path)
        total.outputs = (Value(x.shape, x.dtype, None, None, total),)
        self.now[op.out] = total.out
        self.buffers[total.out] = self.buffers[op.out]
        return [product, total]

    def _viewed(self, constant: Value, shape: list[int], op: Op) -> Value:
        assert constant.data is not None
        view = Op("aten.view", op.module, (constant, shape), {}, func=torch.ops.aten.view.default, path=op.path)
        data = constant.data.view(shape)
        view.outputs = (Value(tuple(data.shape), data.dtype, None, data, view),)
        self.buffers[view.out] = self.buffers[constant]
        self.folded += 1
        return view.out


def _keeps_zeros(weight: Value, scales: Sequence[Tensor]) -> bool:
    """Whether nothing in a weight that is not zero becomes so when it is scaled: what is a normal number does not."""
    least = weight.least()
    for scale in scales:
        least *= float(scale.abs().min())
        if not least > torch.finfo(weight.dtype).tiny:
            return False
    return True


@cache
def _folded_by_a_norm() -> int:
    """What torch runs beside a batch norm that no input goes into: memory that it reserves."""
    return trace(nn.BatchNorm1d(1), torch.zeros(2, 1)).folded


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
