"""A submission's folder: submission.toml, checked field by field, and the packed weights beside it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError, hidden, printable
from micronet_eval.files import check_own, read_whole
from micronet_eval.isolation import AUTO, Isolation, graph_of_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from torch import nn

    from micronet_eval.task import Task

MANIFEST, WEIGHTS, RECIPE = "submission.toml", "weights.safetensors", "recipe.toml"
TABLE_LIMIT = 1 << 20  # bytes of a TOML file
MOST_DOTS = 100  # in a line, beside those of numbers: time to read a dotted key grows with the square of its length
MOST_FAULTS = 10  # that are told of one file
LARGEST_EXPONENT = 30  # of a number in a TOML file: an exact fraction of 1e999999999 takes hours

Model = TypeVar("Model", bound=BaseModel)


class Table(BaseModel):
    """A TOML table in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Architecture(BaseModel):
    """A registered architecture by `name`, or a `file` with `build() -> nn.Module`; other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    file: Literal["model.py"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _either(cls, table: Any) -> Any:
        if not isinstance(table, dict) or table.get("file") is None:
            return table
        if table.get("name", table["file"]) != table["file"]:
            raise ValueError("an architecture has a name or a file, not both")
        return {**table, "name": table["file"]}

    @property
    def options(self) -> dict[str, Any]:
        return {name: _floats(value) for name, value in (self.__pydantic_extra__ or {}).items()}


def _floats(value: Any) -> Any:
    """The same with floats in the place of Decimals, in lists and tables, too."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value


def _bounded(value: Any) -> Any:
    """Raises ValueError as `bounded` does for a number in quotation marks, which `read_table` takes for a text."""
    if isinstance(value, str):
        with suppress(InvalidOperation):
            return bounded(str(Decimal(value)))
    return value


Number = Annotated[Decimal, BeforeValidator(_bounded)]


class Claims(Table):
    """What the authors claim: 32-bit parameters, 32-bit operations, the score, the quality as a share or a perplexity.

    Decimals keep the digits as printed: the last one is the tolerance of the quality, 0.1 at most, of a perplexity 1.
    """

    storage: Number | None = Field(None, gt=0)
    math: Number | None = Field(None, gt=0)
    score: Number | None = Field(None, gt=0)
    quality: Number | None = Field(None, ge=0)


class Frequencies(Table):
    """Which share of the tokens of text lies in each cluster of the vocabulary, for when the test data is missing."""

    clusters: list[Number] = Field(min_length=1)

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


_TEST_SET = frozenset({"test", "tests", "testset", "testing"})


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
        if _TEST_SET & {*re.findall(r"[a-z]+", data.lower())}:
            raise ValueError("the test set may only be tested on; train and calibrate on training data")
        return data


Share = Annotated[Number, Field(ge=0, le=1)]


class Manifest(Table):
    """submission.toml. `paths` is the share of the test set that takes each path of a conditional model, as claimed."""

    name: str = Field(min_length=1)
    task: str
    authors: list[str] = Field(min_length=1)
    architecture: Architecture
    claims: Claims = Claims()
    paths: dict[Annotated[str, Field(min_length=1)], Share] = Field(default_factory=dict)
    frequencies: Frequencies | None = None
    provenance: Provenance = Provenance()


def read_toml(path: Path, model: type[Model]) -> Model:
    """A TOML file as `model`. Raises InputError that names the file, the field and the mend."""
    return checked(read_table(path, Decimal), model, path)


