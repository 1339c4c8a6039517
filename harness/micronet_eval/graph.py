"""A model as data: written by a worker that runs somebody's code, built again where no such code runs.

The graph is what torch.fx sees: layers of `structure.LAYERS`, functions and methods of the lists below, and nothing
else. Values are not part of it: every tensor that the graph uses has to be in the packed file, where it is counted.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Container, Mapping
from math import inf
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from micronet_eval.precision import numbers
from micronet_eval.structure import StructureError, build_layer, describe, quiet, submodule
from micronet_eval.trace import Op, Trace

MOST_NODES, MOST_WORDS = 5_000, 20_000
"""Of a graph: its nodes, and all their arguments. Which numbers and values they name is stored nowhere: at most a few
hundred 32-bit parameters can hide there. The largest networks that people draw by hand have a quarter of this."""

MOST_NUMBERS = 16
"""Different numbers in the code of a model that no rule counts, as the bounds of a clamp; more could be its weights."""

MOST_ELEMENTS = 1 << 30
"""Of one tensor; a graph that declares a larger one is refused before memory is asked for."""


def _no_keyword(path: str) -> str:
    if any(keyword.iskeyword(part) for part in path.split(".")):
        raise ValueError(f"{path!r} has a word of Python in it")
    return path


# torch.fx writes these strings into the Python code of a GraphModule: nothing but plain ASCII names may pass.
Name = Annotated[str, Field(pattern=r"\A[A-Za-z_][A-Za-z0-9_]*\z", max_length=200), AfterValidator(_no_keyword)]
Path = Annotated[
    str, Field(pattern=r"\A[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\z", max_length=500), AfterValidator(_no_keyword)
]
# No float64: an operation on it counts as one on 32 bits, and could do the work of two.
Dtype = Literal[
    "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]  # fmt: skip


class Kept(BaseModel):
    """A tensor that the graph reads by its path: its shape and type, no values."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: list[Annotated[int, Field(ge=0, le=MOST_ELEMENTS)]] = Field(max_length=16)
    dtype: Dtype
    parameter: bool


class Node(BaseModel):
    """One node. `module` is the path of the module that its code is in."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    op: Literal["placeholder", "get_attr", "call_module", "call_function", "call_method", "output"]
    name: Name
    target: Path
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[Name, Any] = Field(default_factory=dict)
    module: Path | Literal[""] = ""


class Graph(BaseModel):
    """Layers as `structure.describe` gives them, tensors outside of layers, and the nodes in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: dict[Path, dict[str, Any]]
    tensors: dict[Path, Kept]
    nodes: list[Node] = Field(max_length=MOST_NODES)


def _table(prefix: str, home: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(home, name) for name in names.split() if hasattr(home, name)}


_OF_TENSORS = (
    "abs add addmm amax amin argmax argmin baddbmm bmm ceil chunk clamp clip cos cumsum div einsum eq erf "
    "exp flatten flip floor gather ge gt hardshrink index_select le log log_softmax logsumexp lt "
    "masked_fill matmul max maximum mean min minimum mm movedim mul narrow ne neg permute pow prelu prod "
    "reciprocal relu reshape roll round rsqrt select sigmoid sign sin softmax split sqrt square squeeze "
    "std sub sum tanh topk transpose tril triu unbind unflatten unsqueeze var where"
)
_FUNCTIONAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d "
    "avg_pool3d batch_norm celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "dropout dropout2d elu embedding gelu glu group_norm hardsigmoid hardswish hardtanh instance_norm "
    "layer_norm leaky_relu linear logsigmoid log_softmax max_pool1d max_pool2d max_pool3d mish normalize "
    "pad relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu softmax softplus softsign tanh "
    "tanhshrink"
)
_METHODS = (
    "contiguous dim expand expand_as size t view view_as numel type_as float half bfloat16 add_ mul_ sub_ "
    "div_ relu_ clamp_ sigmoid_ tanh_"
)
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **_table("torch", torch, _OF_TENSORS),
    **_table("torch", torch, "cat concat stack channel_shuffle pixel_shuffle max_pool1d max_pool2d max_pool3d"),
    **_table("functional", F, _FUNCTIONAL),
    **_table("operator", operator, "add sub mul truediv floordiv neg matmul getitem gt lt ge le eq ne"),
    "builtins.getattr": getattr,
}
"""What a node may call: functions of tensors, none that makes one out of a size, none that touches a file."""

