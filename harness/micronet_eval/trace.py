"""Runs a model once on the meta device and writes down every operation that it executes.

The walk happens under a TorchDispatchMode, so it sees functional operations that hooks on modules miss, and it needs
no memory for activations. Everything is brought into one defined mode first (evaluation, no gradients, unfused
attention), so the trace is the same whatever device, dtype of gradients or training flag the model comes with.

Operations on parameters alone are executed on the real values at the same time (*folded*): a weight that is masked,
quantized or transposed on its way is known with its values where an operation on activations uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from micronet_eval.errors import InputError


@dataclass(frozen=True, eq=False)
class Buffer:
    """The memory that a tensor lies in. Views and in-place results lie in one and the same."""

    bytes: int


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor at one moment of the run. In-place operations make a new value.

    `data` holds the real tensor of a constant (a parameter, a buffer, or what is computed from them alone); None for
    activations. `name` is the path of a parameter or buffer, or `input`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    data: Tensor | None = None
    producer: Op | None = None

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(eq=False)
class Op:
    """One executed ATen (or custom) operation. `name` is like `aten.relu`: no overload, no in-place underscore."""

    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...] = ()

    @property
    def out(self) -> Value:
        return self.outputs[0]

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(v for v in tree_flatten((self.args, self.kwargs))[0] if isinstance(v, Value))

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or by keyword `name`, or `default`."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Trace:
    """`ops` act on activations, in order of execution; `folded` counts the operations on parameters alone.

    Of an fx.GraphModule `nodes` tells which value is the result of which node; else it is empty. `buffers` tells where
    each value lies.
    """

    ops: tuple[Op, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    folded: int
    nodes: Mapping[Value, str] = field(repr=False)
    buffers: Mapping[Value, Buffer] = field(repr=False)

    def users(self) -> dict[Value, list[Op]]:
        """For every value the operations that read it."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                users.setdefault(value, []).append(op)
        return users


