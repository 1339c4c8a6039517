"""A submission as a check in continuous integration: limits, claims and the threshold, as JUnit XML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from micronet_eval.errors import InputError, printable
from micronet_eval.evaluation import Report, evaluate
from micronet_eval.submission import MANIFEST, read_manifest, task_of
from micronet_eval.tables import in_markdown
from micronet_eval.task import METRICS


@dataclass(frozen=True)
class Check:
    """One thing that is checked: whether it holds (None: it could not be measured), and the figures."""

    name: str
    holds: bool | None
    figures: str


def check(
    folder: str | Path, max_score: float | None = None, min_quality: float | None = None, data: str | Path | None = None
) -> list[Check]:
    """Evaluates a submission and checks it; as `checks`. Raises what `check_limits` and `evaluate` raise."""
    check_limits(folder, max_score, min_quality)
    return checks(evaluate(folder, data), max_score, min_quality)


def check_limits(folder: str | Path, max_score: float | None = None, min_quality: float | None = None) -> None:
    """Raises InputError where a limit can be none for a submission: before its evaluation, which may take hours."""
    for option, limit in (("--max-score", max_score), ("--min-quality", min_quality)):
        if limit is not None and not math.isfinite(limit):
            raise InputError(f"{option} {limit:g} is no limit; write a finite number")
    if max_score is not None and max_score < 0:
        raise InputError(f"--max-score {max_score:g} is below every score; write a positive number")
    if min_quality is not None and not 0 <= min_quality <= 1:
        task = task_of(read_manifest(Path(folder)), Path(folder) / MANIFEST)
        if not METRICS[task.metric].lower_is_better:
            raise InputError(f"--min-quality {min_quality:g} is no share; write for example 0.94 for 94 %")


def checks(report: Report, max_score: float | None = None, min_quality: float | None = None) -> list[Check]:
    """The limits that are given, the task's threshold, and every claim.

    A limit that cannot be measured fails: it was asked for. Of a metric where lower is better, `min_quality` is the
    highest value.
    """
    found: list[Check] = []
    total = report.score.total if report.score else None
    if max_score is not None:
        told = "no score" if total is None else f"{total:.6g}"
        found.append(Check("score", total is not None and total <= max_score, f"{told}, at most {max_score:.6g}"))
    quality = report.quality
    if quality is not None:
        metric = METRICS[quality.metric]
        measured = "not measured" if quality.measured is None else metric.show(quality.measured)
        if min_quality is not None:
            sign = -1 if metric.lower_is_better else 1
            enough = quality.measured is not None and sign * quality.measured >= sign * min_quality
            found.append(Check("quality", enough, f"{measured} {metric.sign} {metric.show(min_quality)}"))
        threshold = f"{measured} {metric.sign} {metric.show(quality.threshold)}"
        found.append(Check(f"threshold of {report.task}", quality.passed, threshold))
    for claim in report.claims:
        told = "not measured" if claim.measured is None else f"{claim.measured:.6g}"
        found.append(Check(f"claimed {claim.name}", claim.holds, f"{told}, claimed {claim.claimed:.6g}"))
    return found


def to_junit(report: Report, found: Sequence[Check]) -> str:
    """JUnit XML: a test case for each check."""
    kinds: dict[bool | None, str] = {True: "", False: "failure", None: "skipped"}
    return _junit(report.submission, [(c.name, kinds[c.holds], c.figures) for c in found])


def error_junit(submission: str, error: Exception) -> str:
    """JUnit XML of a submission that could not be evaluated: one test case, with the error."""
    return _junit(submission, [("evaluation", "error", printable(str(error)))])


def error_summary(submission: str, error: Exception) -> str:
    """Markdown, as `to_summary`, of a submission that could not be evaluated."""
    return f"### {in_markdown(submission)}: not evaluated\n\n{in_markdown(printable(str(error)))}\n"


def _junit(submission: str, cases: Sequence[tuple[str, str, str]]) -> str:
    """A suite of test cases: each a name, what is wrong (nothing: it passed), and a message."""
    wrong = [kind for _, kind, _ in cases]
    counts = {"tests": len(cases), "failures": wrong.count("failure"), "skipped": wrong.count("skipped"),
              "errors": wrong.count("error")}  # fmt: skip
    suite = ElementTree.Element(
        "testsuite", {"name": f"micronet-eval {submission}", **{name: str(n) for name, n in counts.items()}}
    )
    for name, kind, message in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=submission, name=name)
        if kind:
            ElementTree.SubElement(case, kind, message=message)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_summary(report: Report, found: Sequence[Check]) -> str:
    """Markdown for a comment on a pull request."""
    total = f"score {report.score.total:.6g}" if report.score else "no score"
    fails = any(check.holds is False for check in found)
    lines = [
        f"### {in_markdown(report.submission)}: {'failed' if fails else 'passed'}, {total}",
        "",
        "| check | | figures |",
        "|---|---|---|",
    ]
    verdicts: dict[bool | None, str] = {True: "holds", False: "**fails**", None: "not measured"}
    lines += [f"| {in_markdown(c.name)} | {verdicts[c.holds]} | {in_markdown(c.figures)} |" for c in found]
    storage = f"{report.storage.params32:,.0f} 32-bit parameters, {report.math.ops32:,.0f} 32-bit operations"
    quality = report.quality
    reasons = [] if quality is None or quality.measured is not None else [f"quality not measured: {quality.reason}"]
    below = map(in_markdown, (*reasons, *report.warnings))
    return "\n".join([*lines, "", f"{storage}; rules {report.ruleset}.", *below, ""])
