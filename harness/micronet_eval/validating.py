"""All that can be wrong with a submission, found without a network: each finding with its rule, its place and its mend.

An evaluation stops at the first mistake. Here every part is looked at, as far as the parts before it allow.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from micronet_eval import packing
from micronet_eval.bounds import bounded
from micronet_eval.errors import InputError, SubmissionError, message, printable
from micronet_eval.evaluation import Report, measured
from micronet_eval.files import LARGEST
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.kept import KEPT
from micronet_eval.opening import Opened, open_submission
from micronet_eval.recipe import Recipe
from micronet_eval.submission import (
    MANIFEST,
    RECIPE,
    WEIGHTS,
    Manifest,
    faults_of,
    read_table,
    read_toml,
    task_of,
)
from micronet_eval.task import METRICS

CODE = "model.py"
PARTS = (MANIFEST, WEIGHTS, RECIPE, CODE)
MOST_FILES = 100
MOST_NAMES = 10

RULES: dict[str, tuple[str, str]] = {
    "folder.exists": ("a submission is a folder", "name a folder with submission.toml and weights.safetensors"),
    "folder.files": ("it holds ordinary files, few and not too large", "remove what is no part of the submission"),
    "folder.finished": ("no run is unfinished in it", "end it by `micronet-eval compress --resume`, or remove .kept"),
    "manifest.toml": ("submission.toml is TOML of at most 1 MiB", "write it as docs/format.md shows"),
    "manifest.field": ("its fields are those that docs/format.md names", "correct the field"),
    "manifest.letters": ("a word has letters of one script", "write it in one script, so that nobody mistakes it"),
    "manifest.task": ("its task is registered", "name one of `micronet-eval tasks`"),
    "recipe.toml": ("recipe.toml, if it is there, can be run", "mend the recipe, or remove it"),
    "weights.file": (
        "weights.safetensors is whole and unchanged",
        "write it anew by `micronet-eval compress` or `micronet-eval import`",
    ),
    "model.fits": ("architecture, structure and weights fit each other", "pack the weights of this architecture"),
    "code.runs": ("model.py runs, within its limits", "mend model.py, or raise --limits"),
    "model.counts": ("every operation has a price", "register a cost formula for it"),
    "model.measures": ("the model answers the test data as it was counted", "mend the model"),
    "score.claims": ("each claimed figure holds", "claim what is measured"),
    "score.threshold": ("quality reaches the task's threshold, in whole examples", "train on, or compress less"),
    "score.warnings": ("the report has no warnings", "see the warning"),
}
"""Id of a rule -> what it says, and the mend that is told where the finding has none of its own."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what to do. A `warning` does not make the submission invalid."""

    rule: str
    place: str
    told: str
    mend: str
    kind: Literal["error", "warning"] = "error"


def validate(folder: str | Path, data: str | Path | None = None, isolation: Isolation = AUTO) -> list[Finding]:
    """Everything that is wrong with a submission; nothing where it is valid. Quality is measured where the data is."""
    found: list[Finding] = []
    place = Path(folder)
    try:
        with bounded(isolation.limits.evaluation, str(place)):
            found.extend(_findings(place, None if data is None else Path(data), isolation))
    except SubmissionError as error:
        found.append(_from(error, "model.measures", place))
    except OSError as error:
        found.append(_found("folder.exists", place, f"it cannot be read: {error.strerror}"))
    return found


def _findings(folder: Path, data: Path | None, isolation: Isolation) -> Iterator[Finding]:
    if not folder.is_dir():
        yield _found("folder.exists", folder, "it is no folder")
        return
    several = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if several and not (folder / MANIFEST).exists():
        mend = f"name one of them: {', '.join(several[:MOST_NAMES])}{', ...' if several[MOST_NAMES:] else ''}"
        yield _found("folder.exists", folder, "it holds submissions, and is none", mend=mend)
        return
    yield from _files(folder)
    odd = {name for name in PARTS if _oddity(folder / name)}  # of these _files has told
    if RECIPE not in odd:
        yield from _recipe(folder)
    manifest, wrong = _manifest(folder) if MANIFEST not in odd else (None, [])
    yield from wrong
    weights = folder / WEIGHTS
    packed = list(_tried("weights.file", weights, lambda: packing.read(weights))) if WEIGHTS not in odd else []
    yield from packed
    if manifest is None or packed or odd - {RECIPE}:
        return
    opened: Opened | None = None
    try:
        opened = open_submission(folder, data, isolation)
    except InputError as error:
        yield _misfit(error, "model.fits", folder)
    except SubmissionError as error:
        yield _from(error, "code.runs" if manifest.architecture.file else "model.fits", folder / CODE)
    if opened is None:
        return
    priced = list(_tried("model.counts", folder / WEIGHTS, opened.account))
    yield from priced
    if priced:
        return
    try:
        yield from _report(measured(opened, data), folder)
    except (InputError, SubmissionError) as error:
        yield _misfit(error, "model.measures", folder)