def trace(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> Trace:
    """The operations of one forward pass of `model` on tensors shaped like `example_input`, in evaluation mode.

    Nothing of the model is changed. Raises InputError where the model cannot run on such an input.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _trace(model, (example_input,) if isinstance(example_input, Tensor) else tuple(example_input))


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    recorder = _Recorder()
    state: dict[str, Tensor] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):  # a tied parameter comes once
        state[name] = recorder.parameter(name, tensor)
    metas = tuple(recorder.input(t) for t in inputs)
    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        stack.enter_context(_module_paths(model, recorder.path))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fast_path())
        if isinstance(model, fx.GraphModule):
            stack.enter_context(_node_by_node(model, recorder))
        stack.enter_context(recorder)
        try:
            result = torch.func.functional_call(model, state, metas)
        except Exception as error:  # whatever the model's own code raises
            where = recorder.path[-1] if recorder.path else ""
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
            raise InputError(f"the model does not run on input {shapes}: {_at(where)}{error}") from error
    outputs = tuple(recorder.values[id(t)] for t in tree_flatten(result)[0] if isinstance(t, Tensor))
    return Trace(tuple(recorder.ops), recorder.inputs, outputs, recorder.folded, recorder.nodes, recorder.buffers)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations. Tensors are known by identity and kept alive, so that an identity stays unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.folded = 0
        self.path: list[str] = []
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []
        self.sharing: dict[int, list[Tensor]] = {}
        self.inputs: tuple[Value, ...] = ()
        self.nodes: dict[Value, str] = {}
        self.buffers: dict[Value, Buffer] = {}
        self.memory: dict[int, Buffer] = {}
        self.models: set[int] = set()  # storages of the model's own parameters and buffers

    def bind(self, tensor: Tensor, value: Value) -> Tensor:
        if id(tensor) not in self.values:
            self.alive.append(tensor)
            self.sharing.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self.values[id(tensor)] = value
        storage = tensor.untyped_storage()
        self.buffers[value] = self.memory.setdefault(storage._cdata, Buffer(storage.nbytes()))
        return tensor

    def parameter(self, name: str, tensor: Tensor) -> Tensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.models.add(tensor.untyped_storage()._cdata)
        return self.bind(meta, Value(tuple(tensor.shape), tensor.dtype, name, tensor.detach()))

    def input(self, tensor: Tensor) -> Tensor:
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        value = Value(tuple(tensor.shape), tensor.dtype, "input")
        self.inputs += (value,)
        return self.bind(meta, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map(self._to_meta, (args, kwargs))
        if (device := kwargs.get("device")) is not None and torch.device(device).type != "meta":
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        name = _name(func)
        value_args, value_kwargs = tree_map(self._value, (args, kwargs))
        op = Op(name, self.path[-1] if self.path else "", value_args, value_kwargs)
        real = self._fold(func, op, result)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        reals = (
            [t for t in tree_flatten(real)[0] if isinstance(t, Tensor)] if real is not None else [None] * len(outputs)
        )
        values = []
        for tensor, data in zip(outputs, reals, strict=True):
            value = Value(tuple(tensor.shape), tensor.dtype, None, data, op)
            if func._schema.is_mutable and data is None:
                self._rebind_views(tensor, op)
            self.bind(tensor, value)
            values.append(value)
        op.outputs = tuple(values)
        if real is None:
            self.ops.append(op)
        else:
            self.folded += 1
        return result

    def _rebind_views(self, written: Tensor, op: Op) -> None:
        """After an in-place write every tensor on the same storage holds a new value."""
        for tensor in self.sharing.get(written.untyped_storage()._cdata, []):
            if tensor is not written:
                self.bind(tensor, Value(tuple(tensor.shape), tensor.dtype, None, None, op))

    def _to_meta(self, item: Any) -> Any:
        """Tensors that the model keeps outside of its parameters and buffers are constants, too."""
        if not isinstance(item, Tensor) or item.device.type == "meta":
            return item
        meta = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        return self.bind(meta, Value(tuple(item.shape), item.dtype, "constant", item.detach()))

    def _value(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) not in self.values:
            raise RuntimeError(f"a tensor of shape {tuple(item.shape)} comes from nowhere")
        return self.values[id(item)]

    def _copy_of_the_models(self, item: Any) -> Any:
        return item.clone() if isinstance(item, Tensor) and item.untyped_storage()._cdata in self.models else item

    def _fold(self, func: Any, op: Op, result: Any) -> Any:
        """The real result where all tensors that go in are constants; None otherwise."""
        if op.name in _FILLS:  # only the shape and the dtype of the input matter
            return torch.full(result.shape, _FILLS[op.name](op), dtype=result.dtype)
        if not all(v.is_constant for v in op.inputs):
            return None
        device = next((v.data.device for v in op.inputs if v.data is not None), torch.device("cpu"))
        args, kwargs = tree_map(lambda a: a.data if isinstance(a, Value) else a, (op.args, op.kwargs))
        if func._schema.is_mutable:  # a buffer that the forward changes is the model's, and stays as it is
            args, kwargs = tree_map(self._copy_of_the_models, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": device}
        return func(*args, **kwargs)


_FILLS: dict[str, Callable[[Op], Any]] = {
    "aten.new_zeros": lambda op: 0,
    "aten.zeros_like": lambda op: 0,
    "aten.new_ones": lambda op: 1,
    "aten.ones_like": lambda op: 1,
    "aten.new_full": lambda op: op.args[2],
    "aten.full_like": lambda op: op.args[1],
}


def _name(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    return f"{namespace}.{name[:-1] if name.endswith('_') and not name.endswith('__') else name}"


def _at(path: str) -> str:
    return f"in module {path!r}: " if path else ""


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules, and afterwards the mode that each of them had."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keeps the path of the module that runs on top of `path`."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        path.append(names.get(id(module), path[-1] if path else ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path.pop()

    handles = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention modules would otherwise run as one opaque operation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _node_by_node(graph_module: fx.GraphModule, recorder: _Recorder) -> Iterator[None]:
    """Runs the graph by an interpreter that tells the recorder which node it executes, and what came out of it."""

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            recorder.path.append(next(reversed(n.meta.get("nn_module_stack", {"": None})), ""))
            result = super().run_node(n)
            recorder.path.pop()
            if isinstance(result, Tensor) and n.op != "output":
                recorder.nodes.setdefault(recorder.values[id(result)], n.name)
            return result

    graph_module.forward = Watcher(graph_module).run
    try:
        yield
    finally:
        del graph_module.forward
