"""Runs a model once on the meta device and writes down every operation that it executes.

The walk happens under a TorchDispatchMode, so it sees functional operations that hooks on modules miss, and it needs
no memory for activations. Everything is brought into one defined mode first (evaluation, no gradients, unfused
attention), so the trace is the same whatever device, dtype of gradients or training flag the model comes with.

Operations on parameters alone are executed on the real values at the same time (*folded*): a weight that is masked,
quantized or transposed on its way is known with its values where an operation on activations uses it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from micronet_eval import shapes
from micronet_eval.conditional import paths_of, taking
from micronet_eval.errors import InputError
from micronet_eval.formats import CONVERSIONS
from micronet_eval.garbage import uncollected
from micronet_eval.nonzeros import Seen, computable, is_nonzero, seen, seen_closely
from micronet_eval.shortcuts import Shortcuts
from micronet_eval.unfused import unfused


@dataclass(eq=False, slots=True)  # frozen ones take several times as long to make
class Buffer:
    """The memory that a tensor lies in. Views and in-place results lie in one and the same."""

    bytes: int


@dataclass(eq=False)
class Value:
    """A tensor at one moment of the run. In-place operations make a new value; a value never changes.

    `data` holds the real tensor of a constant (a parameter, a buffer, or what is computed without any input); None for
    activations. `name` is the path of a parameter or buffer, `input`, or `constant` for a tensor that the model keeps
    elsewhere. `bits` is the width of its integers where a tensor subclass means fewer than its dtype holds.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    data: Tensor | None = None
    producer: Op | None = field(default=None, repr=False)
    bits: int | None = None

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)  # kept, it would take more memory than all else that a value holds

    @property
    def known(self) -> Tensor | None:
        """The values of a constant; None for an activation and for a constant without values (on the meta device)."""
        return None if self.data is None or self.data.is_meta else self.data

    @cached_property
    def seen(self) -> Seen:
        """What the values of a constant are like, found once for all its views; none is zero where they are unknown."""
        if self.known is None:
            return Seen(self.numel, True)
        op = self.producer
        if op is not None and op.name in _REARRANGED and op.inputs[0].dtype == self.dtype:
            return op.inputs[0].seen
        return seen(self.known)

    @cached_property
    def extent(self) -> tuple[int, int] | None:
        """The least and the greatest of a constant's integers; None where none are known."""
        if self.known is None or not self.numel:
            return None
        return int(self.known.min()), int(self.known.max())

    def least(self) -> float:
        """The least magnitude of a constant's values that are not zero; its values are read once for all of `seen`."""
        assert self.known is not None
        self.seen = seen_closely(self.known)
        assert self.seen.least is not None
        return self.seen.least

    @property
    def nonzeros(self) -> int:
        """Elements of a constant that are not zero."""
        return self.seen.nonzeros

    def leaves(self) -> dict[Value, None]:
        """The parameters, buffers and constants of the model that a constant is computed from, in order."""
        if self.producer is None:
            return {self: None}
        found: dict[Value, None] = {}
        seen, waiting = {self}, [self]
        while waiting:
            value = waiting.pop()
            if value.producer is None:
                found[value] = None
                continue
            for source in reversed(value.producer.inputs if value.producer.name not in FILLS else ()):
                if source.is_constant and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return found

    @cached_property
    def is_pattern(self) -> bool:
        """Whether all values of a constant that are not zero are the same, as in the mask of causal attention."""
        if self.known is None or self.numel < 2:
            return False
        if not self.nonzeros:
            return True
        kept = is_nonzero(self.known)
        first = self.known.flatten()[int(kept.flatten().to(torch.uint8).argmax())]
        return bool(((self.known == first) == kept).all())

    @cached_property
    def counter(self) -> tuple[float, float, float] | None:
        """The least, the greatest and the step of a constant's values where these are a counter, as `torch.arange` is.

        So is a view of one: along each dimension it changes by the same from element to element, and so do its values
        in order. One number everywhere is a counter whose step is 0. None for all else, and where none are known.
        """
        if self.known is None or self.dtype.is_complex:
            return None
        if not self.numel:
            return 0.0, 0.0, 0.0
        data = computable(self.known)
        first = data[(0,) * data.dim()]
        if bool((data == first).all()):
            return float(first), float(first), 0.0
        for part in (data[(slice(_CORNER),) * data.dim()], data):  # what is none nearly always shows that in a corner
            changes = (part.double().diff(dim=dim) for dim in range(data.dim()) if part.shape[dim] > 1)
            if not all(bool((change == change.flatten()[0]).all()) for change in changes):
                return None
        levels = torch.unique(data.double())  # one, where integers are larger than float64 tells apart
        steps = levels.diff() if len(levels) > 1 else levels.new_zeros(1)
        if bool(levels.isnan().any()) or not bool((steps == steps[0]).all()):
            return None
        return float(levels[0]), float(levels[-1]), float(steps[0])


