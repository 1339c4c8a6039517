"""From a submission's folder, or any module, to a Report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from micronet_eval import crosscheck, packing, plugins
from micronet_eval.accumulators import WhatIf, what_if
from micronet_eval.activation import Activation, activation_peak
from micronet_eval.costs import Formula
from micronet_eval.crosscheck import CrossCheck
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.precision import bit_widths
from micronet_eval.quality import Progress, Quality, measure, not_measured
from micronet_eval.rulesets import DEFAULT
from micronet_eval.rulesets import ruleset as ruleset_of
from micronet_eval.scoring import Account, Coverage, Layer, Math, Module, Score, Storage, account
from micronet_eval.scoring import score as score_of
from micronet_eval.storage import without_values
from micronet_eval.submission import MANIFEST, WEIGHTS, Claims, Manifest, build, read_manifest
from micronet_eval.task import Task
from micronet_eval.trace import Trace, trace

COST_TOLERANCE = Decimal("1.01")
"""A claimed cost holds when the measurement is at most 1 % worse."""

NOT_ASKED = "only the cost was asked for"


class Claim(BaseModel):
    """A claim beside the measurement. `holds` is null where nothing was measured."""

    model_config = ConfigDict(frozen=True)
    name: str
    claimed: float
    measured: float | None
    holds: bool | None


class Report(BaseModel):
    """All that an evaluation found; its JSON is described by docs/report.schema.json."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = Field(default=1, serialization_alias="schema")
    submission: str
    task: str | None
    storage: Storage
    math: Math
    score: Score | None
    activation: Activation
    what_if: WhatIf
    quality: Quality | None
    claims: tuple[Claim, ...]
    layers: tuple[Layer, ...]
    modules: tuple[Module, ...]
    ruleset: str
    freebie: bool
    coverage: Coverage
    cross_check: CrossCheck | None
    environment: dict[str, str]
    provenance: str
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no threshold and no claim fails; what was not measured does not fail."""
        quality_fails = self.quality is not None and self.quality.passed is False
        return not quality_fails and all(claim.holds is not False for claim in self.claims)

    def to_json(self) -> str:
        """The report as JSON, keys as in docs/report.schema.json."""
        return self.model_dump_json(by_alias=True, indent=2)


@dataclass(frozen=True)
class Opened:
    """A submission ready to be counted: the model as it was unpacked, batch norm merged, and its trace."""

    folder: Path
    manifest: Manifest
    task: Task
    model: nn.Module
    example: Tensor
    trace: Trace

    def account(self, ruleset: str = DEFAULT) -> Account:
        """What it costs. Raises InputError where an operation has no price."""
        weights = self.folder / WEIGHTS
        try:
            counted = account(self.trace, formulas(ruleset))
        except InputError as error:
            raise InputError(f"{weights}: {error}") from error
        return replace(counted, storage=replace(counted.storage, file_bytes=weights.stat().st_size))

    def report(self, counted: Account, quality: Quality, ruleset: str, cross_check: CrossCheck | None) -> Report:
        """The report on what was counted and measured."""
        name, note = self.folder.resolve().name, self.manifest.provenance.note
        claims = self.manifest.claims
        return _report(name, self.task, self.trace, counted, quality, claims, note, ruleset, cross_check)


def open_submission(folder: str | Path) -> Opened:
    """Unpacks a submission and traces it. Raises InputError where it is wrong."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    where = folder / MANIFEST
    task: Task = _lookup_task(manifest.task, where)
    weights = folder / WEIGHTS
    packed = packing.read(weights)
    model = build(manifest.architecture, where)
    try:
        model = packing.unpack(packed, model).eval()
        example = torch.zeros(1, *task.input_shape)
        model = merged(model, example)
        recorded = trace(model, example)
        if missing := sorted(without_values(recorded)):
            raise InputError(f"the file lacks {len(missing)} tensors that the model uses, the first is {missing[0]!r}")
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    return Opened(folder, manifest, task, model, example, recorded)


