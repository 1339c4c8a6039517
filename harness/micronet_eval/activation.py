"""The most memory that the activations of a model need at once, from the live ranges of a trace. *(ours)*

The rules of the challenge name the maximum transient activation size as a thing worth counting, and do not count it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from micronet_eval.costs import FREE
from micronet_eval.formats import ACCUMULATOR_OP, CONVERSIONS
from micronet_eval.trace import Buffer, Op, Trace, Value

_CONVERTS = frozenset((*CONVERSIONS, "aten._to_copy", ACCUMULATOR_OP))

_INPUT = -1  # the time before the first operation


@dataclass(frozen=True)
class Activation:
    """`peak_bits` of activations are alive at once while the operation `at` runs, written `module: operation`."""

    peak_bits: int
    at: str


def activation_peak(trace: Trace, widths: Mapping[Value, int]) -> Activation:
    """The peak, at the bit-widths of the values, for the batch that was traced; of equal ones the first.

    - A value lives from the operation that writes it, or from the start if it is the model's input, to the last one
      that reads it; what the model returns lives to the end. Constants are no activations.
    - While an operation runs, its inputs and its outputs are alive together.
    - Values in one buffer (views, slices, results in place) are counted once, as the whole buffer, at the widest of
      those that are alive. A copy is a buffer of its own.
    - A conversion is made while its source is written: where nothing else reads the source, that is never held.
    - What nothing reads (the indices of a max pooling) is not held either.
    """
    users = trace.users
    bits = {v: _bits(v, widths) for v in _activations(trace)}
    home = {buffer: buffer for buffer in trace.buffers.values()}
    for op in trace.ops:
        if path := _only_converted(op, trace, users):
            home[trace.buffers[op.out]] = home[trace.buffers[op.inputs[0]]]
            bits.update(dict.fromkeys(path, min(bits[op.inputs[0]], bits[op.out])))
    starts, ends = _lives(trace, users, list(bits))
    alive: dict[Buffer, list[int]] = {}
    total = peak = 0
    peak_time = _INPUT
    for time in range(_INPUT, len(trace.ops)):
        for value in starts.get(time, ()):
            sizes = alive.setdefault(home[trace.buffers[value]], [])
            before = max(sizes, default=0)
            sizes.append(_elements(trace, value) * bits[value])
            total += max(sizes) - before
        if total > peak:
            peak, peak_time = total, time
        for value in ends.get(time, ()):
            sizes = alive[home[trace.buffers[value]]]
            before = max(sizes)
            sizes.remove(_elements(trace, value) * bits[value])
            total += max(sizes, default=0) - before
    return Activation(peak, "input" if peak_time == _INPUT else _place(trace.ops[peak_time]))


def _bits(value: Value, widths: Mapping[Value, int]) -> int:
    """The bit-width; positions, which an operation returns beside its values (the indices of a maximum), at dtype."""
    op = value.producer
    beside = op is not None and value in op.outputs[1:] and not value.dtype.is_floating_point
    own = 8 * value.dtype.itemsize
    return own if beside else widths.get(value, own)


def _activations(trace: Trace) -> dict[Value, None]:
    """All values that are no constants, in order of appearance."""
    values = (v for op in trace.ops for v in (*op.inputs, *op.outputs))
    return {v: None for v in (*trace.inputs, *values, *trace.outputs) if not v.is_constant}


def _lives(
    trace: Trace, users: Mapping[Value, list[Op]], values: list[Value]
) -> tuple[dict[int, list[Value]], dict[int, list[Value]]]:
    """The values that begin and that end to live at each time, which is the index of an operation."""
    times = {op: time for time, op in enumerate(trace.ops)}
    returned = set(trace.outputs)
    starts: dict[int, list[Value]] = {}
    ends: dict[int, list[Value]] = {}
    for value in values:
        reads = [times[op] for op in users.get(value, ())] + [len(times)] * (value in returned)
        if reads:
            starts.setdefault(times[value.producer] if value.producer else _INPUT, []).append(value)
            ends.setdefault(max(reads), []).append(value)
    return starts, ends


def _only_converted(op: Op, trace: Trace, users: Mapping[Value, list[Op]]) -> list[Value]:
    """What the conversion `op` reads, with all that it is a view of, if nothing else reads that; else nothing."""
    if op.name not in _CONVERTS or not op.inputs or op.inputs[0].is_constant:
        return []
    path = [op.inputs[0]]
    while users[path[-1]] == [op] and path[-1] not in trace.outputs:
        producer = path[-1].producer
        if producer is None or not _is_view(producer, trace):
            whole = path[-1].numel == _elements(trace, path[-1])
            return path if whole else []
        op = producer
        path.append(op.inputs[0])
    return []


def _is_view(op: Op, trace: Trace) -> bool:
    same_memory = all(trace.buffers[v] is trace.buffers[op.inputs[0]] for v in op.outputs)
    return op.name in FREE and len(op.inputs) == 1 and same_memory


def _elements(trace: Trace, value: Value) -> int:
    return trace.buffers[value].bytes // value.dtype.itemsize


def _place(op: Op) -> str:
    return f"{op.module}: {op.name}" if op.module else op.name