_CORNER = 4
"""Elements along each dimension of a tensor that is looked at in part first."""


def constant(tensor: Tensor) -> Value:
    """A tensor that no model holds, as a value."""
    return Value(tuple(tensor.shape), tensor.dtype, None, tensor)


@dataclass(eq=False)
class Op:
    """One executed ATen (or custom) operation. `name` is like `aten.relu`: no overload, no in-place underscore.

    `path` is the path through a conditional model that it belongs to; such a model runs once for each path.
    """

    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...] = ()
    func: Callable[..., Any] | None = None
    path: str = ""
    inputs: tuple[Value, ...] = field(init=False, repr=False)
    """What it reads, in order; a tensor that is given as `out` is only written."""

    def __post_init__(self) -> None:
        read = _leaves(self.args, Value)
        if self.kwargs:
            read += _leaves([item for name, item in self.kwargs.items() if name not in _outs(self.func)], Value)
        self.inputs = tuple(read)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Gives the operation other arguments."""
        self.args, self.kwargs = args, kwargs
        self.__post_init__()
        vars(self).pop("named", None)

    @property
    def out(self) -> Value:
        return self.outputs[0]

    @property
    def written(self) -> tuple[Value, ...]:
        """What it writes into, as it was before."""
        return tuple(_leaves([self.arg(*place) for place in _writes(self.func)], Value)) if self.func else ()

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or by keyword `name`, or `default`."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @cached_property
    def named(self) -> dict[str, Any]:
        """All arguments by the names that the operation's schema gives them."""
        return {**dict(zip(_argument_names(self.func), self.args, strict=False)), **self.kwargs}


