"""Commands that say what a model costs, and how good it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from micronet_eval.cli.group import BAD_INPUT, FAILED, cli, complain
from micronet_eval.cli.options import (
    as_table_or_json,
    in_any_format,
    isolated,
    with_cross_check,
    with_data,
    with_html,
    with_layers,
    with_ruleset,
)
from micronet_eval.cli.showing import check_shown, live, progress_bar, show, show_modules, show_rows, write_pages
from micronet_eval.errors import InputError, SubmissionError, printable
from micronet_eval.isolation import Isolation

if TYPE_CHECKING:
    from micronet_eval.evaluation import Report


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_layers
@in_any_format
@with_data
@with_ruleset
@with_cross_check
@with_html
@isolated
def evaluate(
    folders: tuple[Path, ...],
    layers: bool,
    style: str,
    data: Path | None,
    ruleset: str,
    cross_check: bool,
    html: Path | None,
    isolation: Isolation,
) -> None:
    """Evaluate submissions: what they store and compute, how good they are, whether their claims hold."""
    from micronet_eval.evaluation import evaluate
    from micronet_eval.submission import names_of

    check_shown(style, layers, cross_check, several=len(folders) > 1)
    outcomes: list[Report | Exception] = []
    names = names_of(folders)
    status = 0
    for name, folder in zip(names, folders, strict=True):
        try:
            with progress_bar(f"measuring {folder.name}") as progress:
                asked: dict[str, Any] = {"ruleset": ruleset, "cross_check": cross_check, "isolation": isolation}
                report = evaluate(folder, data, progress, **asked)
            outcomes.append(report.model_copy(update={"submission": printable(name)}))
        except (InputError, SubmissionError) as error:
            outcomes.append(error)
            status = max(status, complain(error))
    reports = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    if reports:
        show(reports, style, layers, several=len(folders) > 1)
    if html is not None:
        from micronet_eval.ranking import judged

        write_pages(list(map(judged, names, folders, outcomes)), html)
    if any(report.passed is False for report in reports):  # what was not measured does not fail
        status = max(status, FAILED)
    sys.exit(status)


@cli.command()
@click.argument("target")
@click.option(
    "--input",
    "inputs",
    required=True,
    multiple=True,
    help="One example's input: a shape like 1x3x224x224, 1x16:int64 for token ids, NAME=1x16:int64 for an argument "
    "by name. Once for each input.",
)
@click.option("--task", help="Score relative to the baseline of this task.")
@click.option("--path", "shares", multiple=True, help="Share of examples on a path, for example exit=0.3; repeat it.")
@click.option("--depth", type=click.IntRange(min=0), help="Show the cost of each module, to this depth.")
@with_layers
@in_any_format
@with_ruleset
@with_cross_check
def count(
    target: str,
    inputs: tuple[str, ...],
    task: str | None,
    shares: tuple[str, ...],
    depth: int | None,
    layers: bool,
    style: str,
    ruleset: str,
    cross_check: bool,
) -> None:
    """Count what any model costs.

    TARGET is torchvision:NAME, timm:NAME, transformers:CLASS (its default configuration), or package.module:FUNCTION
    that returns a module.
    """
    from micronet_eval.targets import count

    check_shown(style, layers, cross_check, depth=depth)
    asked: dict[str, Any] = {"shares": dict(map(_share, shares)), "ruleset": ruleset, "cross_check": cross_check}
    report = count(target, *inputs, task=task, **asked)
    if depth is None:
        show([report], style, layers)
    else:
        show_modules(report, depth, style)


def _share(text: str) -> tuple[str, float]:
    path, _, share = text.rpartition("=")
    try:
        return path, float(share)
    except ValueError:
        raise InputError(f"--path {text!r} is no path and share; write it like exit=0.3") from None


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--max-score", type=float, help="Fail above this score.")
@click.option("--min-quality", type=float, help="Fail below this quality, a share as 0.94 (a perplexity: above).")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@click.option("--summary", type=click.Path(path_type=Path), help="Append a summary in Markdown to this file.")
@with_ruleset
@with_data
@isolated
def check(
    folder: Path,
    max_score: float | None,
    min_quality: float | None,
    junit: Path | None,
    summary: Path | None,
    ruleset: str,
    data: Path | None,
    isolation: Isolation,
) -> None:
    """Check a submission in continuous integration: limits, claims, the threshold; exit status 1 if one fails."""
    from micronet_eval.checking import check_limits, checks, error_junit, error_summary, to_junit, to_summary
    from micronet_eval.evaluation import evaluate

    try:
        check_limits(folder, max_score, min_quality)
        with progress_bar(f"measuring {folder.name}") as progress:
            report = evaluate(folder, data, progress, ruleset=ruleset, isolation=isolation)
    except (InputError, SubmissionError) as error:  # what shows the files has to show this, too
        name = printable(folder.resolve().name)
        _write_checks(junit, error_junit(name, error), summary, error_summary(name, error))
        raise
    found = checks(report, max_score, min_quality)
    _write_checks(junit, to_junit(report, found), summary, to_summary(report, found))
    from rich.console import Console

    from micronet_eval.report import render_checks

    console = Console()
    console.print(render_checks(report, found, console.width))
    sys.exit(FAILED if any(c.holds is False for c in found) else 0)


def _write_checks(junit: Path | None, cases: str, summary: Path | None, text: str) -> None:
    from micronet_eval.files import write_whole

    path = junit
    try:
        if junit is not None:
            write_whole(junit, cases.encode())
        path = summary
        if summary is not None:
            summary.parent.mkdir(parents=True, exist_ok=True)
            with summary.open("a", encoding="utf-8") as file:  # it may be a link, and others may append to it
                file.write(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; name another file") from error


@cli.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--on", type=click.Path(path_type=Path), help="Recipe that trains the network for the strategies below.")
@click.option(
    "--pruner", "pruners", multiple=True, help="name:option=value,value,option=value; each combination is a row."
)
@click.option(
    "--sparsifier", "sparsifiers", multiple=True, help="The same; every pruner is tried with every sparsifier."
)
@click.option("--quantizer", "quantizers", multiple=True, help="The same, behind merged batch norm.")
@click.option("--fine-tune", help="Training behind each strategy, for example epochs=2,learning_rate=0.001.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Networks to train.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("compare.sqlite"),
    show_default=True,
    help="File that keeps results; what is in there is not run again.",
)
@click.option(
    "--executor",
    default="local",
    show_default=True,
    help="Where to run: here, local, ray, or one of a plugin; with options, for example ray:address=auto,gpus=0.5.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Jobs at a time; by default one a processor.")
@click.option(
    "--sort",
    default="given",
    show_default=True,
    help="Order of the rows, best first: params32, ops32, storage, math, score, quality, time; or as they are given.",
)
@click.option("--columns", help="Columns of the table, for example score,quality,time; by default those that fit.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown", "latex"]),
    default="table",
    show_default=True,
    help="How to print the table.",
)
@with_html
@with_data
@isolated
def compare(
    paths: tuple[Path, ...],
    on: Path | None,
    pruners: tuple[str, ...],
    sparsifiers: tuple[str, ...],
    quantizers: tuple[str, ...],
    fine_tune: str | None,
    seeds: int,
    results: Path,
    executor: str,
    jobs: int | None,
    sort: str,
    columns: str | None,
    style: str,
    html: Path | None,
    data: Path | None,
    isolation: Isolation,
) -> None:
    """Lay strategies side by side: a grid of them on one trained network, recipes, submissions.

    PATHS are recipes and submissions' folders, a row each.
    """
    from micronet_eval import comparing

    found = comparing.compare(
        *paths,
        on=on,
        pruners=pruners,
        sparsifiers=sparsifiers,
        quantizers=quantizers,
        fine_tune=comparing.options(fine_tune) if fine_tune else None,
        seeds=seeds,
        results=results,
        executor=executor,
        workers=jobs,
        data=data,
        sort=sort,
        columns=columns,
        isolation=isolation,
        live=live,
    )
    if style == "table":
        from rich.console import Console

        Console().print(found)
    else:
        click.echo(getattr(found, f"to_{style}")())
    if html is not None:
        from micronet_eval.pages import write_comparison

        write_comparison(found, html)
        click.echo(f"wrote {html / 'index.html'}", err=True)
    sys.exit(FAILED if found.failed else 0)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_html
@in_any_format
@with_data
@isolated
def leaderboard(
    folders: tuple[Path, ...], html: Path | None, style: str, data: Path | None, isolation: Isolation
) -> None:
    """Rank submissions by task, beside the leaderboard of 2019.

    FOLDERS are submissions, or folders that hold some.
    """
    from micronet_eval import ranking

    found = []
    for name, folder in ranking.named(folders).items():
        with progress_bar(f"measuring {name}") as progress:
            found.append(ranking.judge(name, folder, data, progress, isolation))
    boards = ranking.boards(found)
    if style == "table":
        from rich.console import Console

        console = Console()
        console.print(ranking.render_boards(boards, console.width))
    elif style == "json":
        click.echo(json.dumps(ranking.as_json(boards), indent=2))
    else:
        show_rows(ranking.flat(boards), style)
    write_pages(found, html)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("module")
@with_ruleset
@as_table_or_json
@isolated
def explain(folder: Path, module: str, ruleset: str, style: str, isolation: Isolation) -> None:
    """Show the formula of every operation of a submission's module, with its numbers."""
    from dataclasses import asdict

    from micronet_eval.explaining import explain

    explanations = explain(folder, module, ruleset, isolation=isolation)
    if style == "json":
        click.echo(json.dumps([asdict(e) for e in explanations], indent=2, default=float))
    else:
        from rich.console import Console

        from micronet_eval.report import render_explanations

        Console().print(render_explanations(explanations))


@cli.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Show every module, not only those that changed most.")
@as_table_or_json
@isolated
def diff(before: Path, after: Path, layers: bool, style: str, isolation: Isolation) -> None:
    """Split the change of the score between two submissions, or two JSON reports, into its causes."""
    from micronet_eval.diffing import diff

    found = diff(before, after, isolation)
    if style == "json":
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        from micronet_eval.report import render_diff

        console = Console()
        console.print(render_diff(found, layers, console.width))


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@in_any_format
@with_data
@isolated
def validate(folders: tuple[Path, ...], style: str, data: Path | None, isolation: Isolation) -> None:
    """List all that is wrong with submissions, by rule, with the place and the mend; exit status 2 if anything is."""
    from micronet_eval.validating import validate

    found = [finding for folder in folders for finding in validate(folder, data, isolation)]
    fields = ("kind", "rule", "place", "told", "mend")
    if found or style == "json":
        show_rows([{name: getattr(finding, name) for name in fields} for finding in found], style)
    elif style == "csv":
        click.echo(",".join(fields))
    else:
        click.echo("valid")
    sys.exit(BAD_INPUT if any(finding.kind == "error" for finding in found) else 0)