METHODS = frozenset(f"{_OF_TENSORS} {_METHODS}".split())
_NAMES = {id(function): name for name, function in reversed(list(FUNCTIONS.items()))}


_OF_VALUES = (
    "clamp clamp_min clamp_max hardtanh threshold masked_fill constant_pad_nd pow eq ne lt le gt ge remainder fmod "
    "floor_divide lerp where elu celu softplus hardshrink softshrink full scalar_tensor fill"
)
_TAKE_VALUES = frozenset(f"aten.{name}" for name in _OF_VALUES.split())
"""Operations whose whole numbers are values; those of others are sizes and places."""


def values_in(op: Op) -> tuple[float, ...]:
    """The numbers among the arguments of an operation that it computes with; the others are sizes and places."""
    given = [a for a in tree_flatten((op.args, op.kwargs))[0] if type(a) in (int, float)]
    values = [float(a) for a in given if type(a) is float or op.name in _TAKE_VALUES]
    return (*values, *map(float, numbers(op)))


def uncounted_numbers(recorded: Trace) -> set[float]:
    """The numbers of an executed graph that no rule counts; zero, one and infinity say nothing.

    Among them those that the constants are made with.
    """
    found: set[float] = set()
    for op in (*recorded.ops, *recorded.making()):
        found |= set(values_in(op)) - set(map(float, numbers(op)))
    return {number for number in found if abs(number) not in (0.0, 0.5, 1.0, inf)}


# --- model -> data ----------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Goes into every module that is no layer of the packed format."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {id(m) for m in model.modules() if not list(m.children()) and describe(m) is not None}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.layers


def graph_of(model: nn.Module) -> Graph:
    """The graph of a module's forward in evaluation mode. Raises StructureError where it cannot be written as data."""
    model = model.eval()
    tracer = _Tracer(model)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # fx raises many kinds, and the forward is somebody's code
        raise StructureError(f"its forward cannot be traced: {error}") from error
    nodes = [_node(node) for node in graph.nodes]
    root = tracer.root
    layers = {n.target: describe(root.get_submodule(n.target)) for n in nodes if n.op == "call_module"}
    tensors = {n.target: _kept(root, n.target) for n in nodes if n.op == "get_attr"}
    return Graph.model_validate({"layers": layers, "tensors": tensors, "nodes": nodes})


def _node(node: fx.Node) -> Node:
    target = node.target
    if node.op == "call_function":
        name = _NAMES.get(id(target))
        if name is None:
            raise StructureError(f"its forward calls {getattr(target, '__name__', target)}, which is not on the list")
        target = name
    if node.op == "call_method" and target not in METHODS:
        raise StructureError(f"its forward calls the method {target}, which is not on the list")
    stack = node.meta.get("nn_module_stack") or {"": None}
    return Node(
        op=node.op,
        name=node.name,
        target=str(target),
        args=_encode(list(node.args)) if node.op != "placeholder" else [],
        kwargs={key: _encode(value) for key, value in node.kwargs.items()},
        module=next(reversed(stack)).partition("@")[0],  # a second call of a module is path@1
    )


