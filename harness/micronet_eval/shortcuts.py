"""The commonest layers without the way to their operation: calls of modules, modes and torch's dispatcher.

That way is half of what tracing costs. What a layer called is kept, and called again for the next layer of its kind,
with that layer's tensors; so nothing here says what a layer does, and another version of torch may call something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

KINDS: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("kernel_size", "stride", "padding", "dilation", "padding_mode"),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "padding_mode"),
    nn.BatchNorm2d: ("training", "momentum", "eps", "track_running_stats"),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace", "min_val", "max_val"),
    nn.SiLU: ("inplace",),
    nn.GELU: ("approximate",),
    nn.Hardswish: ("inplace",),
    nn.Sigmoid: (),
}
"""Layers of one input and one operation, with the attributes that the operation depends on, beside tensors."""

_PASSED = {"groups"}
"""Attributes that are arguments of the operation, under the same name, and change nothing else."""

_FORWARDS = {kind: kind.forward for kind in KINDS}
_INPUT = ""
"""Stands for the input among the names of a layer's tensors."""


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


class Shortcuts:
    """Calls modules for a recorder; those of KINDS by what such a layer called before."""

    def __init__(self, recorder: Recorder, call: Callable[..., Any]) -> None:
        self.recorder, self.call_module = recorder, call
        self.called: dict[Any, tuple[Any, tuple[str | None, ...], tuple[Any, ...], int]] = {}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns."""
        options = KINDS.get(type(module))
        if options is None or kwargs or len(args) != 1 or not _runs_its_own_forward(module):
            return self.call_module(module, *args, **kwargs)
        x, attributes, known = args[0], module.__dict__, self.recorder.values
        tensors = {**attributes["_parameters"], **attributes["_buffers"], _INPUT: x}
        chosen = [attributes[option] for option in options]
        plain = all(t is None or (type(t) is Tensor and id(t) in known) for t in tensors.values())
        # A stride or a shape that was set from outside may be a list.
        if not plain or 0 in x.shape or list in map(type, chosen):
            return self.call_module(module, x)
        alike = [tensor if tensor is None else tensor.dtype for tensor in tensors.values()]
        key = (type(module), len(x.shape), *chosen, *alike)
        if key not in self.called:
            return self._learned(key, module, tensors)
        func, names, constants, folded = self.called[key]
        tensors.update({name: attributes[name] for name in _PASSED & attributes.keys()})
        given = [c if name is None else tensors[name] for name, c in zip(names, constants, strict=True)]
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # as torch does around a dispatch
            read = [self.recorder.value(arg) if isinstance(arg, Tensor) else arg for arg in given]
            result = self.recorder.record(func, tuple(given), {}, tuple(read), {})
        self.recorder.folded += folded
        return result[0] if isinstance(result, tuple) else result

    def _learned(self, key: Any, module: nn.Module, tensors: dict[str, Tensor | None]) -> Any:
        """Calls the module the long way; keeps what it called if that was one operation, whose result it returns.

        What torch runs beside it on no input, as the memory that it reserves for a batch norm, is only counted.
        """
        recorder = self.recorder
        operations, folded = len(recorder.ops), recorder.folded
        returned = self.call_module(module, tensors[_INPUT])
        if len(recorder.ops) != operations + 1:
            return returned
        func, args, kwargs, result = recorder.last
        held = {id(tensor): name for name, tensor in tensors.items() if tensor is not None}
        names = tuple([
            held.get(id(arg)) if isinstance(arg, Tensor) else (told.name if told.name in _PASSED else None)
            for arg, told in zip(args, func._schema.arguments, strict=False)
        ])  # fmt: skip
        all_held = all(name is not None for arg, name in zip(args, names, strict=True) if isinstance(arg, Tensor))
        each_once = len(held) == sum(tensor is not None for tensor in tensors.values())
        if all_held and each_once and not kwargs and returned is (result[0] if isinstance(result, tuple) else result):
            constants = tuple([None if isinstance(arg, Tensor) else arg for arg in args])
            self.called[key] = func, names, constants, recorder.folded - folded
        return returned


def _runs_its_own_forward(module: nn.Module) -> bool:
    """Whether a call of a layer of KINDS is nothing but its forward, and that is torch's own; nor are there modes."""
    attributes = module.__dict__
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or "forward" in attributes
        or type(module).forward is not _FORWARDS[type(module)]
        or attributes.get("_compiled_call_impl") is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() != 1
        or torch._C._len_torch_function_stack() != 1
    )
