"""A submission's folder: submission.toml, checked field by field, and the packed weights beside it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from micronet_eval import plugins
from micronet_eval.errors import InputError
from micronet_eval.files import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from torch import nn

    from micronet_eval.task import Task

MANIFEST, WEIGHTS, RECIPE = "submission.toml", "weights.safetensors", "recipe.toml"

Model = TypeVar("Model", bound=BaseModel)


class Table(BaseModel):
    """A TOML table in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(BaseModel):
    """A registered architecture by name; every other key is an option of its builder."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        extra = self.__pydantic_extra__ or {}
        return {name: float(v) if isinstance(v, Decimal) else v for name, v in extra.items()}


class Claims(Table):
    """What the authors claim: 32-bit parameters, 32-bit operations, the score, the quality as a share or a perplexity.

    Decimals keep the digits as printed: the last one is the tolerance of the quality.
    """

    storage: Decimal | None = Field(None, gt=0)
    math: Decimal | None = Field(None, gt=0)
    score: Decimal | None = Field(None, gt=0)
    quality: Decimal | None = Field(None, ge=0)


class Frequencies(Table):
    """Which share of the tokens of text lies in each cluster of the vocabulary, for when the test data is missing."""

    clusters: list[Decimal] = Field(min_length=1)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        return tuple(map(Fraction, self.clusters))

    @field_validator("clusters")
    @classmethod
    def _shares(cls, clusters: list[Decimal]) -> list[Decimal]:
        if min(clusters) < 0 or sum(clusters) != 1:
            raise ValueError(f"the shares must sum to 1, not {sum(clusters)}")
        return clusters


class Step(Table):
    """The model after one stage of the recipe, as it ran: nothing merged, nothing counted as narrower than it is.

    Where training data was held out, `quality` is that on it, and `score` what the model would score as it is.
    """

    stage: str
    parameters: int
    nonzeros: int
    mults: int
    adds: int
    score: float | None = None
    quality: float | None = None


class Provenance(Table):
    """Where the weights come from: a `note` for the report, the `data` that was used, the recipe's steps.

    `calibration` is the data that activation ranges were found on, where it is not `data`. Neither may be the test set.
    """

    note: str = ""
    data: str = ""
    calibration: str = ""
    steps: list[Step] = Field(default_factory=list)

    @field_validator("data", "calibration")
    @classmethod
    def _no_leak(cls, data: str) -> str:
        if "test" in re.findall(r"[a-z]+", data.lower()):
            raise ValueError("the test set may only be tested on; train and calibrate on training data")
        return data


Share = Annotated[Decimal, Field(ge=0, le=1)]


class Manifest(Table):
    """submission.toml. `paths` is the share of the test set that takes each path of a conditional model, as claimed."""

    name: str = Field(min_length=1)
    task: str
    authors: list[str] = Field(min_length=1)
    architecture: Architecture
    claims: Claims = Claims()
    paths: dict[str, Share] = Field(default_factory=dict)
    frequencies: Frequencies | None = None
    provenance: Provenance = Provenance()


def read_toml(path: Path, model: type[Model]) -> Model:
    """A TOML file as `model`. Raises InputError that names the file, the field and the mend."""
    try:
        return model.model_validate(read_table(path, Decimal))
    except ValidationError as error:
        raise InputError("\n".join(_fault(path, fault) for fault in error.errors())) from error


def read_table(path: Path, number: Callable[[str], Any] = float) -> dict[str, Any]:
    """A TOML file as it is, with fractions as `number`. Raises InputError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        table: dict[str, Any] = tomllib.loads(text, parse_float=number)
        return table
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no valid TOML: {error}") from error


def _fault(path: Path, fault: Any) -> str:
    field = ".".join(str(part) for part in fault["loc"])
    mend = {"missing": "add this field", "extra_forbidden": "remove it or mend its spelling"}.get(fault["type"])
    return f"{path}: field {field!r}: {fault['msg']}{f' ({mend})' if mend else ''}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a submission's folder. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a submission is a folder with {MANIFEST} and {WEIGHTS}")
    return read_toml(folder / MANIFEST, Manifest)


def task_of(manifest: Manifest, source: Path) -> Task:
    """The registered task that a manifest names. Raises InputError that names `source` where there is none."""
    try:
        task: Task = plugins.lookup("task", manifest.task)
    except InputError as error:
        raise InputError(f"{source}: field 'task': {error}") from error
    return task


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes submission.toml."""
    data = manifest.model_dump(exclude_none=True, exclude_defaults=True)
    data["architecture"] = {"name": manifest.architecture.name, **manifest.architecture.options}
    write_whole(folder / MANIFEST, tomli_w.dumps(data).encode())


def build(architecture: Architecture, source: Path, weights: bool = False) -> nn.Module:
    """The registered architecture, in evaluation mode; without `weights` its parameters lie on the meta device.

    Raises InputError that names `source` where the name or an option is wrong.
    """
    from micronet_eval.structure import without_weights

    try:
        builder = plugins.lookup("architecture", architecture.name)
        with nullcontext() if weights else without_weights():
            model: nn.Module = builder(**architecture.options)
    except Exception as error:  # an unknown name, or whatever a builder raises for options that it does not like
        raise InputError(f"{source}: field 'architecture': {error}") from error
    return model.eval()
