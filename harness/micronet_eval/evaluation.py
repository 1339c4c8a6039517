"""From a submission's folder, or any module, to a Report."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal
from functools import cache
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import nn

from micronet_eval import crosscheck, plugins, proof
from micronet_eval.accumulators import WhatIf, what_if
from micronet_eval.activation import Activation, activation_peak
from micronet_eval.batches import check_batches
from micronet_eval.bounds import bounded
from micronet_eval.conditional import exact_shares, paths_of
from micronet_eval.costs import SCALE_OP
from micronet_eval.crosscheck import CrossCheck
from micronet_eval.errors import InputError, SubmissionError, printable
from micronet_eval.explaining import Explanation, explanations
from micronet_eval.garbage import uncollected
from micronet_eval.isolation import AUTO, NO_CODE, REMARKS, Isolation, Level
from micronet_eval.merge import merged, merged_trace
from micronet_eval.opening import Opened, formulas, open_submission
from micronet_eval.paths import mean_account
from micronet_eval.quality import BATCH, Progress, Quality, measure, not_measured
from micronet_eval.rulesets import DEFAULT
from micronet_eval.rulesets import ruleset as ruleset_of
from micronet_eval.scoring import Account, Coverage, Layer, Math, Module, Score, Storage, by_module
from micronet_eval.scoring import score as score_of
from micronet_eval.storage import narrows
from micronet_eval.submission import WEIGHTS, Claims
from micronet_eval.tables import frame
from micronet_eval.task import METRICS, Task
from micronet_eval.trace import SEED, Example, Trace, trace

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


def _all_hold(verdicts: Collection[bool | None]) -> bool | None:
    """False where one fails, else None where one is not known."""
    return False if False in verdicts else None if None in verdicts else True


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
    """All that an evaluation found; its JSON is described by docs/report.schema.json.

    `weights_sha256` is over the values that were counted, and the same before and after they were measured; empty where
    nothing was.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
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
    paths: tuple[PathCost, ...]
    layers: tuple[Layer, ...]
    free_layers: tuple[Layer, ...] = ()
    modules: tuple[Module, ...]
    ruleset: str
    freebie: bool
    coverage: Coverage
    cross_check: CrossCheck | None
    isolation: Level = "none"
    weights_sha256: str = ""
    environment: dict[str, str]
    provenance: str
    warnings: tuple[str, ...]
    _counted: Account | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """By the figures; what they were counted from is not compared."""
        return isinstance(other, Report) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def passed(self) -> bool | None:
        """Whether the threshold and all claims hold: False where one fails, None where one was not measured."""
        return _all_hold([self.quality.passed if self.quality else None, *(claim.holds for claim in self.claims)])

    @property
    def claims_held(self) -> bool | None:
        """Whether all claims hold: False where one fails, None where one was not measured, or there is none."""
        return _all_hold([claim.holds for claim in self.claims] or [None])

    def explain(self, module: str = "") -> tuple[Explanation, ...]:
        """The formula of every operation of a module (of all, without one), with its numbers.

        Raises InputError where there is no such module, or where the report was read from a file.
        """
        if self._counted is None:
            raise InputError(
                f"the report on {self.submission} was read from a file; evaluate again to have it explained"
            )
        return explanations(self._counted, module, self.ruleset)

    def to_frame(self) -> Any:
        """The priced operations as a pandas DataFrame, a row each. Raises InputError where pandas is not installed."""
        return frame([asdict(layer) for layer in self.layers])

    def __repr__(self) -> str:
        total = None if self.score is None else f"{self.score.total:.6g}"
        return f"<Report on {self.submission}: task {self.task}, score {total}>"

    def _repr_html_(self) -> str:
        """The main figures, as notebooks show them."""
        quality = (
            ""
            if self.quality is None or self.quality.measured is None
            else METRICS[self.quality.metric].show(self.quality.measured)
        )
        figures = {
            "score": None if self.score is None else f"{self.score.total:.6g}",
            "storage": f"{self.storage.params32:,.0f} 32-bit parameters",
            "math": f"{self.math.ops32:,.0f} 32-bit operations",
            "MACs": f"{self.math.macs:,.0f}",
            "quality": quality,
        }
        rows = "".join(f"<tr><th>{name}</th><td>{escape(told)}</td></tr>" for name, told in figures.items() if told)
        about = escape(" · ".join(filter(None, (self.submission, self.task, self.ruleset))))
        return f"<table><caption>{about}</caption>{rows}</table>"

    def to_json(self) -> str:
        """The report as JSON, keys as in docs/report.schema.json."""
        return self.model_dump_json(by_alias=True, indent=2)


