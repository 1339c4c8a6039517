"""The command line: no logic, only options, messages and exit status."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click_default_group import DefaultGroup

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError, message, printable
from micronet_eval.isolation import Isolation, Limits, Mode

if TYPE_CHECKING:
    from micronet_eval.comparing import Watch
    from micronet_eval.evaluation import Report
    from micronet_eval.ranking import Judged
    from micronet_eval.task import Task

FAILED, BAD_INPUT, BROKEN = 1, 2, 3

_format = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    default="table",
    show_default=True,
    help="How to print the report.",
)
_either = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
_layers = click.option("--layers", is_flag=True, help="Show every operation, not only the costliest.")
_data = click.option(
    "--data", type=click.Path(path_type=Path), envvar="MICRONET_DATA", help="Folder with data sets (or MICRONET_DATA)."
)
_ruleset = click.option("--ruleset", default="micronet-2019", show_default=True, help="Rules to count by.")


def _replaceable(context: click.Context, parameter: click.Parameter, html: Path | None) -> Path | None:
    """The folder of --html, of which is told before anything is measured that it cannot be written."""
    if html is not None:
        from micronet_eval.pages.site import check

        check(html)
    return html


_html = click.option(
    "--html", type=click.Path(path_type=Path), callback=_replaceable, help="Folder to write web pages to, too."
)
_isolation = click.option(
    "--isolation",
    "mode",
    type=click.Choice(["required", "auto", "none"]),
    default="auto",
    show_default=True,
    help="How a submission's own code is run: by bubblewrap, by what there is, without limits.",
)
_limits = click.option(
    "--limits",
    default="",
    help="Limits of that code, for example memory=4G,cpu=60,wall=60,processes=32,files=256,written=64M; "
    "evaluation=3600 limits the seconds of a whole evaluation.",
)


def _isolated(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --isolation and --limits to a command that opens submissions, which gets them as `isolation`."""

    @wraps(command)
    def with_isolation(*words: Any, mode: Mode, limits: str, **options: Any) -> Any:
        return command(*words, isolation=Isolation(mode, Limits.parse(limits)), **options)

    return _isolation(_limits(with_isolation))


_cross_check = click.option(
    "--cross-check", is_flag=True, help="Ask fvcore and FlopCounterMode, too; say what differs."
)


@click.group(cls=DefaultGroup, default="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="micronet-eval")
def cli() -> None:
    """What a compressed neural network really costs, by the rules of the MicroNet Challenge.

    micronet-eval FOLDER... evaluates submissions.
    """


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_layers
@_format
@_data
@_ruleset
@_cross_check
@_html
@_isolated
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

    outcomes: list[tuple[Path, Report | Exception]] = []
    status = 0
    for folder in folders:
        try:
            with _progress(f"measuring {folder.name}") as progress:
                asked: dict[str, Any] = {"ruleset": ruleset, "cross_check": cross_check, "isolation": isolation}
                report = evaluate(folder, data, progress, **asked)
            outcomes.append((folder, report))
        except (InputError, SubmissionError) as error:
            outcomes.append((folder, error))
            status = max(status, _complain(error))
    reports = [outcome for _, outcome in outcomes if not isinstance(outcome, Exception)]
    if html is not None:
        from micronet_eval.ranking import judged

        _write_pages([judged(folder.resolve().name, folder, outcome) for folder, outcome in outcomes], html)
    if reports:
        _show(reports, style, layers, several=len(folders) > 1)
    if not all(report.passed for report in reports):
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
@_layers
@_format
@_ruleset
@_cross_check
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

    asked: dict[str, Any] = {"shares": dict(map(_share, shares)), "ruleset": ruleset, "cross_check": cross_check}
    report = count(target, *inputs, task=task, **asked)
    if depth is None:
        _show([report], style, layers)
    else:
        _show_modules(report, depth, style)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--max-score", type=float, help="Fail above this score.")
@click.option("--min-quality", type=float, help="Fail below this quality, a share as 0.94 (a perplexity: above).")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@click.option("--summary", type=click.Path(path_type=Path), help="Append a summary in Markdown to this file.")
@_ruleset
@_data
@_isolated
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
    from micronet_eval.checking import checks, error_junit, error_summary, to_junit, to_summary
    from micronet_eval.evaluation import evaluate

    try:
        with _progress(f"measuring {folder.name}") as progress:
            report = evaluate(folder, data, progress, ruleset=ruleset, isolation=isolation)
    except (InputError, SubmissionError) as error:  # what shows the files has to show this, too
        name = printable(folder.resolve().name)
        _write_checks(junit, error_junit(name, error), summary, error_summary(name, error))
        raise
    found = checks(report, max_score, min_quality)
    text = to_summary(report, found)
    _write_checks(junit, to_junit(report, found), summary, text)
    click.echo(text)
    sys.exit(FAILED if any(c.holds is False for c in found) else 0)


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
@click.option("--sort", default="given", show_default=True, help="Order of the rows: a column, or as they are given.")
@click.option("--columns", help="Columns of the table, for example score,quality,time; by default those that fit.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown", "latex"]),
    default="table",
    show_default=True,
    help="How to print the table.",
)
@_html
@_data
@_isolated
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
        live=_live,
    )
    if html is not None:
        from micronet_eval.pages import write_comparison

        write_comparison(found, html)
        click.echo(f"wrote {html / 'index.html'}", err=True)
    if style == "table":
        from rich.console import Console

        Console().print(found)
    else:
        click.echo(getattr(found, f"to_{style}")())
    sys.exit(FAILED if found.failed else 0)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_html
