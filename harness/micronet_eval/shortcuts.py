"""The commonest layers without the way to their operation: calls of modules, modes and torch's dispatcher.

That way is a large part of what tracing costs. What a layer called is kept, and called again for the next layer of its
kind with like options, with that layer's tensors; so nothing here says which operation it is, and another version of
torch may call something else. What does say something is what has to hold: that the layer, its options, its tensors and
torch's modes are as usual, so that there is nothing else on the way. Everything else goes the long way.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from micronet_eval.shapes import in_rows


class Held(Protocol):
    """What the recorder knows of a tensor; what the model keeps has data, and no operation made it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Tensor | None
    producer: Any


Tensors = Mapping[str, Held | None]
"""The parameters and buffers of a layer."""

INPUT = ""
"""The name of a layer's input among its tensors."""

GROUPS = "groups"
"""Is an argument of the operation, under the same name, and changes nothing else."""


def _is_usual_convolution(attributes: Mapping[str, Any], tensors: Tensors, x: Tensor) -> bool:
    """Others pad by the size of the weight, or by an operation of its own."""
    padding, groups = attributes["padding"], attributes[GROUPS]
    return attributes["padding_mode"] == "zeros" and type(padding) is tuple and type(groups) is int


def _is_usual_norm(attributes: Mapping[str, Any], tensors: Tensors, x: Tensor) -> bool:
    """It normalizes by statistics, and all it has fits the channels; torch checks that before it is one operation."""
    mean, variance, weight, bias = map(tensors.__getitem__, ("running_mean", "running_var", "weight", "bias"))
    if attributes["training"] or mean is None or variance is None:
        return False
    channels = x.shape[1:2]
    others_fit = all(tensor is None or tensor.shape == channels for tensor in (weight, bias))
    return mean.shape == variance.shape == channels and others_fit


def _is_usual_pooling(attributes: Mapping[str, Any], tensors: Tensors, x: Tensor) -> bool:
    """To one element, which is a mean; other layouts of the input are put back by an operation of their own."""
    size = attributes["output_size"]
    return type(size) in (int, tuple) and size in (1, (1, 1)) and in_rows(x)


def _is_usual(attributes: Mapping[str, Any], tensors: Tensors, x: Tensor) -> bool:
    return True


class Kind(NamedTuple):
    """The attributes that the operation depends on, beside tensors, and what has to hold for it to be just that."""

    options: tuple[str, ...]
    is_usual: Callable[[Mapping[str, Any], Tensors, Tensor], bool] = _is_usual


KINDS: Mapping[type[nn.Module], Kind] = {
    nn.Conv1d: Kind(("stride", "padding", "dilation"), _is_usual_convolution),
    nn.Conv2d: Kind(("stride", "padding", "dilation"), _is_usual_convolution),
    nn.BatchNorm2d: Kind(("momentum", "eps"), _is_usual_norm),
    nn.LayerNorm: Kind(("normalized_shape", "eps")),
    nn.ReLU: Kind(("inplace",)),
    nn.ReLU6: Kind(("inplace", "min_val", "max_val")),
    nn.SiLU: Kind(("inplace",)),
    nn.GELU: Kind(("approximate",)),
    nn.Hardswish: Kind(("inplace",)),
    nn.Sigmoid: Kind(()),
    nn.AdaptiveAvgPool2d: Kind(("output_size",), _is_usual_pooling),
}
"""Layers of one input and one operation."""

_STEPS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl")
"""What a call of a layer may go through; a layer or a class may have one of somebody else's."""

# Looked up once: they are asked before each layer.
_tracks_gradients = torch.is_grad_enabled
_casts = torch._C._is_any_autocast_enabled
_function_modes, _modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_mode_at, _transform = torch._C._get_dispatch_stack_at, torch._C._functorch.peek_interpreter_stack


class Recorder(Protocol):
    """What the recorder of a trace has to tell: the tensors that it knows, and the last operation that it recorded."""

    values: dict[int, Any]
    ops: list[Any]
    folded: int
    last: Any

    def value(self, tensor: Tensor) -> Any:
        """The value that a tensor holds now."""

    def record(self, func: Any, args: Any, kwargs: Any, read: tuple[Any, ...], read_by_name: dict[str, Any]) -> Any:
        """Runs an operation on tensors that are known, in whose places it reads these values, and records it."""


class _Called(NamedTuple):
    """What a layer called: for each argument the name of the tensor or attribute that it was, else None."""

    function: Any
    names: tuple[str | None, ...]
    constants: tuple[Any, ...]
    folded: int


