"""The command line: no logic, only options, messages and exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click_default_group import DefaultGroup

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError

if TYPE_CHECKING:
    from micronet_eval.evaluation import Report

FAILED, BAD_INPUT, BROKEN = 1, 2, 3

_format = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    default="table",
    show_default=True,
    help="How to print the report.",
)
_layers = click.option("--layers", is_flag=True, help="Show every operation, not only the costliest.")
_data = click.option(
    "--data", type=click.Path(path_type=Path), envvar="MICRONET_DATA", help="Folder with data sets (or MICRONET_DATA)."
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
def evaluate(folders: tuple[Path, ...], layers: bool, style: str, data: Path | None) -> None:
    """Evaluate submissions: what they store and compute, how good they are, whether their claims hold."""
    from micronet_eval.evaluation import evaluate

    reports, status = [], 0
    for folder in folders:
        try:
            with _progress(f"measuring {folder.name}") as progress:
                reports.append(evaluate(folder, data, progress))
        except (InputError, SubmissionError) as error:
            status = max(status, _complain(error))
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
def count(
    target: str,
    inputs: tuple[str, ...],
    task: str | None,
    shares: tuple[str, ...],
    depth: int | None,
    layers: bool,
    style: str,
) -> None:
    """Count what any model costs.

    TARGET is torchvision:NAME, timm:NAME, transformers:CLASS (its default configuration), or package.module:FUNCTION
    that returns a module.
    """
    from micronet_eval.evaluation import score
    from micronet_eval.targets import build, example

    shaped = example(inputs)
    report = score(build(target), shaped, task, dict(map(_share, shares))).model_copy(update={"submission": target})
    if depth is None:
        _show([report], style, layers)
    else:
        _show_modules(report, depth, style)


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_data
def compress(recipe: Path, output: Path, data: Path | None) -> None:
    """Run a recipe and write the submission that comes out of it."""
    from micronet_eval.recipe import compress

    compress(recipe, output, data, log=click.echo)
    click.echo(f"wrote {output}")


@cli.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("state_dict", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def import_(folder: Path, state_dict: Path, output: Path) -> None:
    """Make a submission of the weights in STATE_DICT (safetensors or torch.save) and the submission.toml in FOLDER."""
    from micronet_eval.importing import import_weights

    import_weights(folder, state_dict, output)
    click.echo(f"wrote {output}")


@cli.command()
@click.argument("name", required=False)
@_format
def strategies(name: str | None, style: str) -> None:
    """List the installed pruners, sparsifiers and quantizers, or the options of those with one name."""
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
    options: list[dict[str, object]] = [
        {
            "kind": kind,
            "option": option,
            "type": _type(field.annotation),
            "default": "required" if field.is_required() else field.default,
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
    found = plugins.registered("task")
    _show_rows(
        [
            {
                "name": name,
                "baseline": entry.thing.baseline,
                "storage": f"{entry.thing.storage:,.0f}",
                "math": f"{entry.thing.math:,.0f}",
                "quality": f"{entry.thing.metric} >= {entry.thing.threshold:.2%}",
                "package": entry.package,
            }
            for name, entry in found.items()
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


def main() -> None:
    """The command `micronet-eval`; turns expected errors into one message and an exit status."""
    try:
        plugins.add_commands(cli)
        cli()
    except (InputError, SubmissionError) as error:
        sys.exit(_complain(error))


def _share(text: str) -> tuple[str, float]:
    path, _, share = text.rpartition("=")
    try:
        return path, float(share)
    except ValueError:
        raise InputError(f"--path {text!r} is no path and share; write it like exit=0.3") from None


def _complain(error: Exception) -> int:
    click.echo(f"micronet-eval: {error}", err=True)
    return BAD_INPUT if isinstance(error, InputError) else BROKEN


def _first_line(thing: object) -> str:
    return (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]


def _type(annotation: Any) -> str:
    """A type as users write its values: the choices of a Literal, else its name."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on the terminal while examples are measured; none where output goes elsewhere."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
        click.echo(reporting.to_csv(table) if style == "csv" else reporting.to_markdown(table))


def _show_modules(report: Report, depth: int, style: str) -> None:
    from micronet_eval import report as reporting
    from micronet_eval.breakdown import by_module

    modules = by_module((*report.layers, *report.free_layers), depth)
    rows = [module.as_row() for module in modules]
    if style == "json":
        click.echo(json.dumps({**json.loads(report.to_json()), "modules": rows}, indent=2))
    elif style == "table":
        from rich.console import Console

        console = Console()
        console.print(reporting.render_modules(report, modules, console.width))
    else:
        click.echo(reporting.to_csv(rows) if style == "csv" else reporting.to_markdown(rows))


def _show_rows(rows: list[dict[str, Any]], style: str) -> None:
    from micronet_eval import report as reporting

    if style == "json":
        click.echo(json.dumps(rows, indent=2, default=str))
    elif not rows:
        click.echo("none")
    elif style == "csv":
        click.echo(reporting.to_csv(rows))
    elif style == "markdown":
        click.echo(reporting.to_markdown(rows))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for name in rows[0]:
            table.add_column(name, overflow="fold", no_wrap=name in ("storage", "math"))
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        Console().print(table)
