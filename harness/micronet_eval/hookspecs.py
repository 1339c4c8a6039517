"""The hooks that a plugin can implement. Every one takes a `register` callable; names are unique."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from micronet_eval.comparing import Executor
    from micronet_eval.costs import Formula
    from micronet_eval.strategy import Pruner, Quantizer, Sparsifier
    from micronet_eval.task import Task

PROJECT = "micronet_eval"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def micronet_register_pruners(register: Callable[[str, type[Pruner]], None]) -> None:
    """register(name, class) for every pruner."""


@hookspec
def micronet_register_sparsifiers(register: Callable[[str, type[Sparsifier]], None]) -> None:
    """register(name, class) for every sparsifier."""


@hookspec
def micronet_register_quantizers(register: Callable[[str, type[Quantizer]], None]) -> None:
    """register(name, class) for every quantizer."""


@hookspec
def micronet_register_tasks(register: Callable[[str, Task], None]) -> None:
    """register(name, task) for every task."""


@hookspec
def micronet_register_architectures(register: Callable[[str, Callable[..., nn.Module]], None]) -> None:
    """register(name, builder): the builder's keyword arguments are the architecture's options."""


@hookspec
def micronet_register_costs(register: Callable[[str, Formula], None]) -> None:
    """register(operation, formula), for example register("aten.i0", elementwise(1))."""


@hookspec
def micronet_register_executors(register: Callable[[str, Executor], None]) -> None:
    """register(name, executor): where compare runs its jobs; see micronet_eval.comparing.Executor."""


@hookspec
def micronet_register_commands(cli: Any) -> None:
    """Add more commands to the click group `cli`."""
