"""From a submission's folder, or any module, to a Report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from micronet_eval import packing, plugins
from micronet_eval.conditional import exact_shares, paths_of
from micronet_eval.costs import SCALE_OP
from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.paths import mean_account
from micronet_eval.quality import Progress, Quality, measure, not_measured
from micronet_eval.scoring import RULESET, Account, Coverage, Layer, Math, Score, Storage
from micronet_eval.scoring import score as score_of
from micronet_eval.storage import FREEBIE_BITS, without_values
from micronet_eval.submission import MANIFEST, WEIGHTS, Claims, build, read_manifest, task_of
from micronet_eval.task import Task
from micronet_eval.trace import Example, trace

COST_TOLERANCE = Decimal("1.01")
"""A claimed cost holds when the measurement is at most 1 % worse."""


class Claim(BaseModel):
    """A claim beside the measurement. `holds` is null where nothing was measured."""

    model_config = ConfigDict(frozen=True)
    name: str
    claimed: float
    measured: float | None
    holds: bool | None


class PathCost(BaseModel):
    """What an example costs that takes one path of a conditional model, and the share of the examples that do.

    `measured` says whether the share was measured on the test data, or is only claimed.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    share: float
    measured: bool
    mults: int | float
    adds: int | float
    ops32: float


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
    paths: tuple[PathCost, ...]
    layers: tuple[Layer, ...]
    free_layers: tuple[Layer, ...] = ()
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
    task = task_of(manifest, where)
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
        counted = mean_account(recorded, plugins.formulas())
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    try:
        shares = exact_shares(tuple(counted.paths), manifest.paths)
    except InputError as error:
        raise InputError(f"{where}: field 'paths': {error}") from error
    claimed = None if manifest.claims.quality is None else float(manifest.claims.quality)
    quality = measure(model, task, None if data is None else Path(data), claimed, progress)
    if counted.paths:
        shares = {path: Fraction(count, quality.examples) for path, count in quality.taken.items()} or shares
        if not shares:
            raise InputError(
                f"{where}: the share of the test set that takes each path cannot be measured ({quality.reason}); "
                f"claim it in a table [paths] with: {', '.join(counted.paths)}"
            )
        counted = mean_account(recorded, plugins.formulas(), shares)
    counted = replace(counted, storage=replace(counted.storage, file_bytes=weights.stat().st_size))
    return _report(folder.resolve().name, task, counted, quality, manifest.claims, manifest.provenance.note)


def score(
    model: nn.Module, example_input: Example, task: str | None = None, shares: Mapping[str, float] | None = None
) -> Report:
    """What any module costs for one example, and its score relative to the baseline of `task` (None: no score).

    Batch norm is merged first where that is exact; the module itself is left alone. Quality is not measured. A
    conditional model needs the `shares` of the examples that take each path, as {"exit": 0.3, "full": 0.7}.
    """
    known = None if task is None else plugins.lookup("task", task)
    paths = paths_of(model)
    exact = exact_shares(paths if any(paths) else (), shares or {})
    if any(paths) and not exact:
        raise InputError(
            f"give the share of the examples on each path (`shares`, or --path NAME=SHARE): {', '.join(paths)}"
        )
    counted = mean_account(trace(merged(model, example_input), example_input), plugins.formulas(), exact)
    quality = None if known is None else not_measured(known, None, "only the cost was asked for")
    return _report(type(model).__name__, known, counted, quality, Claims(), "")


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
        paths=_paths(counted, measured=quality is not None and bool(quality.taken)),
        layers=counted.layers,
        free_layers=counted.free_layers,
        ruleset=RULESET,
        freebie=counted.freebie,
        coverage=counted.coverage,
        environment=_environment(),
        provenance=note,
        warnings=_wide(counted),
    )


def _wide(counted: Account) -> tuple[str, ...]:
    """Says where a model with quantized activations still multiplies at 32 bit."""
    quantized = any(0 < layer.input_bits < FREEBIE_BITS for layer in counted.layers)
    wide = [x for x in counted.layers if x.mults and x.op != SCALE_OP and max(x.input_bits, x.weight_bits) >= 32]
    if not quantized or not wide:
        return ()
    first = f"{wide[0].op.partition('.')[2]} in {wide[0].module!r}"
    several = f"{len(wide)} operations multiply" if len(wide) > 1 else "1 operation multiplies"
    return (f"{several} at 32 bit although activations are quantized, the first is {first}",)


def _paths(counted: Account, measured: bool) -> tuple[PathCost, ...]:
    return tuple(
        PathCost(
            name=path,
            share=float(counted.shares[path]),
            measured=measured,
            mults=math.mults,
            adds=math.adds,
            ops32=math.ops32,
        )
        for path, math in counted.paths.items()
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