def evaluate(
    folder: str | Path,
    data: str | Path | None = None,
    progress: Progress | None = None,
    *,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
) -> Report:
    """Unpacks a submission, counts what it costs, measures how good it is, and compares that with its claims.

    `data` is the folder with data sets. `cross_check` asks fvcore and FlopCounterMode, too. Raises InputError where
    the submission is wrong.
    """
    priced = formulas(ruleset)
    opened = open_submission(folder)
    counted = opened.account(ruleset)
    claimed = _claimed(opened.manifest)
    quality = measure(opened.model, opened.task, None if data is None else Path(data), claimed, progress)
    other = crosscheck.cross_check(opened.model, opened.example, opened.trace, priced) if cross_check else None
    return opened.report(counted, quality, ruleset, other)


def costs(folder: str | Path, ruleset: str = DEFAULT) -> Report:
    """The report on a submission whose quality is not measured. Raises InputError where the submission is wrong."""
    opened = open_submission(folder)
    quality = not_measured(opened.task, _claimed(opened.manifest), NOT_ASKED)
    return opened.report(opened.account(ruleset), quality, ruleset, None)


def score(
    model: nn.Module,
    example_input: Tensor,
    task: str | None = None,
    *,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
) -> Report:
    """What any module costs for one example, and its score relative to the baseline of `task` (None: no score).

    Batch norm is merged first where that is exact; the module itself is left alone. Quality is not measured.
    """
    known = None if task is None else plugins.lookup("task", task)
    priced = formulas(ruleset)
    name, model = type(model).__name__, merged(model, example_input)
    recorded = trace(model, example_input)
    counted = account(recorded, priced)
    quality = None if known is None else not_measured(known, None, NOT_ASKED)
    other = crosscheck.cross_check(model, example_input, recorded, priced) if cross_check else None
    return _report(name, known, recorded, counted, quality, Claims(), "", ruleset, other)


def formulas(ruleset: str = DEFAULT) -> Mapping[str, Formula]:
    """The cost formulas of a ruleset, plugins' among them. Raises InputError where there is no such ruleset."""
    return {**plugins.formulas(), **ruleset_of(ruleset).overrides}


def _lookup_task(name: str, where: Path) -> Task:
    try:
        task: Task = plugins.lookup("task", name)
    except InputError as error:
        raise InputError(f"{where}: field 'task': {error}") from error
    return task


def _claimed(manifest: Manifest) -> float | None:
    return None if manifest.claims.quality is None else float(manifest.claims.quality)


def _report(
    name: str,
    task: Task | None,
    trace: Trace,
    counted: Account,
    quality: Quality | None,
    claims: Claims,
    note: str,
    ruleset: str,
    cross_check: CrossCheck | None,
) -> Report:
    total = None if task is None else score_of(counted, task.storage, task.math)
    return Report(
        submission=name,
        task=task.name if task else None,
        storage=counted.storage,
        math=counted.math,
        score=total,
        activation=activation_peak(trace, bit_widths(trace)),
        what_if=what_if(counted, task.math if task else None, total.storage if total else None),
        quality=quality,
        claims=_check(claims, counted, total, quality),
        layers=counted.layers,
        modules=counted.modules,
        ruleset=ruleset,
        freebie=counted.freebie,
        coverage=counted.coverage,
        cross_check=cross_check,
        environment=_environment(),
        provenance=note,
        warnings=(),
    )


def _check(claims: Claims, counted: Account, total: Score | None, quality: Quality | None) -> tuple[Claim, ...]:
    """Every claim that was made, beside its measurement."""
    costs: Sequence[tuple[str, Decimal | None, float | None]] = (
        ("storage", claims.storage, counted.storage.params32),
        ("math", claims.math, counted.math.ops32),
        ("score", claims.score, total.total if total else None),
    )
    checked = [
        Claim(
            name=name,
            claimed=float(claimed),
            measured=measured,
            holds=None if measured is None else Decimal(str(measured)) <= claimed * COST_TOLERANCE,
        )
        for name, claimed, measured in costs
        if claimed is not None
    ]
    if claims.quality is not None:
        measured = quality.measured if quality else None
        digit = Decimal(1).scaleb(int(claims.quality.as_tuple().exponent))
        holds = None if measured is None else Decimal(str(measured)) >= claims.quality - digit
        checked.append(Claim(name="quality", claimed=float(claims.quality), measured=measured, holds=holds))
    return tuple(checked)


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in ("micronet-eval", "torch", "torchvision")}
    others = {d.project_name: d.version for _, d in plugins.manager().list_plugin_distinfo()}
    return {"python": platform.python_version(), **packages, **others, "device": "cpu"}


__all__ = ["Claim", "Report", "evaluate", "score"]