def _files(folder: Path) -> Iterator[Finding]:
    entries = sorted(folder.iterdir())
    if len(entries) > MOST_FILES:
        yield _found("folder.files", folder, f"it holds {len(entries):,} files; at most {MOST_FILES} make sense")
    for path in entries[:MOST_FILES]:
        state = path.lstat()
        if path.name == KEPT:
            yield _found("folder.finished", path, "a run of `compress` was not ended here", "warning")
        elif told := _oddity(path):
            mend = "put the file itself there" if path.name in PARTS else ""
            yield _found("folder.files", path, told, mend=mend)
        elif state.st_size > LARGEST:
            yield _found("folder.files", path, f"it has {state.st_size:,} bytes")
        elif path.name not in PARTS:
            yield _found("folder.files", path, "nothing reads it", "warning")


def _oddity(path: Path) -> str:
    """Why a path is no file of a submission's own; nothing where it is one, or is missing."""
    if path.is_symlink():
        return "it is a link"
    return "it is no ordinary file" if path.exists() and not path.is_file() else ""


def _recipe(folder: Path) -> Iterator[Finding]:
    if (folder / RECIPE).is_file():
        for finding in _tried("recipe.toml", folder / RECIPE, lambda: read_toml(folder / RECIPE, Recipe)):
            yield Finding(finding.rule, finding.place, finding.told, finding.mend, "warning")


def _manifest(folder: Path) -> tuple[Manifest | None, list[Finding]]:
    path = folder / MANIFEST
    if wrong := list(_tried("manifest.toml", path, lambda: read_table(path))):
        return None, wrong
    try:
        manifest = read_toml(path, Manifest)
    except InputError as error:
        faults = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
        return None, [_found("manifest.field", f"{path}: {field}", told) for field, told in map(faults_of, faults)]
    wrong = list(_tried("manifest.task", path, lambda: task_of(manifest, path)))
    for word in " ".join((manifest.name, *manifest.authors)).split():
        scripts = {unicodedata.name(letter, "?").partition(" ")[0] for letter in word if letter.isalpha()}
        if len(scripts & {"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE", "FULLWIDTH"}) > 1:
            told = f"{word!a} mixes {' and '.join(sorted(scripts)).lower()} letters"
            wrong.append(_found("manifest.letters", path, told, "warning"))
    return (None if any(finding.kind == "error" for finding in wrong) else manifest), wrong


def _report(report: Report, folder: Path) -> Iterator[Finding]:
    for claim in report.claims:
        if claim.holds is False and claim.measured is not None:
            told = f"{claim.measured:.10g} is measured, {claim.claimed:.10g} claimed"
            yield _found("score.claims", f"{folder / MANIFEST}: claims.{claim.name}", told)
    quality = report.quality
    if quality is not None and quality.passed is False:
        metric = METRICS[quality.metric]
        asked = f"{metric.sign} {metric.show(quality.threshold)}"
        if not metric.lower_is_better:
            least = ceil(Fraction(str(quality.threshold)) * quality.examples)
            asked = f"at least {least:,} of {quality.examples:,}"
        yield _found(
            "score.threshold", folder, f"{quality.reason}; {asked} {'is' if metric.lower_is_better else 'are'} asked"
        )
    for warning in report.warnings:
        yield _found("score.warnings", folder, warning, "warning")


def _tried(rule: str, place: Path, look: Callable[[], object]) -> Iterator[Finding]:
    try:
        look()
    except (InputError, SubmissionError) as error:
        yield _from(error, rule, place)


def _misfit(error: Exception, rule: str, folder: Path) -> Finding:
    """The finding of an error that only the whole submission shows: of what it names, else of the weights."""
    if named := re.match(rf"({re.escape(str(folder / MANIFEST))}: field '[^']*'): ", str(error)):
        return _from(error, "manifest.field", named[1])
    if str(error).startswith(f"{folder / CODE} "):
        return _from(error, "code.runs", folder / CODE)
    return _from(error, rule, folder / WEIGHTS)


def _from(error: Exception, rule: str, place: Path | str) -> Finding:
    """The finding that an error tells; its message often begins with the place, and ends with the mend."""
    told = str(error).removeprefix(f"{place}: ").removeprefix(f"{place} ")
    what, semicolon, mend = told.rpartition("; ")
    return _found(rule, place, what, mend=mend) if semicolon else _found(rule, place, told)


def _found(
    rule: str, place: Path | str, told: str, kind: Literal["error", "warning"] = "error", mend: str = ""
) -> Finding:
    return Finding(rule, printable(str(place)), message(told), message(mend) or RULES[rule][1], kind)
