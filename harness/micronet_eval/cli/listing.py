"""Commands that list what is installed, and the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from micronet_eval import plugins
from micronet_eval.cli.group import cli
from micronet_eval.cli.options import in_any_format, isolated
from micronet_eval.cli.showing import show_rows
from micronet_eval.errors import InputError, printable
from micronet_eval.isolation import Isolation

if TYPE_CHECKING:
    from micronet_eval.task import Task


@cli.command()
@click.argument("name", required=False)
@in_any_format
def strategies(name: str | None, style: str) -> None:
    """List the installed pruners, sparsifiers and quantizers, or the options of those with one name."""
    from micronet_eval.strategy import values_of

    found = [(key, kind, entry) for kind in plugins.STRATEGIES for key, entry in plugins.registered(kind).items()]
    if name is None:
        listing = [
            {"name": key, "kind": kind, "does": _first_line(entry.thing), "package": entry.package}
            for key, kind, entry in found
        ]
        return show_rows(listing, style)
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
    return show_rows(options, style)


def _first_line(thing: object) -> str:
    return (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]


def _written(value: Any) -> str:
    """A default as users write it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


@cli.command()
@in_any_format
def tasks(style: str) -> None:
    """List the installed tasks."""
    text = style in ("table", "markdown")  # for people; programs get numbers, and a field for each thing
    show_rows(
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


def _threshold(task: Task) -> str:
    from micronet_eval.task import METRICS

    metric = METRICS[task.metric]
    return f"{task.metric} {metric.sign} {metric.show(task.threshold)}"


@cli.command()
@in_any_format
def architectures(style: str) -> None:
    """List the installed architectures with their options."""
    import inspect

    found = plugins.registered("architecture")
    show_rows(
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


@cli.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@in_any_format
@isolated
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
    show_rows(rows, style)
