"""Models in which an example takes one of several paths: early exits, mixtures of experts.

The rules count the mean over the test set: each path's cost, weighted by the share of the examples that took it. So a
trace runs every path once for all examples, and a forward pass on data remembers which path each example took.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor, nn

from micronet_eval.errors import InputError


class _Split(Exception):
    """The examples of a batch part here: those that `leave`, a bool each, and the others."""

    def __init__(self, leave: Tensor) -> None:
        super().__init__()
        self.leave = leave


class Conditional(nn.Module):
    """A model whose `run` branches on what it computes, by an ordinary `if` on `takes`:

        class Hasty(Conditional):
            paths = ("exit", "full")

            def run(self, x):
                x = self.trunk(x)
                answer = self.exit(x)
                if self.takes("exit", answer.softmax(1).amax(1) >= 0.85):
                    return answer
                return self.rest(x)

    Whatever runs until an example leaves is what its path costs, decisions that were taken on the way included. So
    there is one place to leave on each path. The last path is the one of the examples that never leave. Answers have
    the examples in dimension 0.
    """

    paths: tuple[str, ...] = ()
    only: str | None = None
    """The path that all examples take, whatever they are; None where each takes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []
        """The path of each example in the last batch."""
        self._path = ""
        self._asked: set[str] = set()

    def run(self, x: Tensor) -> Tensor:
        """The model. It may run more often than once for a batch whose examples part."""
        raise NotImplementedError

    def takes(self, path: str, examples: Tensor) -> bool:
        """Whether the examples at hand leave on `path` here; `examples` is a bool for each of them."""
        if path not in self.paths:
            raise InputError(f"{type(self).__name__} takes path {path!r}, but declares only: {', '.join(self.paths)}")
        if examples.dim() != 1:
            wrong = f"a tensor of shape {tuple(examples.shape)}"
            raise InputError(f"{type(self).__name__}: takes({path!r}, ...) needs one bool an example, not {wrong}")
        self._ask(path)
        if self.only is not None:
            leave = path == self.only
        elif bool(examples.all()):
            leave = True
        elif bool(examples.any()):
            raise _Split(examples)
        else:
            leave = False
        if leave:
            self._path = path
        return leave

    def forward(self, x: Tensor) -> Tensor:
        if self.only is not None:
            answer, path = self._run(x)
            if path != self.only:
                raise InputError(f"{type(self).__name__} declares the path {self.only!r}, but no example can take it")
            return answer
        groups, answers = [torch.arange(len(x))], []
        self.taken = [""] * len(x)
        while groups:
            rows = groups.pop()
            try:
                answer, path = self._run(x[rows])
            except _Split as split:
                leave = split.leave.cpu()
                groups += [rows[~leave], rows[leave]]
                continue
            answers.append((rows, answer))
            for row in rows.tolist():
                self.taken[row] = path
        order = torch.cat([rows for rows, _ in answers]).argsort()
        return torch.cat([answer for _, answer in answers])[order]

    def _run(self, x: Tensor) -> tuple[Tensor, str]:
        self._path, self._asked = "", set()
        answer = self.run(x)
        if not self._path:  # nobody left before the end
            self._path = self.paths[-1]
            self._ask(self._path)
        return answer, self._path

    def _ask(self, path: str) -> None:
        """Raises InputError where a run comes to a second place at which examples leave on `path`."""
        if path in self._asked:
            raise InputError(
                f"{type(self).__name__} has two places at which examples leave on path {path!r}, of which only the "
                "first is counted; give each exit a path of its own"
            )
        self._asked.add(path)


def conditional_of(model: nn.Module) -> Conditional | None:
    """The part of `model` that has several paths, or None. Raises InputError where there are two such parts."""
    found: list[Conditional] = []
    waiting, seen = [model], {model}
    while waiting:  # model.modules() makes names, too, and takes several times as long
        module = waiting.pop()
        if isinstance(module, Conditional):
            found.append(module)
        for part in module._modules.values():
            if part is not None and part not in seen:
                seen.add(part)
                waiting.append(part)
    if len(found) > 1:
        raise InputError("the model has several conditional parts; one that names all paths can be counted")
    if found and len(set(found[0].paths)) < 2:
        raise InputError(f"{type(found[0]).__name__} needs at least two paths, as in: paths = ('exit', 'full')")
    return found[0] if found else None


def paths_of(model: nn.Module) -> tuple[str, ...]:
    """The paths that an example can take through `model`; one without a name where it is not conditional."""
    conditional = conditional_of(model)
    return conditional.paths if conditional is not None else ("",)


def exact_shares(paths: Sequence[str], shares: Mapping[str, Decimal | float]) -> dict[str, Fraction]:
    """Shares of examples as exact fractions of their decimal digits; none where none are given.

    Raises InputError where they are not those of `paths`, or do not sum to 1.
    """
    if not shares:
        return {}
    if set(shares) != set(paths):
        takes = f"takes: {', '.join(paths)}" if any(paths) else "has only one path"
        raise InputError(f"shares are given of {', '.join(shares)}, but the model {takes}")
    if not all(math.isfinite(share) for share in shares.values()):
        raise InputError(f"the shares of all paths must be numbers from 0 to 1: {', '.join(map(str, shares.values()))}")
    exact = {path: Fraction(str(shares[path])) for path in paths}
    if min(exact.values()) < 0 or sum(exact.values()) != 1:
        given = ", ".join(f"{path} = {shares[path]}" for path in paths)
        raise InputError(f"the shares of all paths must sum to 1, none of them negative: {given}")
    return exact


@contextmanager
def taking(model: nn.Module, path: str) -> Iterator[None]:
    """All examples take `path`, whatever they are; that without a name is the only one of its model."""
    conditional = conditional_of(model) if path else None
    if conditional is None:
        yield
        return
    conditional.only = path
    try:
        yield
    finally:
        conditional.only = None
