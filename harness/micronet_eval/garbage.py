"""When Python searches for garbage. A model is many objects that stay: to search them again and again takes long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def seldom() -> None:
    """Searches seldom from now on: for who only works for us. To import torch takes a quarter longer else."""
    gc.set_threshold(100_000, 50, 50)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search meanwhile: it would read all objects, and a trace makes many."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
