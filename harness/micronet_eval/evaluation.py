"""From a submission's folder, or any module, to a Report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from micronet_eval import packing, plugins
from micronet_eval.errors import InputError
from micronet_eval.language import cutoffs_of, example_input, per_token, shares_of_clusters
from micronet_eval.merge import merged
from micronet_eval.quality import Progress, Quality, measure, not_measured
from micronet_eval.scoring import RULESET, Account, Coverage, Layer, Math, Score, Storage, account
from micronet_eval.scoring import score as score_of
from micronet_eval.storage import without_values
from micronet_eval.submission import MANIFEST, WEIGHTS, Claims, Manifest, build, read_manifest
from micronet_eval.task import METRICS, Task
from micronet_eval.trace import trace

COST_TOLERANCE = Decimal("1.01")
"""A claimed cost holds when the measurement is at most 1 % worse."""


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
    quality: Quality | None
    claims: tuple[Claim, ...]
    layers: tuple[Layer, ...]
    ruleset: str
    freebie: bool
    coverage: Coverage
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


def evaluate(folder: str | Path, data: str | Path | None = None, progress: Progress | None = None) -> Report:
    """Unpacks a submission, counts what it costs, measures how good it is, and compares that with its claims.

    `data` is the folder with data sets. Raises InputError where the submission is wrong.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    where = folder / MANIFEST
    task: Task = _lookup_task(manifest.task, where)
    root = None if data is None else Path(data)
    weights = folder / WEIGHTS
    packed = packing.read(weights)
    model = build(manifest.architecture, where)
    _check_manifest(manifest, task, model, where)
    try:
        model = packing.unpack(packed, model).eval()
        example = example_input(task, model)
        model = merged(model, example)
        recorded = trace(model, example)
        if missing := sorted(without_values(recorded)):
            raise InputError(f"the file lacks {len(missing)} tensors that the model uses, the first is {missing[0]!r}")
        counted = account(recorded, plugins.formulas())
        remark = ""
        if task.metric == "perplexity":
            frequencies = None if manifest.frequencies is None else manifest.frequencies.shares
            shares, remark = shares_of_clusters(model, task, root, frequencies)
            counted = per_token(model, counted, task.tokens, plugins.formulas(), shares)
        claimed = None if manifest.claims.quality is None else float(manifest.claims.quality)
        quality = measure(model, task, root, claimed, progress)
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    counted = replace(counted, storage=replace(counted.storage, file_bytes=weights.stat().st_size))
    report = _report(folder.resolve().name, task, counted, quality, manifest.claims, manifest.provenance.note)
    return report.model_copy(update={"warnings": (remark,)}) if remark else report


def score(model: nn.Module, example_input: Tensor, task: str | None = None) -> Report:
    """What any module costs for one example, and its score relative to the baseline of `task` (None: no score).

    Batch norm is merged first where that is exact; the module itself is left alone. Quality is not measured.
    """
    known = None if task is None else plugins.lookup("task", task)
    counted = account(trace(merged(model, example_input), example_input), plugins.formulas())
    quality = None if known is None else not_measured(known, None, "only the cost was asked for")
    return _report(type(model).__name__, known, counted, quality, Claims(), "")


def _lookup_task(name: str, where: Path) -> Task:
    try:
        task: Task = plugins.lookup("task", name)
    except InputError as error:
        raise InputError(f"{where}: field 'task': {error}") from error
    return task


def _check_manifest(manifest: Manifest, task: Task, model: nn.Module, where: Path) -> None:
    """What of a manifest only its task and its architecture can judge."""
    if not METRICS[task.metric].lower_is_better and (manifest.claims.quality or 0) > 1:
        raise InputError(f"{where}: field 'claims.quality': Input should be less than or equal to 1, a share")
    clusters = len(cutoffs_of(model)) + 1
    if manifest.frequencies is not None and len(manifest.frequencies.clusters) != clusters:
        given = len(manifest.frequencies.clusters)
        raise InputError(
            f"{where}: field 'frequencies.clusters': {given} shares, but the model has {clusters} clusters"
        )


def _report(
    name: str, task: Task | None, counted: Account, quality: Quality | None, claims: Claims, note: str
) -> Report:
    total = None if task is None else score_of(counted, task.storage, task.math)
    return Report(
        submission=name,
        task=task.name if task else None,
        storage=counted.storage,
        math=counted.math,
        score=total,
        quality=quality,
        claims=_check(claims, counted, total, quality),
        layers=counted.layers,
        ruleset=RULESET,
        freebie=counted.freebie,
        coverage=counted.coverage,
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
        lower = quality is not None and METRICS[quality.metric].lower_is_better
        digit = Decimal(1).scaleb(int(claims.quality.as_tuple().exponent))
        worst = claims.quality + digit if lower else claims.quality - digit
        holds = None
        if measured is not None:
            holds = Decimal(str(measured)) <= worst if lower else Decimal(str(measured)) >= worst
        checked.append(Claim(name="quality", claimed=float(claims.quality), measured=measured, holds=holds))
    return tuple(checked)


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in ("micronet-eval", "torch", "torchvision")}
    others = {d.project_name: d.version for _, d in plugins.manager().list_plugin_distinfo()}
    return {"python": platform.python_version(), **packages, **others, "device": "cpu"}


__all__ = ["Claim", "Report", "evaluate", "score"]