class Shortcuts:
    """Calls modules for a recorder; those of KINDS by what such a layer called before."""

    def __init__(self, recorder: Recorder, call: Callable[..., Any]) -> None:
        self.recorder, self.call_module = recorder, call
        self.called: dict[Any, _Called] = {}
        self.forwards = {kind: kind.forward for kind in KINDS if _is_torchs(kind)}
        # The names of all that a layer has -> their number, whether its options are among them and no step of its own.
        self.sorts: dict[Any, tuple[int, bool]] = {}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns."""
        kind = type(module)
        if kind.forward is not self.forwards.get(kind) or kwargs or len(args) != 1 or not self._nothing_is_set():
            return self.call_module(module, *args, **kwargs)
        x, attributes = args[0], module.__dict__
        with torch._C.DisableTorchFunction():  # a mode makes each question to a tensor a call of Python
            key = self._key(kind, attributes, x)
            called = self.called.get(key)
            if called is not None:
                return self._called(called, attributes, x)
        return self.call_module(module, x) if key is None else self._learned(key, module, x)

    def _called(self, called: _Called, attributes: Mapping[str, Any], x: Tensor) -> Any:
        """What a layer returns that calls that, with its tensors."""
        tensors = {**attributes["_parameters"], **attributes["_buffers"], INPUT: x}
        if GROUPS in called.names:
            tensors[GROUPS] = attributes[GROUPS]
        given = [c if name is None else tensors[name] for name, c in zip(called.names, called.constants, strict=True)]
        with torch._C._DisableTorchDispatch():  # as torch does around a dispatch
            read = [self.recorder.value(arg) if isinstance(arg, Tensor) else arg for arg in given]
            result = self.recorder.record(called.function, tuple(given), {}, tuple(read), {})
        self.recorder.folded += called.folded
        return result[0] if isinstance(result, tuple) else result

    def _nothing_is_set(self) -> bool:
        """Whether the recorder is all that comes between layers and operations."""
        return not (
            _tracks_gradients()
            or _casts()
            or _function_modes() != 1
            or _modes() != 1
            or _mode_at(0) is not self.recorder
            or _transform() is not None
            or forward_ad._current_level >= 0
            or hooks._global_forward_hooks
            or hooks._global_forward_pre_hooks
        )

    def _key(self, kind: type[nn.Module], attributes: Mapping[str, Any], x: Any) -> Any:
        """What the operation depends on beside values and sizes; None if the layer or its input is not as usual."""
        # A conjugate or a negative that torch has put off comes first.
        if type(x) is not Tensor or id(x) not in self.recorder.values or x.is_complex() or x.is_neg():
            return None
        shape, parameters, buffers = x.shape, attributes["_parameters"], attributes["_buffers"]
        options, is_usual = KINDS[kind]
        names = kind, *attributes, *parameters, *buffers
        sort = self.sorts.get(names)
        if sort is None:
            others = {*_STEPS, *parameters, *buffers}
            is_whole = attributes.keys() >= {*options} and attributes.keys().isdisjoint(others)
            sort = self.sorts[names] = (len(self.sorts), is_whole)
        number, is_whole = sort
        if not is_whole or 0 in shape or _has_hooks(attributes):
            return None
        values = self.recorder.values
        tensors: dict[str, Held | None] = {}
        alike: list[torch.dtype | None] = []
        for name, tensor in (*parameters.items(), *buffers.items()):
            held = tensors[name] = None if tensor is None else values.get(id(tensor))
            if tensor is None:
                alike.append(None)
            elif held is None or not _is_usual_tensor(held):
                return None
            else:
                alike.append(held.dtype)
        if not is_usual(attributes, tensors, x):
            return None
        try:
            # With types, for 1 == 1.0 == True, not all of which torch takes.
            chosen = marshal.dumps([attributes[option] for option in options], 2)
        except ValueError:  # more than numbers, text, tuples and lists
            return None
        return number, len(shape), x.dtype, chosen, *alike

    def _learned(self, key: Any, module: nn.Module, x: Tensor) -> Any:
        """Calls the module the long way; keeps what it called if that was one operation, whose result it returns.

        What torch runs beside it on no input, as for the memory that it reserves for a batch norm, is only counted.
        """
        recorder = self.recorder
        operations, folded = len(recorder.ops), recorder.folded
        tensors = {**module._parameters, **module._buffers, INPUT: x}
        returned = self.call_module(module, x)
        if len(recorder.ops) != operations + 1:
            return returned
        function, args, kwargs, result = recorder.last
        held = {id(tensor): name for name, tensor in tensors.items() if tensor is not None}
        is_all = returned is (result[0] if isinstance(result, tuple) else result) and not kwargs
        if not is_all or len(held) != sum(tensor is not None for tensor in tensors.values()):  # one has two names
            return returned
        names: list[str | None] = []
        for arg, told in zip(args, function._schema.arguments, strict=False):
            if isinstance(arg, Tensor) and id(arg) not in held:
                return returned
            names.append(held[id(arg)] if isinstance(arg, Tensor) else GROUPS if told.name == GROUPS else None)
        constants = tuple([None if isinstance(arg, Tensor) else arg for arg in args])
        self.called[key] = _Called(function, tuple(names), constants, recorder.folded - folded)
        return returned


def _is_usual_tensor(held: Held) -> bool:
    """Whether a tensor is one of the model's own; torch may put off something of complex ones."""
    return held.producer is None and held.data is not None and not held.dtype.is_complex


def _has_hooks(attributes: Mapping[str, Any]) -> bool:
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )


def _is_torchs(kind: type[nn.Module]) -> bool:
    """Whether all that a call of such a layer goes through is torch's own."""
    steps = [step for name in _STEPS if (step := getattr(kind, name, None)) is not None]
    return all(getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.nn.modules.") for step in steps)