@_format
@_data
@_isolated
def leaderboard(
    folders: tuple[Path, ...], html: Path | None, style: str, data: Path | None, isolation: Isolation
) -> None:
    """Rank submissions by task, beside the leaderboard of 2019.

    FOLDERS are submissions, or folders that hold some.
    """
    from micronet_eval import ranking

    found = []
    for name, folder in ranking.named(folders).items():
        with _progress(f"measuring {name}") as progress:
            found.append(ranking.judge(name, folder, data, progress, isolation))
    _write_pages(found, html)
    boards = ranking.boards(found)
    if style == "table":
        from rich.console import Console

        console = Console()
        console.print(ranking.render_boards(boards, console.width))
    elif style == "json":
        click.echo(json.dumps(ranking.as_json(boards), indent=2))
    else:
        _show_rows(ranking.flat(boards), style)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("module")
@_ruleset
@_either
@_isolated
def explain(folder: Path, module: str, ruleset: str, style: str, isolation: Isolation) -> None:
    """Show the formula of every operation of a submission's module, with its numbers."""
    from dataclasses import asdict

    from micronet_eval.explaining import explain
    from micronet_eval.opening import open_submission

    explanations = explain(open_submission(folder, isolation=isolation), module, ruleset)
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
@_either
@_isolated
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
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@_format
@_isolated
def rules(folders: tuple[Path, ...], style: str, isolation: Isolation) -> None:
    """List the rules of the score by id, and which of the submissions in FOLDERS exercise each."""
    from micronet_eval.opening import open_submission
    from micronet_eval.rules import RULES, evidence_on

    opened = [open_submission(folder, isolation=isolation) for folder in folders]
    submissions = [(printable(o.folder.resolve().name), evidence_on(o)) for o in opened]
    rows: list[dict[str, object]] = []
    for rule in RULES:
        by = ", ".join(name for name, evidence in submissions if rule.exercised and rule.exercised(evidence))
        more = {"exercised by": by} if submissions else {"code": ", ".join(rule.code)}
        rows.append({"id": rule.id, "rule": rule.says, **more})
    _show_rows(rows, style)


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_output = click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
_resume = click.option(
    "--resume", is_flag=True, help="Go on where a run of the same recipe into the same folder ended."
)


