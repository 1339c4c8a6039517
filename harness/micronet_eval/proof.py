"""Proof that the weights that were counted are those that were measured: a hash of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from micronet_eval.trace import Trace, Value


def counted(recorded: Trace) -> dict[str, str]:
    """The SHA-256 of each parameter and buffer that operations of a trace read, by name, in order of names."""
    found: dict[str, Tensor] = {}
    seen: set[Value] = set()
    waiting = [*recorded.outputs, *chain.from_iterable(op.inputs for op in recorded.ops)]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.producer is not None:
            waiting += value.producer.inputs
        elif value.data is not None and value.name is not None:
            found[value.name] = value.data
    return {name: _digest(found[name]) for name in sorted(found)}


def changed(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """The names in `before` that no longer have the same values in a model."""
    now = dict(chain(model.named_parameters(), model.named_buffers()))
    return [name for name, digest in before.items() if name in now and _digest(now[name]) != digest]


def whole(digests: Iterable[tuple[str, str]]) -> str:
    """One SHA-256 for all of them."""
    return hashlib.sha256("".join(f"{name}={digest}\n" for name, digest in digests).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    """Of dtype, shape and values: the same on every machine, whatever the strides."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    about = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.sha256(about.encode() + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