@dataclass(frozen=True)
class Trace:
    """`ops` act on activations, in order of execution; `folded` counts the operations on parameters alone.

    Of an fx.GraphModule `nodes` tells which value is the result of which node; else it is empty. `buffers` tells where
    each value lies. `rewritten` names what is written into although it is no activation, but what the model keeps.
    """

    ops: tuple[Op, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    folded: int
    nodes: Mapping[Value, str] = field(repr=False)
    buffers: Mapping[Value, Buffer] = field(repr=False)
    rewritten: tuple[str, ...] = ()

    def by_path(self) -> dict[str, Trace]:
        """The operations of each path through the model on their own."""
        names = dict.fromkeys(op.path for op in self.ops) or {"": None}
        if len(names) == 1:
            return dict.fromkeys(names, self)
        return {
            name: replace(
                self,
                ops=tuple(op for op in self.ops if op.path == name),
                outputs=tuple(v for v in self.outputs if v.producer is None or v.producer.path == name),
            )
            for name in names
        }

    def making(self) -> list[Op]:
        """The operations on parameters alone that made the constants that `ops` read, or that are returned."""
        waiting = [v for op in self.ops for v in op.inputs] + list(self.outputs)
        found: dict[Op, None] = {}
        while waiting:
            value = waiting.pop()
            if value.is_constant and value.producer is not None and value.producer not in found:
                found[value.producer] = None
                waiting += value.producer.inputs
        return list(found)

    @cached_property
    def users(self) -> Mapping[Value, list[Op]]:
        """For every value the operations that read it."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                users.setdefault(value, []).append(op)
        return users

    @cached_property
    def writing_parts(self) -> frozenset[Op]:
        """The operations that wrote a part of an activation that is read, or returned, as a whole afterwards."""
        read = (v for v in (*self.users, *self.outputs) if v.producer is not None and v not in v.producer.outputs)
        return frozenset(v.producer for v in read if v.producer is not None)


SEED = 0
"""Numbers that a forward draws are the same every time."""

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""The input of a model: one tensor, several arguments by position, or several by name.

An argument may hold tensors in any nesting, as the state of a recurrent model; all else is passed on.
"""


def trace(model: nn.Module, example_input: Example) -> Trace:
    """The operations of one forward pass of `model` on tensors shaped like `example_input`, in evaluation mode.

    Of a conditional model it is one forward pass for each path. Nothing of the model is changed. Raises InputError
    where the model cannot run on such an input.
    """
    return trace_each(model, dict.fromkeys(paths_of(model), example_input))


def trace_each(model: nn.Module, examples: Mapping[str, Example]) -> Trace:
    """As `trace`, of several forward passes one after the other; the operations of each belong to the path it names."""
    for example in examples.values():
        _check(example)
    with uncollected(), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        # Without a GPU torch.manual_seed keeps a whole stack for the day when there is one: as long as a layer takes.
        (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(SEED)
        return _trace(model, examples)


def _check(example_input: Example) -> None:
    """Raises InputError for what no model runs on."""
    given = example_input if isinstance(example_input, Tensor | Sequence | Mapping) else None
    if any(isinstance(item, Tensor) and item.layout != torch.strided for item in tree_flatten(given)[0]):
        raise InputError("the example input is sparse or nested; give a dense one with the shape of one example")
    if not any(isinstance(item, Tensor) for item in tree_flatten(given)[0]):
        raise InputError("the example input is no tensor, nor several; give one with the shape of one example")


def _trace(model: nn.Module, examples: Mapping[str, Example]) -> Trace:
    recorder = _Recorder()
    modules = {module: name for name, module in model.named_modules()}
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise InputError("a TorchScript module shows none of its operations; give the original module")
    for kind in ("_parameters", "_buffers"):
        for module, path in modules.items():
            for name, tensor in getattr(module, kind).items():
                if nn.parameter.is_lazy(tensor):
                    raise InputError("the model has lazy parameters without a shape; run it once on real data first")
                if tensor is None:
                    continue
                full = f"{path}.{name}" if path else name  # a tied parameter has its first name
                if tensor.layout != torch.strided or tensor.is_quantized:
                    what = "quantized by torch" if tensor.is_quantized else tensor.layout
                    raise InputError(
                        f"tensor {full!r} is {what}; make it dense, zeros are found, and so are quantizers"
                    )
                recorder.known(full, tensor)
    with ExitStack() as stack:
        stack.enter_context(_evaluation(modules))
        stack.enter_context(_swapped(modules, recorder))
        _name_modules(modules, recorder)
        stack.enter_context(unfused())
        if isinstance(model, fx.GraphModule):
            stack.enter_context(_node_by_node(model, recorder))
        try:
            results = [_run(model, path, example, recorder) for path, example in examples.items()]
        except (Exception, SystemExit) as error:  # whatever the model's own code raises
            where = recorder.path[-1] if recorder.path else ""
            given = tree_flatten(examples[recorder.branch])[0]
            shapes = ", ".join("x".join(map(str, t.shape)) for t in given if isinstance(t, Tensor))
            raise InputError(f"the model does not run on input {shapes}: {_at(where)}{error}") from error
        with recorder:
            outputs = tuple(recorder.value(t) for t in tensors_in(results))
    kept = recorder.nodes, recorder.buffers, tuple(recorder.rewritten)
    return Trace(tuple(recorder.ops), recorder.inputs, outputs, recorder.folded, *kept)


def _run(model: nn.Module, path: str, example: Example, recorder: _Recorder) -> object:
    recorder.branch = path
    metas = tree_map_only(Tensor, recorder.input, (example,) if isinstance(example, Tensor) else example)
    with taking(model, path), recorder:
        return model(**metas) if isinstance(metas, Mapping) else model(*metas)


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors that a model returns: alone, in lists, dicts and named tuples, in dataclasses."""
    for item in tree_flatten(result)[0]:
        if isinstance(item, Tensor):
            yield item
        elif is_dataclass(item) and not isinstance(item, type):
            yield from tensors_in([getattr(item, f.name) for f in fields(item)])
        elif isinstance(item, Mapping):
            yield from tensors_in(list(item.values()))


_USUAL = (Tensor, nn.Parameter)
"""Types of tensors that are no wrappers."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations. Tensors are known by identity and kept alive, so that an identity stays unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.folded = 0
        self.rewritten: dict[str, None] = {}
        self.path: list[str] = []
        self.branch = ""
        self.values: dict[int, Value] = {}
        self.inputs: tuple[Value, ...] = ()
        self.nodes: dict[Value, str] = {}
        self.buffers: dict[Value, Buffer] = {}
        self.memory: dict[int, tuple[Buffer, list[Tensor]]] = {}  # by storage, with the tensors on it
        self.overwritten: dict[int, tuple[Value, Op]] = {}  # constants that were written into since, by what
        self.made: dict[Any, list[Value]] = {}  # what was folded, so that each layer's mask is made, and held, once
        self.returned: dict[Any, tuple[Any, ...]] = {}  # shape, strides, dtype that torch's slow kernels gave
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # the model's tensors with their stand-ins
        self.last: Any = None  # function, arguments and result of the last of `ops`, in tensors

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap every call for its compiler, and import that: twice the time of importing torch."""
        return False

    def bind(self, tensor: Tensor, value: Value) -> Tensor:
        storage = tensor.untyped_storage()
        memory = self.memory.get(storage._cdata)
        if memory is None:
            memory = self.memory[storage._cdata] = (Buffer(storage.nbytes()), [])
        buffer, sharing = memory
        if id(tensor) not in self.values:
            sharing.append(tensor)
        self.values[id(tensor)] = value
        self.buffers[value] = buffer
        return tensor

    def known(self, name: str, tensor: Tensor, bits: int | None = None) -> Tensor:
        """The stand-in on the meta device of a tensor that the model keeps.

        A tensor subclass stands for the tensors inside of it: its own code runs on their stand-ins.
        """
        if id(tensor) in self.kept:
            return self.kept[id(tensor)][1]
        stand_in: Tensor
        if type(tensor) not in _USUAL and is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            inner = {n: self.known(f"{name}.{n}", getattr(tensor, n), _meant_bits(context)) for n in names}
            stand_in = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        else:
            stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=shapes.META)
            meant = bits if bits is not None and _fits(tensor, bits) else None
            self.bind(stand_in, Value(tuple(tensor.shape), tensor.dtype, name, tensor.detach(), bits=meant))
        self.kept[id(tensor)] = tensor, stand_in
        return stand_in

    def input(self, tensor: Tensor) -> Tensor:
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device=shapes.META)
        value = Value(tuple(tensor.shape), tensor.dtype, "input")
        self.inputs += (value,)
        return self.bind(meta, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the subclass answers, in operations on what is inside of it
        kwargs = kwargs or {}
        if any(id(t) not in self.values for t in _tensors(args, kwargs)):
            args, kwargs = changed(args, Tensor, self._to_meta), changed(kwargs, Tensor, self._to_meta)
        if kwargs and (device := kwargs.get("device")) is not None and torch.device(device).type != "meta":
            kwargs = {**kwargs, "device": shapes.META}
        return self.record(func, args, kwargs, changed(args, Tensor, self.value), changed(kwargs, Tensor, self.value))

    def record(self, func: Any, args: Any, kwargs: Any, read: tuple[Any, ...], read_by_name: dict[str, Any]) -> Any:
        """Runs an operation on tensors that are known, in whose places it reads these values, and records it."""
        written = _written(func, args, kwargs)
        before = [self.value(tensor) for tensor in written]
        module = self.path[-1] if self.path else ""
        for value in before:
            if value.is_constant:
                self.rewritten[value.name or f"a constant of {module!r}"] = None
        op = Op(_name(func), module, read, read_by_name, func=func, path=self.branch)
        result = self._execute(func, op, args, kwargs)
        outputs = [result] if type(result) is Tensor else _leaves((result,), Tensor)
        is_known = [v.data is not None for v in (*op.inputs, *before)]
        if op.name not in FILLS and False in is_known:
            op.outputs = tuple([Value(tuple(t.shape), t.dtype, None, None, op) for t in outputs])
            self.ops.append(op)
            self.last = func, args, kwargs, result
            for tensor in written:
                self._write(tensor, op)
            for tensor, value in zip(outputs, op.outputs, strict=True):
                self.bind(tensor, value)
            return result
        self.folded += 1
        for tensor in written:
            self._unshare(tensor, op)
        same = None if _may_differ(func) else (func, *(shapes.hashable(a, _told) for a in (op.args, op.kwargs)))
        values = self.made.get(same)
        if values is None:
            reals = _leaves((self._fold(func, op, args, kwargs, result),), Tensor)
            values = [Value(tuple(t.shape), t.dtype, None, r, op) for t, r in zip(outputs, reals, strict=True)]
            if same is not None:
                self.made[same] = values
        for tensor, value in zip(outputs, values, strict=True):
            if not any(tensor is t for t in written):  # those have their new value already
                self.bind(tensor, value)
        op.outputs = tuple(self.values[id(t)] for t in outputs)
        return result

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        meta = self._to_meta(tensor)
        if self.overwritten and (part := self.overwritten.pop(id(meta), None)) is not None:
            before, op = part
            write = Op(WRITE_OP, op.module, (before, *op.outputs[:1]), {}, path=op.path)
            write.outputs = (Value(before.shape, before.dtype, None, None, write),)
            self.ops.append(write)
            self.bind(meta, write.out)
        return self.values[id(meta)]

    def _write(self, written: Tensor, op: Op) -> None:
        """After an activation was written into `written`, every tensor on the same storage holds a new value.

        Where that was a constant before, a part of it may be left: who reads the tensor next reads both.
        """
        for tensor in self.memory[written.untyped_storage()._cdata][1]:
            before = self.value(tensor)
            if before.is_constant and tensor is not written:
                self.overwritten[id(tensor)] = before, op
            self.bind(tensor, Value(before.shape, before.dtype, None, None, op))

    def _unshare(self, written: Tensor, op: Op) -> None:
        """Before a constant is written into: new values, on real storage of their own, for all that share its storage.

        What the model owns stays as it is, and so does what an operation has read before.
        """
        copies: dict[int, torch.UntypedStorage] = {}
        for tensor in self.memory[written.untyped_storage()._cdata][1]:
            before = self.values[id(tensor)]
            if before.data is None:
                continue
            storage = before.data.untyped_storage()
            if storage._cdata not in copies:
                copies[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
            data = torch.empty(0, dtype=before.dtype, device=before.data.device)
            data.set_(copies[storage._cdata], before.data.storage_offset(), before.data.shape, before.data.stride())
            write = Op(WRITE_OP, op.module, (before, *op.inputs), {}, path=op.path)
            write.outputs = (Value(before.shape, before.dtype, None, data, write),)
            self.bind(tensor, write.out)

    def _execute(self, func: Any, op: Op, args: Any, kwargs: Any) -> Any:
        """The result on the meta device. A number, or a shape, that depends on values is that of the constants."""
        if op.name in _WITHOUT_META:
            return _fake_quantized(args[0], func)
        rule = shapes.RULES.get(func)
        if rule is not None and (result := rule(*args, **kwargs)) is not None:
            return result
        like = shapes.geometry(func, args, kwargs)
        if like in self.returned:
            shape, strides, dtype = self.returned[like]
            return torch.empty_strided(shape, strides, dtype=dtype, device=shapes.META)
        try:
            result = func(*args, **kwargs)
            if like is not None and shapes.is_new(result):
                self.returned[like] = result.shape, result.stride(), result.dtype
            return result
        except (NotImplementedError, RuntimeError) as error:
            if not _VALUE_DEPENDENT & set(func.tags):
                raise
            looked_at = op.args[1] if op.name == "aten.index" else op.inputs  # what is indexed only moves
            if any(v is not None and v.known is None for v in looked_at):
                raise RuntimeError(f"{op.name} depends on values that are not known before the model runs") from error
        real = func(*changed(args, Tensor, self._example), **changed(kwargs, Tensor, self._example))
        return tree_map(lambda t: torch.empty_like(t, device=shapes.META) if isinstance(t, Tensor) else t, real)

    def _data(self, tensor: Tensor) -> Tensor | None:
        return self.value(tensor).data

    def _example(self, tensor: Tensor) -> Tensor:
        """The values of a constant, zeros of an activation."""
        data = self._data(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if data is None else data

    def _to_meta(self, tensor: Tensor) -> Tensor:
        """Tensors that the model keeps outside of its parameters and buffers are constants, too, each known once."""
        return tensor if id(tensor) in self.values else self.known("constant", tensor)

    def _fold(self, func: Any, op: Op, args: Any, kwargs: Any, result: Any) -> Any:
        """The real result of an operation whose tensors are all constants."""
        if op.name in FILLS:  # only the shape and the dtype of the input matter
            return torch.full(result.shape, FILLS[op.name](op), dtype=result.dtype)
        if any(v.data is not None and v.data.is_meta for v in op.inputs):
            return result  # a parameter without values makes none
        args, kwargs = changed(args, Tensor, self._data), changed(kwargs, Tensor, self._data)
        if "device" in kwargs:
            device = next((v.data.device for v in op.inputs if v.data is not None), torch.device("cpu"))
            kwargs = {**kwargs, "device": device}
        return func(*args, **kwargs)


_VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

WRITE_OP = "micronet.write"
"""Recorded though not executed: what a tensor holds after a part of it was written, of both what was and what is."""

FILLS: dict[str, Callable[[Op], Any]] = {
    "aten.new_zeros": lambda op: 0,
    "aten.zeros_like": lambda op: 0,
    "aten.new_ones": lambda op: 1,
    "aten.ones_like": lambda op: 1,
    "aten.new_full": lambda op: op.args[2],
    "aten.full_like": lambda op: op.args[1],
}


_REARRANGED = frozenset(
    f"aten.{name}" for name in ("alias", "detach", "permute", "squeeze", "t", "transpose", "unsqueeze", "view")
)
"""The same elements in another order or shape."""

_WITHOUT_META = frozenset(name for name in CONVERSIONS if name.startswith(("aten.", "micronet.")))
"""Conversions that torch does not run on the meta device, and ours, which it runs by a detour: the shape stays."""


def _fake_quantized(x: Tensor, func: Any) -> Any:
    """What fake-quantize operations return: a tensor like their input, and some of torch's a mask."""
    results = [shapes.like(x, dtype) for dtype in (x.dtype, torch.bool)][: len(func._schema.returns)]
    return tuple(results) if len(results) > 1 else results[0]


@cache
def _name(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    if name in ("scatter", "scatter_") and "reduce" in func._schema.overload_name:
        name = "scatter_reduce"  # it moves nothing: it adds or multiplies
    return f"{namespace}.{name[:-1] if name.endswith('_') and not name.endswith('__') else name}"


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes into."""
    schema = func._schema
    if not schema.is_mutable:
        return ()
    into = ((i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    return tuple((i, a.name) for i, a in into)


@cache
def _argument_names(func: Any) -> tuple[str, ...]:
    schema = getattr(func, "_schema", None)
    return tuple(argument.name for argument in schema.arguments) if schema is not None else ()


@cache
def _outs(func: Any) -> frozenset[str]:
    """The names of the arguments that an operation only writes into."""
    schema = getattr(func, "_schema", None)
    return frozenset(a.name for a in schema.arguments if a.is_out) if schema is not None else frozenset()


@cache
def _may_differ(func: Any) -> bool:
    """Whether an operation may give something else from the same arguments, or changes them."""
    return func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags


def _told(item: Any) -> Hashable:
    return item if isinstance(item, Value) else shapes.typed(item)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into."""
    into = _writes(func)
    return _tensors(tuple(args[i] if i < len(args) else kwargs.get(name) for i, name in into), {}) if into else []


_NESTED = (list, tuple)

_SIMPLE = frozenset({int, float, bool, type(None)})
"""Types of most arguments that are no tensors."""


def _leaves(items: Sequence[Any], kind: Any) -> list[Any]:
    """What of a kind lies in lists and tuples of any nesting, in order. Arguments and results hold nothing else."""
    found = []
    for item in items:
        if type(item) in _SIMPLE:
            continue
        if isinstance(item, kind):
            found.append(item)
        elif isinstance(item, _NESTED):
            found += _leaves(item, kind)
    return found


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return _leaves((*args, *kwargs.values()) if kwargs else args, Tensor)


def changed(item: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same arguments with everything of a kind changed, in lists, tuples and dicts of any nesting."""
    if isinstance(item, kind):
        return change(item)
    if isinstance(item, dict):
        return {name: changed(part, kind, change) for name, part in item.items()} if item else item
    if not item or not isinstance(item, _NESTED):
        return item
    parts = [part if type(part) in _SIMPLE else changed(part, kind, change) for part in item]
    if all(map(is_, parts, item)):
        return item
    return parts if isinstance(item, list) else tuple(parts)


def _meant_bits(context: Any) -> int | None:
    """The bits of the integers inside a tensor subclass that names a `target_dtype`, as torchao's do (`torch.int4`)."""
    target = re.fullmatch(r"torch\.u?int(\d+)", str(context.get("target_dtype"))) if isinstance(context, dict) else None
    return int(target[1]) if target else None


def _fits(tensor: Tensor, bits: int) -> bool:
    """Whether a tensor holds integers of so many bits, as far as its values are known: a subclass may say anything."""
    if tensor.is_floating_point() or not 0 < bits <= 8 * tensor.dtype.itemsize:
        return False
    if tensor.is_meta or not tensor.numel():
        return True
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if tensor.dtype.is_signed else (0, (1 << bits) - 1)
    return low <= int(tensor.min()) and int(tensor.max()) <= high


def _at(path: str) -> str:
    return f"in module {path!r}: " if path else ""


@contextmanager
def _evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode for all modules, and afterwards the mode that each of them had."""
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


_CONTAINERS = frozenset({list, dict, set})


@contextmanager
def _swapped(modules: Iterable[nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Stand-ins in the place of all parameters and buffers, and afterwards everything in every module as it was.

    torch.func.functional_call does not put back those of a module that the model has twice.
    """
    before = [(vars(module), dict(vars(module))) for module in modules]
    containers = [held for _, table in before for held in table.values() if type(held) in _CONTAINERS]
    contents = [(held, held.copy() if held else ()) for held in containers]
    for module in modules:
        for table in (module._parameters, module._buffers):
            if table:
                table.update({name: recorder.kept[id(t)][1] for name, t in table.items() if t is not None})  # type: ignore[misc]
    try:
        yield
    finally:
        for held, content in (*before, *contents):
            if held or content:  # most were and are empty
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)


class _NamedCall:
    """What torch calls in the place of each module of a model, as if that were compiled; tells the module's path.

    Hooks on all modules would cost more than many modules; so would another nn.Module.__call__: Python forgets what it
    knows of a class, and of all derived from it, when one of its attributes is set (docs/decisions/0027).
    """

    def __init__(self, names: Mapping[nn.Module, str], recorder: _Recorder) -> None:
        self.names, self.path, self.shortcuts = names, recorder.path, Shortcuts(recorder, _call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Who has this in its table may be a copy of a module, and is another: only the caller says.
        module = sys._getframe(1).f_locals["self"]
        self.path.append(self.names.get(module, self.path[-1] if self.path else ""))
        result = self.shortcuts.call(module, args, kwargs)
        self.path.pop()
        return result

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Deep copies and pickles of a module have none."""
        return type(None), ()


def _name_modules(names: Mapping[nn.Module, str], recorder: _Recorder) -> None:
    """Keeps the path of the module that runs on top of those before; to be undone by `_swapped`."""
    called = _NamedCall(names, recorder)
    for module in names:
        vars(module)["_compiled_call_impl"] = called


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Hooks and forward."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def _node_by_node(graph_module: fx.GraphModule, recorder: _Recorder) -> Iterator[None]:
    """Runs the graph by an interpreter that tells the recorder which node it executes, and what came out of it."""

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            stack = n.meta.get("nn_module_stack", {"": None})
            recorder.path.append(next(reversed(stack), "").partition("@")[0])  # a second call of a module is path@1
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
