"""A second opinion: the multiply-accumulates that fvcore and torch's FlopCounterMode find, and why they differ.

fvcore (Facebook's counter) looks at the operations of a TorchScript trace, FlopCounterMode (torch.utils.flop_counter)
at the ATen operations of a run on the CPU, as their users run them. FlopCounterMode counts 2 for each MAC, which is
halved here. Both count shapes: every weight, zero or not.

A difference counts as explained only by facts of this run: the zero weights that ours leaves out, and operations that
the other counter says, or its registry shows, it has no formula for. They have to make up the whole difference.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from micronet_eval.conditional import paths_of, taking
from micronet_eval.costs import FREE, Formula, cost_of
from micronet_eval.scoring import dense
from micronet_eval.trace import Example, Trace

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

FVCORE, FLOP_COUNTER = "fvcore", "FlopCounterMode"

_DOT_PRODUCTS = frozenset({"conv", "linear", "addmm", "matmul", "mm", "bmm", "einsum"})
"""What fvcore counts in MACs; its other formulas (norms, pooling) count something else."""


@dataclass(frozen=True)
class Difference:
    """The MACs of one module itself, without its children. `dense` are ours with every weight counted.

    `why` explains what differs; `unexplained` are the MACs for which nothing does.
    """

    module: str
    ours: int
    dense: int
    fvcore: int | None
    flop_counter: int | None
    why: tuple[str, ...]
    unexplained: int


@dataclass(frozen=True)
class CrossCheck:
    """Three counts of the same model in MACs; None where a counter could not run, which `failed` explains.

    `modules` are those with any MACs, `differences` those of them where the counts differ. `fvcore_other` are what
    fvcore counts beside MACs, `fvcore_skips` how often it met operations that it has no formula for.
    """

    ours: int
    dense: int
    fvcore: int | None
    flop_counter: int | None
    modules: int
    differences: tuple[Difference, ...]
    unexplained: int
    fvcore_other: dict[str, int]
    fvcore_skips: dict[str, int]
    failed: dict[str, str]


@dataclass(frozen=True)
class _Opinion:
    """What another counter found: MACs by module, and by module the operations that it has no formula for."""

    macs: Mapping[str, int]
    skips: Mapping[str, Counter[str]]
    other: Mapping[str, int]


def cross_check(model: nn.Module, example_input: Example, trace: Trace, formulas: Mapping[str, Formula]) -> CrossCheck:
    """Runs both counters on `model` and lays them beside the count of its `trace`.

    `trace` is that of `example_input`: of a language model one step. Of a conditional model only the last path is
    compared, that of the examples that never leave.
    """
    failed: dict[str, str] = {}
    opinions: dict[str, _Opinion] = {}
    model, path = _on_cpu(model), paths_of(model)[-1]
    trace = trace.by_path()[path]
    example = tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype), example_input)
    counters: dict[str, Callable[[nn.Module, Example], _Opinion]] = {FVCORE: _fvcore, FLOP_COUNTER: _flop_counter}
    for name, counter in counters.items():
        try:
            with taking(model, path), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opinions[name] = counter(model, example)
        except Exception as error:  # whatever another program raises on a model that it does not know
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    ours, all_weights = _our_macs(trace, formulas, _runs_in(model))
    modules = sorted(set(ours) | {m for o in opinions.values() for m, macs in o.macs.items() if macs})
    compared = [_compare(m, ours.get(m, Counter()), all_weights.get(m, Counter()), opinions, formulas) for m in modules]
    fvcore, other = opinions.get(FVCORE), opinions.get(FLOP_COUNTER)
    differences = tuple(d for d in compared if len({d.ours, d.fvcore, d.flop_counter} - {None}) > 1)
    return CrossCheck(
        ours=sum(d.ours for d in compared),
        dense=sum(d.dense for d in compared),
        fvcore=sum(fvcore.macs.values()) if fvcore else None,
        flop_counter=sum(other.macs.values()) if other else None,
        modules=len(modules),
        differences=differences,
        unexplained=sum(d.unexplained for d in differences),
        fvcore_other=dict(sorted(fvcore.other.items())) if fvcore else {},
        fvcore_skips=dict(sorted(sum(fvcore.skips.values(), Counter[str]()).items())) if fvcore else {},
        failed=failed,
    )


def _our_macs(
    trace: Trace, formulas: Mapping[str, Formula], runs_in: Callable[[str], str]
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """MACs by module and operation, and the same with every weight counted."""
    ours: dict[str, Counter[str]] = {}
    all_weights: dict[str, Counter[str]] = {}
    for op in trace.ops:
        if (cost := cost_of(op, formulas)) and (counted := cost_of(dense(op), formulas)) and counted.macs:
            ours.setdefault(runs_in(op.module), Counter())[op.name] += cost.macs
            all_weights.setdefault(runs_in(op.module), Counter())[op.name] += counted.macs
    return ours, all_weights


def _runs_in(model: nn.Module) -> Callable[[str], str]:
    """Where other counters see what runs in a module: a graph calls its layers, and does the rest in its own forward.

    The trace knows the modules that a graph was made of.
    """
    if not isinstance(model, fx.GraphModule):
        return lambda path: path
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}

    def runs_in(path: str) -> str:
        above = [path, *(path[:i] for i, letter in enumerate(path) if letter == ".")]
        return path if called.intersection(above) else ""

    return runs_in


def _compare(
    module: str,
    ours: Counter[str],
    all_weights: Counter[str],
    opinions: Mapping[str, _Opinion],
    formulas: Mapping[str, Formula],
) -> Difference:
    why = []
    if zeros := all_weights.total() - ours.total():
        why.append(f"zero weights: {zeros:,}")
    unexplained = 0
    for name, opinion in opinions.items():
        missing = all_weights.total() - opinion.macs.get(module, 0)
        if not missing:
            continue
        skipped = sorted(op for op in opinion.skips.get(module, ()) if _may_multiply(op, all_weights, formulas))
        kinds = _kinds_that_make(missing, all_weights)
        if skipped and kinds:
            why.append(f"{name} has no formula for {', '.join(skipped)}: {missing:,} in {', '.join(kinds)}")
        else:
            why.append(f"unexplained: {name} has {abs(missing):,} {'fewer' if missing > 0 else 'more'}")
            unexplained = max(unexplained, abs(missing))
    found = {name: opinion.macs.get(module, 0) for name, opinion in opinions.items()}
    counts = ours.total(), all_weights.total(), found.get(FVCORE), found.get(FLOP_COUNTER)
    return Difference(module, *counts, tuple(why), unexplained)


def _kinds_that_make(macs: int, all_weights: Counter[str]) -> tuple[str, ...]:
    """The fewest kinds of our operations in a module that have just so many MACs together; none if no kinds do."""
    kinds = sorted(kind.removeprefix("aten.") for kind in all_weights)
    choices = chain.from_iterable(combinations(kinds, n) for n in range(1, len(kinds) + 1))
    return next((c for c in choices if sum(all_weights[f"aten.{kind}"] for kind in c) == macs), ())


def _may_multiply(op: str, all_weights: Counter[str], formulas: Mapping[str, Formula]) -> bool:
    """Whether an operation that another counter passes over may stand for MACs: not if we know that it has none."""
    name = f"aten.{op}"
    known = name in FREE or name in formulas
    return name in all_weights if known else not _is_view(op)


def _is_view(op: str) -> bool:
    """By its schema: an operation that returns its input's memory computes nothing."""
    packet = getattr(torch.ops.aten, op, None)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet else []
    return any(r.alias_info is not None and not r.alias_info.is_write for s in schemas for r in s.returns)


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode; what has no values there gets zeros, which no count depends on."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_known(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _known(buffer)
    return model


