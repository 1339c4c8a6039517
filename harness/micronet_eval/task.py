"""A task: what is classified or predicted, how good it must be, and the baseline of the score. Data, not code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from micronet_eval.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Split = Literal["train", "test"]
_Batch = TypeVar("_Batch")


class DataMissing(Exception):
    """A data set is not there, or is damaged. The message says where it was looked for and how to get it."""


@dataclass(frozen=True)
class Metric:
    """Which way a metric is better, and how it is written: a share as a percentage, a perplexity as it is."""

    lower_is_better: bool
    style: str

    @property
    def sign(self) -> str:
        return "<=" if self.lower_is_better else ">="

    def show(self, value: float) -> str:
        return format(value, self.style)


METRICS: dict[str, Metric] = {"top-1": Metric(False, ".2%"), "perplexity": Metric(True, ".2f")}


@dataclass(frozen=True)
class Task:
    """`storage` in 32-bit parameters and `math` in 32-bit operations an example are the baseline's.

    `threshold` is a share (0.8 = 80 %) that top-1 has to reach, or the perplexity that must not be exceeded, exactly,
    without rounding. `dataset` gives a split, from a root folder (None: where it is usually found); it raises
    DataMissing.

    top-1: pairs of image tensor and label. perplexity: the pieces of one stream of tokens in order, each a pair of
    int64 tensors [T], tokens and the token after each; an example is one token (`input_shape` is (1,)), and `tokens`
    says how many the test stream predicts.
    """

    name: str
    description: str
    baseline: str
    storage: float
    math: float
    metric: Literal["top-1", "perplexity"]
    threshold: float
    input_shape: tuple[int, ...]
    dataset: Callable[[Path | None, Split], Dataset[Any]]
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.metric == "perplexity" and self.tokens < 1:
            raise ValueError(f"task {self.name}: `tokens` says how many tokens the test stream predicts")


def readable(batches: Iterable[_Batch], split: str) -> Iterator[_Batch]:
    """Batches of a data set's split. Raises InputError where it cannot be read, or what reads it dies."""
    left = iter(batches)
    while True:
        try:
            batch = next(left)
        except StopIteration:
            return
        except InputError:
            raise
        except Exception as error:  # whatever a data set raises
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"the {split} data cannot be read: {why}; look after the folder of --data") from error
        yield batch
