"""From a submission's folder to a model that is ready to be counted and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from torch import nn

from micronet_eval import packing, plugins
from micronet_eval.bounds import bounded
from micronet_eval.conditional import exact_shares, paths_of
from micronet_eval.costs import Formula
from micronet_eval.errors import InputError, refused
from micronet_eval.files import check_own
from micronet_eval.graph import MOST_NUMBERS, uncounted_numbers
from micronet_eval.isolation import AUTO, NO_CODE, Isolation, Level
from micronet_eval.language import Shares, Steps, cutoffs_of, example_input, per_token, shares_of_clusters, steps
from micronet_eval.merge import merged
from micronet_eval.paths import mean_account
from micronet_eval.quality import Quality
from micronet_eval.rulesets import DEFAULT
from micronet_eval.rulesets import ruleset as ruleset_of
from micronet_eval.scoring import Account
from micronet_eval.storage import without_values
from micronet_eval.submission import MANIFEST, WEIGHTS, Claims, Manifest, build, read_manifest, task_of
from micronet_eval.task import METRICS, Task
from micronet_eval.trace import Example, Trace, trace, trace_each


@dataclass(frozen=True)
class Opened:
    """A submission ready to be counted: the model as it was unpacked, batch norm merged, and its trace.

    `isolation` is the level that the submission's own code was run at, `how` what was asked for.

    Of a language model the trace is that of `steps`, and `clusters` says which share of the tokens lies in each cluster
    of the vocabulary (None: unknown); `remark` tells where that was not measured.
    """

    folder: Path
    manifest: Manifest
    task: Task
    model: nn.Module
    example: Example
    trace: Trace
    isolation: Level = NO_CODE
    how: Isolation = AUTO
    steps: Steps | None = None
    clusters: Shares | None = None
    remark: str = ""

    @property
    def claimed_quality(self) -> float | None:
        return None if self.manifest.claims.quality is None else float(self.manifest.claims.quality)

    def account(self, ruleset: str = DEFAULT, quality: Quality | None = None) -> Account:
        """What it costs. The shares of a conditional model's paths are those of `quality`, or else the claimed ones.

        Without `quality` and claims all examples take the costliest path. Raises InputError where an operation has no
        price, and where `quality` was asked for shares that nobody claims, and does not know them.
        """
        weights = self.folder / WEIGHTS
        prices, shares = formulas(ruleset), self._shares(quality)
        try:
            if self.steps is not None:
                counted = per_token(self.model, self.trace, self.steps, self.task.tokens, prices, self.clusters)
            else:
                counted = mean_account(self.trace, prices, shares)
        except InputError as error:
            raise InputError(f"{weights}: {error}") from error
        return replace(counted, storage=replace(counted.storage, file_bytes=weights.stat().st_size))

    def _shares(self, quality: Quality | None) -> Mapping[str, Fraction]:
        """Which share of the examples takes each path of a conditional model; nothing where there are none."""
        paths = () if self.steps is not None else tuple(path for path in self.trace.by_path() if path)
        shares = exact_shares(paths, self.manifest.paths)
        if quality is not None and quality.taken:
            return {path: Fraction(quality.taken[path], quality.examples) for path in paths}
        if paths and not shares and quality is not None:
            raise InputError(
                f"{self.folder / MANIFEST}: field 'paths': the share of the test set that takes each path cannot be "
                f"measured ({quality.reason}); claim it in a table [paths] with: {', '.join(paths)}"
            )
        return shares


def open_submission(folder: str | Path, data: Path | None = None, isolation: Isolation = AUTO) -> Opened:
    """Unpacks a submission and traces it. Raises InputError where it is wrong, SubmissionError where its code fails.

    `data` is the folder with data sets; a language model needs it for the frequencies of tokens. `isolation` says how
    the submission's own code is run, where it has any.
    """
    folder = Path(folder)
    try:
        with bounded(isolation.limits.evaluation, str(folder)):
            return _open(folder, data, isolation)
    except OSError as error:  # a name that is too long, a disk that fails: one of several folders, no fault of the rest
        raise refused(error, folder) from error


def _open(folder: Path, data: Path | None, isolation: Isolation) -> Opened:
    manifest = read_manifest(folder)
    where = folder / MANIFEST
    task = task_of(manifest, where)
    weights = folder / WEIGHTS
    check_own(weights)
    if manifest.architecture.file is not None and task.metric == "perplexity":
        raise InputError(
            f"{where}: field 'architecture.file': model.py cannot be a language model; register one by name"
        )
    packed = packing.read(weights)
    model = build(manifest.architecture, where, isolation=isolation)
    _check_manifest(manifest, task, model, where)
    try:
        model = packing.unpack(packed, model).eval()
        example = example_input(task, model)
        model = merged(model, example)
        each = steps(model, task.tokens) if task.metric == "perplexity" else None
        recorded = trace(model, example) if each is None else trace_each(model, each.inputs)
        if missing := sorted(without_values(recorded)):
            raise InputError(f"the file lacks {len(missing)} tensors that the model uses, the first is {missing[0]!r}")
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    level = NO_CODE
    if manifest.architecture.file is not None:
        level = isolation.level
        if recorded.rewritten:
            raise InputError(
                f"{where}: field 'architecture.file': the model changes {recorded.rewritten[0]!r} while it runs; "
                "what is counted has to be what is measured"
            )
        if len(hidden := sorted(uncounted_numbers(recorded))) > MOST_NUMBERS:
            raise InputError(
                f"{where}: field 'architecture.file': model.py has {len(hidden)} numbers in its code that are not "
                f"counted, as {hidden[0]:.6g}; at most {MOST_NUMBERS} are possible, make the others parameters"
            )
    opened = Opened(folder, manifest, task, model, example, recorded, level, isolation)
    if each is None:
        return opened
    claimed = None if manifest.frequencies is None else manifest.frequencies.shares
    shares, remark = shares_of_clusters(model, task, data, claimed)
    return replace(opened, steps=each, clusters=shares, remark=remark)


def _check_manifest(manifest: Manifest, task: Task, model: nn.Module, where: Path) -> None:
    """What of a manifest only its task and its architecture can judge."""
    check_claims(manifest.claims, manifest.paths, task, model, f"{where}: field '")
    if manifest.frequencies is not None and task.metric != "perplexity":
        raise InputError(f"{where}: field 'frequencies': the task {task.name} has no text; remove it")
    clusters = len(cutoffs_of(model)) + 1
    if manifest.frequencies is not None and len(manifest.frequencies.clusters) != clusters:
        given = len(manifest.frequencies.clusters)
        raise InputError(
            f"{where}: field 'frequencies.clusters': {given} shares, but the model has {clusters} clusters"
        )


def check_claims(claims: Claims, shares: Mapping[str, Decimal], task: Task, model: nn.Module, before: str) -> None:
    """Raises InputError where no such model can be as is claimed; its message has `before` in front of the field."""
    if not METRICS[task.metric].lower_is_better and (claims.quality or 0) > 1:
        raise InputError(f"{before}claims.quality': Input should be less than or equal to 1, a share")
    try:
        exact_shares(paths_of(model) if shares else (), shares)
    except InputError as error:
        raise InputError(f"{before}paths': {error}") from error


def formulas(ruleset: str = DEFAULT) -> Mapping[str, Formula]:
    """The cost formulas of a ruleset, plugins' among them. Raises InputError where there is no such ruleset."""
    return {**plugins.formulas(), **ruleset_of(ruleset).overrides}