@cli.command()
@_recipe
@_output
@_resume
@_data
def compress(recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    """Run a recipe and write the submission that comes out of it."""
    from micronet_eval.recipe import compress

    _run_recipe(compress, recipe, output, resume, data)


@cli.command()
@_recipe
@_output
@_resume
@_data
def train(recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    """Run a recipe that only trains; write weights that recipes can start from, and the submission they are.

    It takes a GPU where there is one; `accelerate launch -m micronet_eval train ...` takes several.
    """
    from micronet_eval.recipe import train_only

    _run_recipe(train_only, recipe, output, resume, data)


@cli.command()
@_recipe
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write the policy to.")
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Networks to train.")
@click.option("--trials", type=click.IntRange(min=1), default=100, show_default=True, help="Policies to try a fold.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many of them are taken.")
@click.option(
    "--examples", type=click.IntRange(min=1), default=2000, show_default=True, help="Examples to try them on."
)
@_data
def augment(recipe: Path, output: Path, folds: int, trials: int, top: int, examples: int, data: Path | None) -> None:
    """Search a policy of augmentations for a recipe's network and training data, by Fast AutoAugment.

    Training that says augment = "OUTPUT" applies it.
    """
    import tomli_w

    from micronet_eval.files import is_below_a_folder, write_whole
    from micronet_eval.parallel import team
    from micronet_eval.policy_search import Search, search

    if output.is_dir() or not is_below_a_folder(output.absolute().parent):
        raise InputError(f"{output} is a folder, or a part of its path is a file; name another file")
    how = Search(folds=folds, trials=trials, top=top, examples=examples)
    with _training() as (log, progress):
        policy = search(recipe, how, data, log if team().first else lambda line: None, progress)
    if not team().first:
        return
    try:
        write_whole(output, tomli_w.dumps(policy.model_dump()).encode())
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; name another file") from error
    click.echo(f"wrote {output}: {len(policy.sub_policies)} sub-policies")


@cli.command()
@click.argument("kind", type=click.Choice(["pruner", "sparsifier", "quantizer"]))
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; by default NAME.")
def new(kind: plugins.Kind, name: str, output: Path | None) -> None:
    """Write a plugin package to begin with: one strategy, its tests, ready to pip install."""
    from micronet_eval.new import new_plugin

    folder = output or Path(name)
    new_plugin(kind, name, folder)
    steps = (f"pip install -e '{folder}[test]'", f"micronet-eval strategies {name}", f"python -m pytest {folder}")
    click.echo(f"wrote {folder}; next: {', '.join(steps)}")


@cli.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("state_dict", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_isolated
def import_(folder: Path, state_dict: Path, output: Path, isolation: Isolation) -> None:
    """Make a submission of the weights in STATE_DICT (safetensors or torch.save) and the submission.toml in FOLDER."""
    from micronet_eval.importing import import_weights

    import_weights(folder, state_dict, output, isolation)
    click.echo(f"wrote {output}")


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_format
@_data
@_isolated
def validate(folders: tuple[Path, ...], style: str, data: Path | None, isolation: Isolation) -> None:
    """List all that is wrong with submissions, by rule, with the place and the mend; exit status 2 if anything is."""
    from micronet_eval.validating import validate

    found = [finding for folder in folders for finding in validate(folder, data, isolation)]
    fields = ("kind", "rule", "place", "told", "mend")
    if found or style == "json":
        _show_rows([{name: getattr(finding, name) for name in fields} for finding in found], style)
    else:
        click.echo("valid")
    sys.exit(BAD_INPUT if any(finding.kind == "error" for finding in found) else 0)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_data
def reproduce(folder: Path, data: Path | None) -> None:
    """Run a submission's recipe again and compare the weights bit for bit; exit status 1 where they differ."""
    from micronet_eval.reproducing import reproduce

    with _progress("training, at most") as progress:
        found = reproduce(folder, data, click.echo, progress or (lambda done, total: None))
    told = [*found.remarks, *(f"only one of the two has {name!r}" for name in found.others)]
    told += [
        f"{d.tensor}: {d.values:,} of {d.of:,} values differ, by {d.largest:.3g} at most" for d in found.differences
    ]
    for line in told:
        click.echo(printable(line))
    click.echo("the weights are the same, bit for bit" if found.identical else "the weights differ")
    sys.exit(0 if found.identical else FAILED)


@cli.command()
@click.argument("name", required=False)
@_format
def strategies(name: str | None, style: str) -> None:
    """List the installed pruners, sparsifiers and quantizers, or the options of those with one name."""
    from micronet_eval.strategy import values_of

    kinds: tuple[plugins.Kind, ...] = ("pruner", "sparsifier", "quantizer")
    found = [(key, kind, entry) for kind in kinds for key, entry in plugins.registered(kind).items()]
    if name is None:
        listing = [
            {"name": key, "kind": kind, "does": _first_line(entry.thing), "package": entry.package}
            for key, kind, entry in found
        ]
        return _show_rows(listing, style)
    named = [(kind, entry) for key, kind, entry in found if key == name]
    if not named:
        raise InputError(plugins.unknown("strategy", name, dict.fromkeys(key for key, *_ in found)))
    show = (lambda value: value) if style == "json" else _written
    options: list[dict[str, object]] = [
        {
            "kind": kind,
            "option": option,
            "type": values_of(field.annotation),
            "default": "required" if field.is_required() else show(field.default),
            "meaning": field.description,
        }
        for kind, entry in named
        for option, field in entry.thing.model_fields.items()
    ]
    return _show_rows(options, style)


@cli.command()
@_format
def tasks(style: str) -> None:
    """List the installed tasks."""
    text = style in ("table", "markdown")  # for people; programs get numbers, and a field for each thing
    _show_rows(
        [
            {
                "name": name,
                "baseline": task.baseline,
                "storage": f"{task.storage:,.0f}" if text else task.storage,
                "math": f"{task.math:,.0f}" if text else task.math,
                **({"quality": _threshold(task)} if text else {"metric": task.metric, "threshold": task.threshold}),
                "package": entry.package,
            }
            for name, entry in plugins.registered("task").items()
            for task in [entry.thing]
        ],
        style,
    )


@cli.command()
@_format
def architectures(style: str) -> None:
    """List the installed architectures with their options."""
    import inspect

    found = plugins.registered("architecture")
    _show_rows(
        [
            {
                "name": name,
                "options": ", ".join(str(p).split(":")[0] + ("" if p.default is p.empty else f"={p.default}")
                                     for p in inspect.signature(entry.thing).parameters.values()),
                "is": _first_line(entry.thing),
                "package": entry.package,
            }
            for name, entry in found.items()
        ],
        style,
    )  # fmt: skip


def _end() -> None:
    """Leaves the objects that are still there alone, unless there is triton, which complains of what stays."""
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """The command `micronet-eval`; turns expected errors into one message and an exit status."""
    gc.set_threshold(100_000, 50, 50)  # a model is many objects that stay: to search them for garbage takes long,
    atexit.register(_end)  # and so it does at the end, when all of it goes anyway
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # temporary files and workers end with us
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us closed it
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names have letters that the encoding may lack
    try:
        try:
            plugins.add_commands(cli)
            cli()
        finally:
            _flush()
    except (InputError, SubmissionError) as error:
        sys.exit(_complain(error))
    except OSError as error:
        sys.exit(_complain(_refused(error)))


def _flush() -> None:
    """Writes what is left: at its own end Python could only say that it cannot, with status 120.

    Raises OSError where the disk is full. Whoever reads a pipe may have seen enough: that is no error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        if not isinstance(error, BrokenPipeError):
            raise


def _refused(error: OSError) -> InputError:
    """What the system refused, as the message that it is: a name that is too long, a full disk."""
    told = error.strerror or str(error)
    return InputError(f"{error.filename}: {told}" if error.filename else told)


def _share(text: str) -> tuple[str, float]:
    path, _, share = text.rpartition("=")
    try:
        return path, float(share)
    except ValueError:
        raise InputError(f"--path {text!r} is no path and share; write it like exit=0.3") from None


def _complain(error: Exception) -> int:
    click.echo(message(f"micronet-eval: {error}"), err=True)
    return BAD_INPUT if isinstance(error, InputError) else BROKEN


def _threshold(task: Task) -> str:
    from micronet_eval.task import METRICS

    metric = METRICS[task.metric]
    return f"{task.metric} {metric.sign} {metric.show(task.threshold)}"


def _first_line(thing: object) -> str:
    return (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]


def _written(value: Any) -> str:
    """A default as users write it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on the terminal while examples are measured; none where output goes elsewhere."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(printable(what)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _training() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """How a recipe tells what it does: lines, with the time left behind each epoch; on a terminal a bar, too."""
    seen: list[tuple[int, int, float]] = []

    with _progress("training, at most") as bar:

        def progress(done: int, total: int) -> None:
            now = done, total, time.monotonic()
            seen[:] = [seen[0] if seen else now, now]
            if bar is not None:
                bar(done, total)

        def log(line: str) -> None:
            if line.startswith("  epoch") and len(seen) > 1:
                (first, _, start), (done, total, now) = seen
                left = round((total - done) * (now - start) / max(1, done - first))
                line += f"; {timedelta(seconds=left)} left at most"
            click.echo(line)

        yield log, progress


def _run_recipe(run: Callable[..., None], recipe: Path, output: Path, resume: bool, data: Path | None) -> None:
    from micronet_eval.parallel import team

    with _training() as (log, progress):
        run(recipe, output, data, log, resume, progress)
    if team().first:
        click.echo(f"wrote {output}")


@contextmanager
def _live(total: int) -> Iterator[Watch]:
    """On a terminal: jobs done, running, failed, the time left, the best rows; elsewhere nothing."""
    if not sys.stdout.isatty():
        yield lambda results, running: None
        return
    from rich.console import Console
    from rich.live import Live

    from micronet_eval.comparing.showing import LiveView

    view = LiveView(total)
    with Live(view, console=Console(stderr=True), transient=True, vertical_overflow="crop"):
        yield view.watch


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


def _write_pages(found: list[Judged], html: Path | None) -> None:
    if html is not None:
        from micronet_eval import pages

        pages.write(found, html)
        click.echo(f"wrote {html / 'index.html'}", err=True)


def _show(reports: list[Report], style: str, layers: bool, several: bool = False) -> None:
    from micronet_eval import report as reporting

    if style == "json":
        texts = [json.loads(report.to_json()) for report in reports]
        click.echo(json.dumps(texts if several else texts[0], indent=2))
    elif style == "table":
        from rich.console import Console

        reporting.print_report(reports, Console(), layers)
    else:
        table = reporting.rows(reports)
        _print_rows(table, style)


def _show_modules(report: Report, depth: int, style: str) -> None:
    from micronet_eval import report as reporting
    from micronet_eval.breakdown import by_module

    modules = by_module((*report.layers, *report.free_layers), depth)
    rows = [module.as_row() for module in modules]
    if style == "json":
        click.echo(json.dumps({**json.loads(report.to_json()), "breakdown": rows}, indent=2))
    elif style == "table":
        from rich.console import Console

        console = Console()
        console.print(reporting.render_modules(report, modules, console.width))
    else:
        _print_rows(rows, style)


def _print_rows(rows: Sequence[Mapping[str, object]], style: str) -> None:
    from micronet_eval import tables

    click.echo(tables.to_csv(rows) if style == "csv" else tables.to_markdown(rows))


def _show_rows(rows: list[dict[str, Any]], style: str) -> None:
    if style == "json":
        click.echo(json.dumps(rows, indent=2, default=str))
    elif not rows:
        click.echo("none")
    elif style != "table":
        _print_rows(rows, style)
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in rows[0]:
            table.add_column(name, overflow="fold", no_wrap=name in ("name", "option", "storage", "math"))
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row.values()))
        Console().print(table)
