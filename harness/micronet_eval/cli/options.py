"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from micronet_eval.isolation import Isolation, Limits, Mode

in_any_format = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    default="table",
    show_default=True,
    help="How to print the report.",
)
as_table_or_json = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
with_layers = click.option("--layers", is_flag=True, help="Show every operation, not only the costliest.")
with_data = click.option(
    "--data", type=click.Path(path_type=Path), envvar="MICRONET_DATA", help="Folder with data sets (or MICRONET_DATA)."
)
with_ruleset = click.option("--ruleset", default="micronet-2019", show_default=True, help="Rules to count by.")


def _replaceable(context: click.Context, parameter: click.Parameter, html: Path | None) -> Path | None:
    """The folder of --html, of which is told before anything is measured that it cannot be written."""
    if html is not None:
        from micronet_eval.pages.site import check

        check(html)
    return html


with_html = click.option(
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
    help="Limits of that code, NAME=NUMBER,...; by default memory=8G, cpu=120, wall=120, processes=64, files=256, "
    "written=64M; evaluation=86400 limits the seconds of a whole evaluation.",
)


def isolated(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --isolation and --limits to a command that opens submissions, which gets them as `isolation`."""

    @wraps(command)
    def with_isolation(*words: Any, mode: Mode, limits: str, **options: Any) -> Any:
        return command(*words, isolation=Isolation(mode, Limits.parse(limits)), **options)

    return _isolation(_limits(with_isolation))


with_cross_check = click.option(
    "--cross-check", is_flag=True, help="Ask fvcore and FlopCounterMode, too; say what differs."
)
