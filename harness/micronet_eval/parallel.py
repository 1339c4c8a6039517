"""The processes that train together, each on a device of its own: those of `accelerate launch`, or this one alone.

All of them run the whole recipe and come to the same model; only training splits its batches among them. One of them
writes files and tells what happens.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from micronet_eval.errors import InputError


@dataclass(frozen=True)
class Team:
    """How many processes there are, which of them this is, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def joined(self, model: nn.Module) -> nn.Module:
        """`model`, whose gradients will be the means over all processes when they went backward through the result."""
        if self.size == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        return DistributedDataParallel(model, device_ids=None if self.device.type == "cpu" else [self.device])

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes what the first has."""
        for tensor in tensors if self.size > 1 else ():
            distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def sums(self, *numbers: float | Tensor) -> list[float]:
        """The sum of each number over all processes."""
        total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers])
        if self.size > 1:
            distributed.all_reduce(total)
        return [float(n) for n in total]

    def each(self, thing: Any) -> list[Any]:
        """What every process calls this with, in their order."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        distributed.all_gather_object(things, thing)
        return things


@cache
def team() -> Team:
    """The processes that `accelerate launch` (or torchrun) started; else this one, on a GPU where there is one.

    Raises InputError where there are several, and accelerate is not installed or does not find them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # accelerate launch --cpu
    on_cpu = told_cpu or not torch.cuda.is_available()
    found = Team(torch.device("cpu" if on_cpu else "cuda"))
    if started > 1:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InputError(
                "several processes train through accelerate; pip install 'micronet-eval[train]'"
            ) from error
        state = PartialState(cpu=on_cpu)
        found = Team(state.device, state.process_index, state.num_processes)
        if found.size != started:
            raise InputError(f"WORLD_SIZE says {started} processes, accelerate finds {found.size}; start as it says")
        atexit.register(distributed.destroy_process_group)
    if found.device.type == "cuda":  # so that a run that goes on comes to the same weights
        torch.backends.cudnn.deterministic = True
    return found
