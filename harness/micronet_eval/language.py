"""Language models: what one looks like, and what a token costs as on-line inference with a batch of one sequence.

The forward of a language model takes `tokens`, int64 [B, T], and `state`, what it returned for the tokens before (None
at the start of a stream; any nesting of tensors). It returns the natural log-probabilities of the token that follows
each, [B, T, V], and the state. Two attributes say on what the cost of a token depends, where it does:

- `context`: the token at position t (from 1) attends to min(t, context) tokens, itself included;
- `cutoffs`: the vocabulary comes in clusters of falling frequency, and these ids begin all but the first. Then forward
  takes a third argument, `cluster`: an int runs only what a token of that cluster needs, read (`tokens` count from the
  cluster's first id) and predicted (the log-probabilities of that cluster alone); None runs everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from micronet_eval.costs import Formula
from micronet_eval.errors import InputError
from micronet_eval.paths import mean_account
from micronet_eval.scoring import Account, Math, account
from micronet_eval.task import DataMissing, Task
from micronet_eval.trace import Example, Trace, trace

Shares = tuple[Fraction, ...]


def example_input(task: Task, model: nn.Module) -> Example:
    """Zeros like one example, a batch of one; for a language model the inputs of one step behind a full context."""
    if task.metric != "perplexity":
        return torch.zeros(1, *task.input_shape)
    return step(model, max(2, min(_context(model) or 2, task.tokens)))


def step(model: nn.Module, position: int, cluster: int | None = None) -> tuple[Any, ...]:
    """What forward takes to read the token at `position` (at least 2) after the state that the tokens before left.

    Raises InputError where the model does not return a pair of log-probabilities and state.
    """
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        trace(model, torch.zeros(1, position - 1, dtype=torch.int64))
    finally:
        handle.remove()
    if not isinstance(outputs[-1], tuple) or len(outputs[-1]) != 2:
        raise InputError("the forward of a language model returns a pair: log-probabilities and state")
    state = tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), outputs[-1][1])
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    return (tokens, state) if cluster is None else (tokens, state, cluster)


@dataclass(frozen=True)
class Steps:
    """The steps that stand for all tokens of a stream, by name: the input of each, and what it stands for.

    `parts` says for a step its cluster and the weight of its position; the weights of a cluster sum to 1. A step that
    runs every cluster weighs nothing: it shows what is stored.
    """

    inputs: Mapping[str, Example]
    parts: Mapping[str, tuple[int, Fraction]]


def steps(model: nn.Module, tokens: int) -> Steps:
    """Of a stream of so many tokens. Raises InputError where the model does not return log-probabilities and state."""
    positions = mean_position(_context(model), tokens)
    if not cutoffs_of(model):
        names = {f"token {position}" if len(positions) > 1 else "": position for position in positions}
        parts = {name: (0, positions[position]) for name, position in names.items()}
        return Steps({name: step(model, position) for name, position in names.items()}, parts)
    inputs: dict[str, Example] = {"every cluster": step(model, max(positions))}
    named: dict[str, tuple[int, Fraction]] = {}
    for cluster in range(len(cutoffs_of(model)) + 1):
        for position, weight in positions.items():
            name = f"cluster {cluster}, token {position}"
            inputs[name], named[name] = step(model, position, cluster), (cluster, weight)
    return Steps(inputs, named)


def per_token(
    model: nn.Module,
    recorded: Trace,
    steps: Steps,
    tokens: int,
    formulas: Mapping[str, Formula],
    shares: Shares | None,
    freebie: bool = True,
) -> Account:
    """The mean cost of the first `tokens` tokens of a stream, from the trace of its `steps`.

    `shares` says which share of the tokens lies in each cluster of the vocabulary; None counts every token as one of
    the costliest. Raises InputError where the cost is not affine in min(t, context).
    """
    _check_affine(model, tokens, formulas)
    whole = mean_account(recorded, formulas, freebie=freebie)
    if not whole.paths:
        return whole
    if shares is None:
        costs: dict[int, float] = {}
        for name, (cluster, weight) in steps.parts.items():
            costs[cluster] = costs.get(cluster, 0) + float(weight) * whole.paths[name].ops32
        costliest = max(costs, key=costs.__getitem__)
        shares = tuple(Fraction(cluster == costliest) for cluster in costs)
    weights = {name: Fraction(0) for name in steps.inputs}
    weights |= {name: shares[cluster] * weight for name, (cluster, weight) in steps.parts.items()}
    return replace(mean_account(recorded, formulas, weights, freebie), paths={}, shares={})


def mean_position(context: int | None, tokens: int) -> dict[int, Fraction]:
    """Positions with weights that give the mean over positions 1 to `tokens` of what is affine in min(t, context).

    Two positions, of which the mean is a combination; one where nothing depends on the position. The first token, which
    has no state before it, is never looked at. *(ours)*
    """
    last = min(context or 2, tokens)
    if last <= 2:
        return {2: Fraction(1)}
    keys = Fraction(last * (last + 1) // 2 + (tokens - last) * last, tokens)
    weight = (keys - 2) / (last - 2)
    return {2: 1 - weight, last: weight}


def cutoffs_of(model: nn.Module) -> tuple[int, ...]:
    """The ids at which each cluster of the vocabulary but the first begins."""
    return tuple(getattr(model, "cutoffs", ()))


def shares_of_clusters(
    model: nn.Module, task: Task, data: Path | None, claimed: Sequence[Fraction] | None
) -> tuple[Shares | None, str]:
    """Which share of the test stream's tokens lies in each cluster, and a remark where it was not measured.

    Without data the claimed shares are taken; without those None.
    """
    cutoffs = cutoffs_of(model)
    if not cutoffs:
        return (Fraction(1),), ""
    try:
        dataset = task.dataset(data, "test")
    except DataMissing:
        if claimed is None:
            missing = "neither the data nor [frequencies] in the submission says how frequent they are"
            return None, f"every token counts as one of the costliest cluster of the vocabulary: {missing}"
        listed = ", ".join(f"{float(share):.4g}" for share in claimed)
        return tuple(claimed), f"the shares of tokens in the vocabulary's clusters are claimed, not measured: {listed}"
    bounds, counts = torch.tensor(cutoffs), torch.zeros(len(cutoffs) + 1, dtype=torch.int64)
    for i in range(len(dataset)):  # type: ignore[arg-type]
        labels: Tensor = dataset[i][1]
        counts += torch.bincount(torch.bucketize(labels, bounds, right=True), minlength=len(counts))
    return tuple(Fraction(count, int(counts.sum())) for count in counts.tolist()), ""


def _context(model: nn.Module) -> int | None:
    context: int | None = getattr(model, "context", None)
    return context


def _check_affine(model: nn.Module, tokens: int, formulas: Mapping[str, Formula]) -> None:
    """What `mean_position` takes for granted, tried on one position more on the line and one behind its end."""
    context = _context(model)
    cluster = 0 if cutoffs_of(model) else None
    last = min(context or 2, tokens)

    def cost(position: int) -> Math:
        return account(trace(model, step(model, position, cluster)), formulas).math

    first = cost(2)
    if last > 2:
        middle = (last + 2) // 2
        here, end = cost(middle), cost(last)
        slope = Fraction(end.ops32 - first.ops32) / (last - 2)
        if Fraction(here.ops32) != Fraction(first.ops32) + slope * (middle - 2):
            raise InputError(
                f"the cost of a token is not affine in min(position, context {context}), cannot average it"
            )
        first = end
    if last < tokens and cost(max(last, 2) + 1) != first:
        raise InputError(
            "the cost of a token still grows behind the model's context; "
            "set the model's attribute `context` to the number of tokens that a token attends to"
        )
