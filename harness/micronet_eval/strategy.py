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
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

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

    @property
    def goes_behind_another(self) -> bool:
        """Whether it leaves the formats of a quantizer before it; `compare` refuses to quantize anew by any other."""
        return False


def values_of(annotation: Any) -> str:
    """The type of an option as users write its values: `true, false or activations`, `{ name = int, ... }`."""
    *words, last = _words(annotation)
    return f"{', '.join(words)} or {last}" if words else last


def is_union(annotation: Any) -> bool:
    """Whether the values of an option are of several types, beside None."""
    return get_origin(annotation) in (Union, UnionType) and len(set(get_args(annotation)) - {NoneType}) > 1


def _words(annotation: Any) -> list[str]:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _words(parts[0])
    if kind in (Union, UnionType):  # None cannot be written
        return [word for part in parts if part is not NoneType for word in _words(part)]
    if kind is Literal:
        return [f'"{part}"' if part in ("true", "false") else _literal(part) for part in parts]
    if annotation is bool:
        return ["true", "false"]
    if kind is dict:
        return [f"{{ name = {values_of(parts[1])}, ... }}"]
    if kind in (list, tuple):
        return [f"[{', '.join('...' if part is ... else values_of(part) for part in parts)}]"]
    return [annotation.__name__ if isinstance(annotation, type) else str(annotation)]


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
