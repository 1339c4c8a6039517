"""How good a model is on its task's test data. Nothing here knows what the model costs or claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from micronet_eval.conditional import conditional_of
from micronet_eval.task import DataMissing, Task

BATCH = 100
Progress = Callable[[int, int], None]
"""Called with the number of examples done and the number of all."""


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
    model: nn.Module, task: Task, data: Path | None, claimed: float | None = None, progress: Progress | None = None
) -> Quality:
    """Top-1 accuracy of `model` over the whole test set, compared with the threshold in whole examples."""
    try:
        dataset = task.dataset(data, "test")
    except DataMissing as error:
        return not_measured(task, claimed, str(error))
    total = len(dataset)  # type: ignore[arg-type]
    correct = done = 0
    conditional, taken = conditional_of(model), Counter[str]()
    model.eval()
    with torch.inference_mode(), parametrize.cached():
        for inputs, labels in DataLoader(dataset, batch_size=BATCH):
            correct += int((model(inputs).argmax(1) == labels).sum())
            done += len(labels)
            if conditional is not None:
                taken.update(conditional.taken)
            if progress is not None:
                progress(done, total)
    # The threshold as it was written: 0.8 means 8,000 of 10,000, not the float next to it.
    passed = Fraction(correct, total) >= Fraction(str(task.threshold))
    return Quality(
        metric=task.metric,
        threshold=task.threshold,
        claimed=claimed,
        measured=correct / total,
        passed=passed,
        examples=total,
        reason=f"{correct:,} of {total:,} correct",
        taken={} if conditional is None else {path: taken[path] for path in conditional.paths},
    )