def _known(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()


def _fvcore(model: nn.Module, example: Example) -> _Opinion:
    if isinstance(example, Mapping):
        raise TypeError("fvcore takes inputs by position only")
    from fvcore.nn import FlopCountAnalysis

    inputs = example if isinstance(example, Tensor) else tuple(example)
    analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    found = _own(analysis.by_module_and_operator())
    skips = _own({name: analysis.unsupported_ops(name) for name in found})
    return _Opinion(
        {m: sum(n for op, n in ops.items() if op in _DOT_PRODUCTS) for m, ops in found.items()},
        {m: Counter({op.partition("::")[2].strip("_"): n for op, n in ops.items()}) for m, ops in skips.items()},
        {op: n for op, n in analysis.by_operator().items() if op not in _DOT_PRODUCTS and n},
    )


def _own(totals: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
    """Counts of modules with all that is in them -> counts of each module itself."""
    own = {name: Counter(counts) for name, counts in totals.items()}
    for name, counts in totals.items():
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent].subtract(counts)
                break
    return {name: +counts for name, counts in own.items()}


def _flop_counter(model: nn.Module, example: Example) -> _Opinion:
    from torch.utils.flop_counter import FlopCounterMode, flop_registry  # it takes long to import

    path: list[str] = [""]
    macs: Counter[str] = Counter()
    skips: dict[str, Counter[str]] = {}
    counter = FlopCounterMode(display=False)
    with counter, _Watch(path, skips, flop_registry), _flops_by_module(model, path, counter, macs):
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*((example,) if isinstance(example, Tensor) else example))
    return _Opinion({module: flops // 2 for module, flops in macs.items()}, skips, {})


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, for the module that runs, the operations that FlopCounterMode's registry does not have."""

    def __init__(self, path: list[str], skips: dict[str, Counter[str]], registry: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path, self.skips, self.registry = path, skips, registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in self.registry:
            name = func._schema.name.partition("::")[2].strip("_")
            self.skips.setdefault(self.path[-1], Counter())[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _flops_by_module(
    model: nn.Module, path: list[str], counter: FlopCounterMode, flops: Counter[str]
) -> Iterator[None]:
    """Keeps the path of the module that runs, and gives each module what was counted while it was on top."""
    names = {id(module): name for name, module in model.named_modules()}

    def settle() -> None:
        flops[path[-1]] += counter.get_total_flops() - flops.total()

    def enter(module: nn.Module, args: Any) -> None:
        settle()
        path.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        settle()
        path.pop()

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield
        settle()
    finally:
        for handle in handles:
            handle.remove()
