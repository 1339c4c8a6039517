"""A task: what is classified, how good it must be, and the baseline that the score is relative to. Data, not code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Split = Literal["train", "test"]


class DataMissing(Exception):
    """A data set is not there, or is damaged. The message says where it was looked for and how to get it."""


@dataclass(frozen=True)
class Task:
    """`storage` in 32-bit parameters and `math` in 32-bit operations an example are the baseline's.

    `threshold` is a share (0.8 = 80 %) that the metric has to reach, exactly, without rounding. `dataset` gives a
    split as pairs of image tensor and label, from a root folder (None: where it is usually found); it raises
    DataMissing.
    """

    name: str
    description: str
    baseline: str
    storage: float
    math: float
    metric: Literal["top-1"]
    threshold: float
    input_shape: tuple[int, ...]
    dataset: Callable[[Path | None, Split], Dataset[Any]]