def checked(table: Mapping[str, Any], model: type[Model], path: str | Path) -> Model:
    """A table of the file `path`, or of what it names, as `model`. Raises InputError as `read_toml` does."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        faults = error.errors()
        told = [_fault(path, fault) for fault in faults[:MOST_FAULTS]]
        more = [f"{path}: {len(faults) - MOST_FAULTS:,} more"] if len(faults) > MOST_FAULTS else []
        raise InputError("\n".join(told + more)) from error


def read_table(path: Path, number: Callable[[str], Any] = float) -> dict[str, Any]:
    """A TOML file as it is, with fractions as `number`. Raises InputError that names the file."""
    try:
        text = read_whole(path, TABLE_LIMIT).decode("utf-8-sig")  # some editors put a mark in front
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        if any(re.sub(r"\d\.\d", "", line).count(".") > MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line has more than {MOST_DOTS} dots")
        table: dict[str, Any] = tomllib.loads(text, parse_float=lambda digits: number(bounded(digits)))
        _check_text(table, path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid TOML: {error}") from error
    return table


def bounded(digits: str) -> str:
    """A number as it was written. Raises ValueError where it is too large or small to be computed with exactly."""
    try:
        value = Decimal(digits)
    except InvalidOperation:  # an exponent of more digits than there can be
        value = Decimal("1e999")
    if value.is_finite() and (abs(value.adjusted()) > LARGEST_EXPONENT or len(digits) > 100):
        raise ValueError(f"the number {digits[:20]} is too large, too small, or too long")
    return digits


def _check_text(item: Any, path: Path) -> None:
    """Raises InputError where a key or a text has characters that a terminal would obey instead of showing.

    Raises ValueError where a whole number is too large: those with a fraction are bounded as they are read.
    """
    if isinstance(item, int) and abs(item) > 10**LARGEST_EXPONENT:
        raise ValueError(f"the number {str(item)[:20]} is too large")
    if isinstance(item, dict):
        item = [*item, *item.values()]
    if isinstance(item, list):
        for part in item:
            _check_text(part, path)
    if isinstance(item, str) and (bad := [character for character in item if hidden(character)]):
        raise InputError(f"{path}: {printable(item)[:60]!r} has the control character U+{ord(bad[0]):04X}; remove it")


def _fault(path: str | Path, fault: Any) -> str:
    field, told = faults_of(fault)
    return f"{path}: {field}: {told}"


def faults_of(fault: Any) -> tuple[str, str]:
    """The field that a fault of pydantic is about, and what is wrong, with the mend."""
    field = ".".join(str(part) for part in fault["loc"])[:200]
    mend = _MENDS.get(fault["type"])
    return f"field {field!r}", f"{fault['msg'].removeprefix('Value error, ')}{f' ({mend})' if mend else ''}"


_MENDS = {
    "missing": "add this field",
    "extra_forbidden": "remove it or mend its spelling",
    "list_type": "write it in brackets: [...]",
}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a submission's folder. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a submission is a folder with {MANIFEST} and {WEIGHTS}")
    check_own(folder / MANIFEST)
    return read_toml(folder / MANIFEST, Manifest)


def task_of(manifest: Manifest, source: Path) -> Task:
    """The registered task that a manifest names. Raises InputError that names `source` where there is none."""
    try:
        task: Task = plugins.lookup("task", manifest.task)
    except InputError as error:
        raise InputError(f"{source}: field 'task': {error}") from error
    return task


def manifest_bytes(manifest: Manifest) -> bytes:
    """The text of submission.toml."""
    data = manifest.model_dump(exclude_none=True, exclude_defaults=True)
    which = "name" if manifest.architecture.file is None else "file"
    data["architecture"] = {which: manifest.architecture.name, **manifest.architecture.options}
    return tomli_w.dumps(data).encode()


def build(architecture: Architecture, source: Path, weights: bool = False, isolation: Isolation = AUTO) -> nn.Module:
    """The architecture, in evaluation mode; without `weights` its parameters lie on the meta device.

    `source` is the file that names it. Code that lies beside it is run by a worker, as `isolation` says; the module is
    built here of what the worker gives back. Raises InputError that names `source` where the name or an option is
    wrong, SubmissionError where that code fails.
    """
    from torch import nn

    from micronet_eval.structure import StructureError, without_weights

    if architecture.file is not None:
        from micronet_eval.graph import model_of

        code = source.parent / architecture.file
        graph = graph_of_file(code, architecture.options, isolation)
        try:
            with nullcontext() if weights else without_weights():
                return model_of(graph)
        except StructureError as error:
            raise SubmissionError(printable(f"{code}: {error}")) from error
    try:
        builder = plugins.lookup("architecture", architecture.name)
    except InputError as error:
        raise InputError(f"{source}: field 'architecture': {error}") from error
    plugins.check_options(builder, architecture.options, f"{source}: ")
    try:
        with nullcontext() if weights else without_weights():
            model = builder(**architecture.options)
    except Exception as error:  # whatever a builder raises for options that it does not like
        raise InputError(f"{source}: field 'architecture': {error}") from error
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise InputError(f"{source}: field 'architecture': {architecture.name} has to return an nn.Module, not {found}")
    return model.eval()


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each submission's folder, as `told_apart`; a link to itself has one, too."""
    return told_apart([Path(os.path.realpath(folder)).name for folder in folders], folders)


def told_apart(names: Sequence[str], places: Sequence[Path], taken: Set[str] = frozenset()) -> list[str]:
    """Each name, or the place as it was given where another one has the same name, or it is taken."""
    return [
        name if names.count(name) == 1 and name not in taken else str(place)
        for name, place in zip(names, places, strict=True)
    ]