def _kept(root: nn.Module, path: str) -> Kept:
    owner, _, name = path.rpartition(".")
    tensor = getattr(root.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise StructureError(f"its forward uses {path!r}, a {type(tensor).__name__}")
    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return Kept(shape=list(tensor.shape), dtype=dtype, parameter=isinstance(tensor, nn.Parameter))


def _encode(item: Any) -> Any:
    if isinstance(item, fx.Node):
        return {"node": item.name}
    if isinstance(item, list | tuple):
        parts = [_encode(part) for part in item]
        return {"tuple": parts} if isinstance(item, tuple) else parts
    if isinstance(item, slice):
        return {"slice": [_encode(part) for part in (item.start, item.stop, item.step)]}
    if item is Ellipsis:
        return {"ellipsis": []}
    if isinstance(item, torch.dtype):
        return {"dtype": str(item).removeprefix("torch.")}
    if item is None or type(item) in (bool, int, float, str):
        return item
    raise StructureError(f"its forward uses a {type(item).__name__} as an argument")


# --- data -> model ----------------------------------------------------------------------------------------------------


def model_of(graph: Graph) -> fx.GraphModule:
    """The module that a graph describes; its parameters have no values of meaning. Raises StructureError."""
    root = nn.Module()
    try:
        for path, description in graph.layers.items():
            owner, name = _place(root, path)
            owner.add_module(name, build_layer(description))
        for path, kept in graph.tensors.items():
            owner, name = _place(root, path)
            if torch.Size(kept.shape).numel() > MOST_ELEMENTS:
                raise StructureError(f"tensor {path!r} has more than {MOST_ELEMENTS:,} elements")
            tensor = torch.zeros(kept.shape, dtype=getattr(torch, kept.dtype))
            if kept.parameter:
                owner.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
            else:
                owner.register_buffer(name, tensor)
        return quiet(fx.GraphModule(root, _fx_graph(graph), "Submitted")).eval()
    except StructureError:
        raise
    except Exception as error:  # a graph that a worker made up fails in torch.fx in many ways
        raise StructureError(f"the graph cannot be built: {type(error).__name__}: {error}") from error


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner = root
    *parents, name = path.split(".")
    for parent in parents:
        if submodule(owner, parent) is None:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    return owner, name


def _fx_graph(graph: Graph) -> fx.Graph:
    made, built = fx.Graph(), dict[str, fx.Node]()
    words = sum(_words(item) for node in graph.nodes for item in (*node.args, *node.kwargs.values()))
    if words > MOST_WORDS:
        raise StructureError(f"its nodes have {words:,} arguments; at most {MOST_WORDS:,} are possible")
    for node in graph.nodes:
        args = () if node.op == "placeholder" else tuple(_decode(item, built) for item in node.args)
        kwargs = {key: _decode(item, built) for key, item in node.kwargs.items()}
        target: Any = node.target
        if node.op == "call_function":
            if node.target not in FUNCTIONS or (node.target == "builtins.getattr" and args[1:] != ("shape",)):
                raise StructureError(f"node {node.name!r} calls {node.target!r}, which is not on the list")
            target = FUNCTIONS[node.target]
        known: dict[str, Container[str]] = {
            "call_method": METHODS, "call_module": graph.layers, "get_attr": graph.tensors
        }  # fmt: skip
        if node.op in known and node.target not in known[node.op]:
            raise StructureError(f"node {node.name!r} uses {node.target!r}, which is not on the list")
        if node.name in built:
            raise StructureError(f"node {node.name!r} is there twice")
        built[node.name] = made.create_node(node.op, target, args, kwargs, node.name)
        built[node.name].meta["nn_module_stack"] = {node.module: None}
    if [node.op for node in graph.nodes].count("output") != 1 or graph.nodes[-1].op != "output":
        raise StructureError("the graph has no output at its end")
    return made


def _words(item: Any) -> int:
    """How many arguments there are in one, each list one more: it may be empty."""
    if isinstance(item, dict):
        return sum(map(_words, item.values()))
    return 1 + sum(map(_words, item)) if isinstance(item, list) else 1


def _decode(item: Any, built: Mapping[str, fx.Node]) -> Any:
    if isinstance(item, list):
        return [_decode(part, built) for part in item]
    if not isinstance(item, dict):
        if isinstance(item, str) and not (item.isascii() and item.isprintable() and len(item) < 100):
            raise StructureError(f"{item[:20]!a} is no text for a graph")
        return item
    if len(item) != 1:
        raise StructureError(f"{str(item)[:60]!a} is no argument")
    ((kind, value),) = item.items()
    if kind == "node" and value in built:
        return built[value]
    if kind == "tuple" and isinstance(value, list):
        return tuple(_decode(part, built) for part in value)
    if kind == "slice" and isinstance(value, list) and len(value) == 3:
        return slice(*(_decode(part, built) for part in value))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype" and value in Dtype.__args__:  # type: ignore[attr-defined]
        return getattr(torch, value)
    raise StructureError(f"{str(item)[:60]!a} is no argument")
