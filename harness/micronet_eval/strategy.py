"""What a plugin author needs: the three kinds of strategy, and the context that they work in.

A strategy is a class whose fields are its options, with one method:

    class MyPruner(Pruner):
        \"\"\"One line that `micronet-eval strategies` shows.\"\"\"
        ratio: float = Field(0.5, gt=0, lt=1, description="share of channels to remove")

        def apply(self, model, context): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from micronet_eval.costs import Formula
    from micronet_eval.trace import Example


@dataclass(frozen=True)
class Context:
    """What a strategy may use: an example input (batch of 1), training data (never test data), a seed, the formulas."""

    example_input: Example
    training_data: DataLoader[tuple[Tensor, Tensor]]
    seed: int
    formulas: Mapping[str, Formula]

    def calibration(self, batches: int) -> Iterator[Tensor]:
        """The inputs of the first so many batches of training data."""
        for inputs, _ in islice(self.training_data, batches):
            yield inputs


class Strategy(BaseModel, ABC):
    """Options as fields; `apply` returns the compressed model and leaves the one that it was given alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> nn.Module: ...


class Pruner(Strategy, ABC):
    """Removes structure: the returned model is smaller."""

    kind: ClassVar[str] = "pruner"


class Sparsifier(Strategy, ABC):
    """Sets weights to zero and holds them there with a Mask."""

    kind: ClassVar[str] = "sparsifier"


class Quantizer(Strategy, ABC):
    """Gives weights and activations a number format."""

    kind: ClassVar[str] = "quantizer"

    @property
    def wants_batch_norm(self) -> bool:
        """Whether batch norm has to be there still, so that `compare` must not merge it first."""
        return False
