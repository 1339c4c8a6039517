"""How good a model is on its task's test data. Nothing here knows what the model costs or claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, Subset

from micronet_eval.batches import check_apart
from micronet_eval.conditional import conditional_of
from micronet_eval.errors import InputError
from micronet_eval.task import DataMissing, Task, readable
from micronet_eval.trace import SEED

BATCH = 100
NORMALISED = 1e-3
"""How far the logarithm of the sum of all probabilities may be from zero: what float32 rounds, and no more."""

Progress = Callable[[int, int], None]
"""Called with the number of examples (of a stream: pieces) done and the number of all."""


class Quality(BaseModel):
    """The measured metric against the threshold; null where it was not measured, with the reason.

    `taken` is how many examples took each path of a conditional model.
    """

    model_config = ConfigDict(frozen=True)
    metric: str
    threshold: float
    claimed: float | None
    measured: float | None
    passed: bool | None
    examples: int
    reason: str
    taken: dict[str, int] = Field(default_factory=dict, exclude=True)


def not_measured(task: Task, claimed: float | None, reason: str) -> Quality:
    """A quality that nobody measured."""
    return Quality(
        metric=task.metric,
        threshold=task.threshold,
        claimed=claimed,
        measured=None,
        passed=None,
        examples=0,
        reason=reason,
    )


def measure(
    model: nn.Module,
    task: Task,
    data: Path | None,
    claimed: float | None = None,
    progress: Progress | None = None,
    apart: bool = False,
) -> Quality:
    """The task's metric over the whole test set, compared with the threshold without rounding.

    `apart` is for models of strangers: examples come in a drawn order, as that of the test set may tell their labels,
    and what is said of one may not depend on the others of its batch. That takes three times as long. Raises InputError
    where it does, and where a language model's outputs are no log-probabilities of the task's tokens.
    """
    try:
        dataset = task.dataset(data, "test")
    except DataMissing as error:
        return not_measured(task, claimed, str(error))
    taken = Counter[str]()
    model.eval()
    with torch.inference_mode(), parametrize.cached():
        if task.metric == "perplexity":
            loss, total = negative_log_likelihood(model, dataset, progress)
            measured = math.exp(loss / total) if loss / total < 700 else math.inf
            passed = measured <= task.threshold
            reason = f"perplexity {measured:.4f}: {loss / total:.6f} nats a token, {total:,} tokens"
        else:
            correct, total = count_correct(model, dataset, progress, taken, apart)
            measured = correct / total
            # The threshold as it was written: 0.8 means 8,000 of 10,000, not the float next to it.
            passed = Fraction(correct, total) >= Fraction(str(task.threshold))
            reason = f"{correct:,} of {total:,} correct"
    conditional = conditional_of(model)
    return Quality(
        metric=task.metric,
        threshold=task.threshold,
        claimed=claimed,
        measured=measured,
        passed=passed,
        examples=total,
        reason=reason,
        taken={} if conditional is None else {path: taken[path] for path in conditional.paths},
    )


def count_correct(
    model: nn.Module, dataset: Dataset[Any], progress: Progress | None, taken: Counter[str], apart: bool = False
) -> tuple[int, int]:
    """How many examples have their label as the largest output, and how many there are.

    `taken` is told the path that each example took through a conditional model. `apart` is as in `measure`.
    """
    conditional = conditional_of(model)
    total = len(dataset)  # type: ignore[arg-type]
    correct = done = 0
    draws = torch.Generator().manual_seed(SEED)
    if apart:
        dataset = Subset(dataset, torch.randperm(total, generator=draws).tolist())
    for inputs, labels in readable(DataLoader(dataset, BATCH), "test"):
        outputs = model(inputs)
        correct += int((_classes(outputs, labels) == labels).sum())
        if apart:
            check_apart(model, inputs, outputs, draws)
        done += len(labels)
        if conditional is not None:
            taken.update(conditional.taken)
        if progress is not None:
            progress(done, total)
    return correct, total


def _classes(outputs: Any, labels: Tensor) -> Tensor:
    """The class of the largest output of each example. Raises InputError where the outputs are not one row for each.

    An output of another shape would be compared with the labels of other examples.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(labels) or not outputs.shape[1]:
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"the model gives {given} for {len(labels)} examples; it has to give a row of classes for each"
        )
    if bool(outputs.isnan().any()):
        raise InputError("the model's outputs are not numbers")
    return outputs.argmax(1)


def negative_log_likelihood(
    model: nn.Module, dataset: Dataset[Any], progress: Progress | None = None
) -> tuple[float, int]:
    """Of a stream of tokens, in nats, and how many were predicted; the state goes on from piece to piece."""
    pieces = len(dataset)  # type: ignore[arg-type]
    loss, tokens, state = 0.0, 0, None
    for i, (inputs, labels) in enumerate(readable(DataLoader(dataset, 1), "test")):
        try:
            log_probabilities, state = model(inputs, state)
        except IndexError as error:
            raise InputError(f"the model has no token {int(inputs.max())}, which the data has: {error}") from error
        loss -= _chosen(log_probabilities, labels).double().sum().item()
        tokens += labels.numel()
        if progress is not None:
            progress(i + 1, pieces)
    if math.isnan(loss):
        raise InputError("the model's log-probabilities are not numbers")
    return loss, tokens


def _chosen(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label, of those of all tokens, which have to sum to one."""
    if log_probabilities.shape[:-1] != labels.shape:
        raise InputError(f"the model gives {tuple(log_probabilities.shape)} for {tuple(labels.shape)} tokens")
    if (largest := int(labels.max())) >= log_probabilities.shape[-1]:
        raise InputError(f"the model predicts {log_probabilities.shape[-1]:,} tokens; the data has token {largest:,}")
    off = log_probabilities.logsumexp(-1).abs().max().item()
    if not off <= NORMALISED:  # NaN, too
        raise InputError(f"the model returns no log-probabilities: the logarithm of their sum is {off:.3g}, not 0")
    return log_probabilities.gather(-1, labels.unsqueeze(-1))
