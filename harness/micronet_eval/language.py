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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from micronet_eval.costs import Formula
from micronet_eval.errors import InputError
from micronet_eval.scoring import Account, Layer, Math, account
from micronet_eval.task import DataMissing, Task
from micronet_eval.trace import trace

Shares = tuple[Fraction, ...]


def example_input(task: Task, model: nn.Module) -> Any:
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


def per_token(
    model: nn.Module, whole: Account, tokens: int, formulas: Mapping[str, Formula], shares: Shares | None
) -> Account:
    """The mean cost of the first `tokens` tokens of a stream; `whole` is the account of a step that runs everything.

    Storage is that of `whole`. `shares` says which share of the tokens lies in each cluster of the vocabulary; None
    counts every token as one of the costliest. Raises InputError where the cost is not affine in min(t, context).
    """

    def cost(position: int, cluster: int | None) -> Account:
        return account(trace(model, step(model, position, cluster)), formulas, whole.freebie)

    clusters: Sequence[int | None] = range(len(cutoffs_of(model)) + 1) if cutoffs_of(model) else (None,)
    positions = mean_position(_context(model), tokens)
    _check_affine(lambda position: cost(position, clusters[0]).math, _context(model), tokens)
    paths = [[(weight, cost(position, c)) for position, weight in positions.items()] for c in clusters]
    if shares is None:
        return mean(whole, max(paths, key=lambda path: mean(whole, path).math.ops32))
    return mean(whole, [(s * weight, a) for s, path in zip(shares, paths, strict=True) for weight, a in path])


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


def mean(whole: Account, parts: Sequence[tuple[Fraction, Account]]) -> Account:
    """`whole` with the weighted mean of the parts' operations, in all and operation by operation; weights sum to 1."""

    def average(values: Sequence[float]) -> int | float:
        total = sum((weight * Fraction(value) for (weight, _), value in zip(parts, values, strict=True)), Fraction(0))
        return int(total) if total.denominator == 1 else float(total)

    maths = [part.math for _, part in parts]
    math = Math(
        mults=average([m.mults for m in maths]),
        adds=average([m.adds for m in maths]),
        ops32=average([m.ops32 for m in maths]),
        mult_ops32=average([m.mult_ops32 for m in maths]),
        add_ops32=average([m.add_ops32 for m in maths]),
        macs=average([m.macs for m in maths]),
    )
    tables = [_numbered(part.layers) for _, part in parts]
    layers = []
    for key in dict.fromkeys(key for table in tables for key in table):
        rows = [table.get(key) for table in tables]
        found = [row for row in rows if row is not None]
        layers.append(
            Layer(
                module=found[0].module,
                op=found[0].op,
                mults=average([row.mults if row else 0 for row in rows]),
                adds=average([row.adds if row else 0 for row in rows]),
                input_bits=max(row.input_bits for row in found),
                weight_bits=max(row.weight_bits for row in found),
                ops32=average([row.ops32 if row else 0 for row in rows]),
                storage_bits=max(row.storage_bits for row in found),
            )
        )
    return replace(whole, math=math, layers=tuple(layers))


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


def _numbered(layers: Sequence[Layer]) -> dict[tuple[str, str, int], Layer]:
    """Layers by module, operation, and how many like it came before."""
    table: dict[tuple[str, str, int], Layer] = {}
    for layer in layers:
        number = 0
        while (key := (layer.module, layer.op, number)) in table:
            number += 1
        table[key] = layer
    return table


def _check_affine(cost: Callable[[int], Math], context: int | None, tokens: int) -> None:
    """What `mean_position` takes for granted, tried on one position more on the line and one behind its end."""
    last = min(context or 2, tokens)
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
