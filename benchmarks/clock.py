"""Measuring side by side: one round runs all, so that what else the machine does falls on all alike."""

from __future__ import annotations

import gc
import random
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

ROUNDS = 5


def side_by_side(run: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Processor seconds of each in every round, after one that does not count, in another order each time.

    What runs behind a large one finds nothing in the caches; so that is not always the same. What fails gets no
    seconds.
    """
    alive = dict(run)
    for name, function in run.items():
        try:
            function()
        except Exception:
            del alive[name]
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    order = list(alive.items())
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name, function in order:
            gc.collect()
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return seconds


def processes(commands: Mapping[str, Sequence[str]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Processor seconds of whole processes, user and system, in every round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            before = _children()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            if number:
                seconds[name].append(_children() - before)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """The median of the ratios of the rounds."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of the rounds, in seconds to four digits."""
    return {name: float(f"{median(each):.4g}") for name, each in seconds.items()}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