def evaluate(
    folder: str | Path,
    data: str | Path | None = None,
    progress: Progress | None = None,
    *,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
    isolation: Isolation = AUTO,
) -> Report:
    """Unpacks a submission, counts what it costs, measures how good it is, and compares that with its claims.

    `data` is the folder with data sets. `cross_check` asks fvcore and FlopCounterMode, too. `isolation`
    says how the submission's own code is run, where it has any. Raises InputError where the submission is wrong,
    SubmissionError where its code fails.
    """
    ruleset_of(ruleset)  # an unknown one is told before anything is opened
    root = None if data is None else Path(data)
    with bounded(isolation.limits.evaluation, str(folder)):
        return measured(open_submission(folder, root, isolation), root, progress, ruleset, cross_check)


def measured(
    opened: Opened,
    data: Path | None = None,
    progress: Progress | None = None,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
) -> Report:
    """As `evaluate`, of a submission that is open already."""
    counted = opened.account(ruleset)  # what cannot be counted is told before anything is measured
    weights = proof.counted(opened.trace)
    try:
        strange = opened.isolation != NO_CODE
        quality = measure(opened.model, opened.task, data, opened.claimed_quality, progress, apart=strange)
        if strange:
            examples = quality.examples or BATCH  # where nothing was measured somebody else may
            sizes = sorted({min(BATCH, examples), examples % BATCH} - {0, 1})
            check_batches(opened.model, opened.task.input_shape, opened.trace, sizes)
        if other := proof.changed(opened.model, weights):
            raise InputError(
                f"the model changes {other[0]!r} while it runs; what is counted has to be what is measured"
            )
    except InputError as error:
        raise InputError(f"{opened.folder / WEIGHTS}: {error}") from error
    except (RuntimeError, ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        if "allocate memory" in str(error):
            raise
        if opened.isolation == NO_CODE:
            raise InputError(f"{opened.folder / WEIGHTS}: the model fails on the test data: {error}") from error
        raise SubmissionError(f"{opened.folder}: the model of model.py fails on the test data: {error}") from error
    report = _report_on(opened, counted, quality, ruleset, cross_check)
    return report.model_copy(update={"weights_sha256": proof.whole(weights.items())})


def costs(folder: str | Path, ruleset: str = DEFAULT, isolation: Isolation = AUTO) -> Report:
    """The report on a submission whose quality is not measured. Raises InputError where the submission is wrong."""
    return report_on(open_submission(folder, isolation=isolation), ruleset)


def report_on(opened: Opened, ruleset: str = DEFAULT) -> Report:
    """As `costs`, of a submission that is open already."""
    quality = not_measured(opened.task, opened.claimed_quality, NOT_ASKED)
    return _report_on(opened, opened.account(ruleset), quality, ruleset, False)


def _report_on(opened: Opened, counted: Account, quality: Quality, ruleset: str, cross_check: bool) -> Report:
    if counted.paths:
        counted = opened.account(ruleset, quality)
    name, claims = printable(opened.folder.resolve().name), opened.manifest.claims
    report = _report(name, opened.task, opened.trace, counted, quality, claims, ruleset)
    other = None
    if cross_check:
        recorded = opened.trace if opened.steps is None else trace(opened.model, opened.example)
        other = crosscheck.cross_check(opened.model, opened.example, recorded, formulas(ruleset))
    warnings = (*report.warnings, *filter(None, [opened.remark, REMARKS.get(opened.isolation)]))
    note = opened.manifest.provenance.note
    found = {"provenance": note, "cross_check": other, "warnings": warnings, "isolation": opened.isolation}
    return report.model_copy(update=found)


def score(
    model: nn.Module,
    example_input: Example,
    task: str | None = None,
    shares: Mapping[str, float] | None = None,
    *,
    ruleset: str = DEFAULT,
    cross_check: bool = False,
) -> Report:
    """What any module costs for one example, and its score relative to the baseline of `task` (None: no score).

    Batch norm is merged first where that is exact; the module itself is left alone. Quality is not measured. A
    conditional model needs the `shares` of the examples that take each path, as {"exit": 0.3, "full": 0.7}.
    """
    known = None if task is None else plugins.lookup("task", task)
    priced = formulas(ruleset)
    paths = paths_of(model)
    exact = exact_shares(paths if any(paths) else (), shares or {})
    if any(paths) and not exact:
        raise InputError(
            f"give the share of the examples on each path (`shares`, or --path NAME=SHARE): {', '.join(paths)}"
        )
    quality = None if known is None else not_measured(known, None, NOT_ASKED)
    with uncollected():
        recorded = merged_trace(model, example_input)
        counted = mean_account(recorded, priced, exact)
        report = _report(type(model).__name__, known, recorded, counted, quality, Claims(), ruleset)
    if not cross_check:
        return report
    other = crosscheck.cross_check(merged(model, example_input), example_input, recorded, priced)
    return report.model_copy(update={"cross_check": other})


def _report(
    name: str,
    task: Task | None,
    recorded: Trace,
    counted: Account,
    quality: Quality | None,
    claims: Claims,
    ruleset: str,
) -> Report:
    total = None if task is None else score_of(counted, task.storage, task.math)
    taken = {p.op.path for p in counted.operations if p.share}
    peaks = [activation_peak(part, counted.widths) for path, part in recorded.by_path().items() if path in taken]
    report = Report(
        submission=name,
        task=task.name if task else None,
        storage=counted.storage,
        math=counted.math,
        score=total,
        activation=max(peaks, key=lambda peak: peak.peak_bits, default=Activation(0, "input")),
        what_if=what_if(counted, task.math if task else None, total.storage if total else None),
        quality=quality,
        claims=_check(claims, counted, total, quality),
        paths=_paths(counted, measured=quality is not None and bool(quality.taken)),
        layers=counted.layers,
        free_layers=counted.free_layers,
        modules=by_module(counted, formulas(ruleset)),
        ruleset=ruleset,
        freebie=counted.freebie,
        coverage=counted.coverage,
        cross_check=None,
        environment=_environment(),
        provenance="",
        warnings=(*_not_finite(counted), *_wide(counted)),
    )
    report._counted = counted
    return report


def _not_finite(counted: Account) -> tuple[str, ...]:
    """Says where weights are no numbers: they are counted as any others, but no file may hold them."""
    bad = [s.name for s in counted.stored if not s.in_code and not s.value.seen.finite]
    if not bad:
        return ()
    several = f"{len(bad)} tensors hold" if len(bad) > 1 else "1 tensor holds"
    return (f"{several} NaN or infinity, the first is {bad[0]!r}; the model cannot be packed",)


def _wide(counted: Account) -> tuple[str, ...]:
    """Says where a model with quantized activations still multiplies at 32 bit."""
    quantized = any(narrows(op) for op in counted.trace.ops)
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
        lower = quality is not None and METRICS[quality.metric].lower_is_better
        digit = min(Decimal(1).scaleb(int(claims.quality.as_tuple().exponent)), Decimal(1 if lower else "0.1"))
        holds = None
        if measured is not None:
            exact = Decimal(str(measured))
            holds = exact <= claims.quality + digit if lower else exact >= claims.quality - digit
        checked.append(Claim(name="quality", claimed=float(claims.quality), measured=measured, holds=holds))
    return tuple(checked)


_version = cache(version)


def _environment() -> dict[str, str]:
    ours = {name: _version(name) for name in ("micronet-eval", "torch", "torchvision")}
    others = dict(plugins.packages().values())
    return {"python": platform.python_version(), **ours, **others, "device": "cpu", "seed": str(SEED)}


__all__ = ["Claim", "Report", "costs", "evaluate", "open_submission", "score"]
