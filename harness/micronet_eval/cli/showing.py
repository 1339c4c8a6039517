"""What commands print: reports, rows, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from micronet_eval.errors import InputError, printable

if TYPE_CHECKING:
    from rich.table import Table

    from micronet_eval.comparing import Watch
    from micronet_eval.evaluation import Report
    from micronet_eval.ranking import Judged

FOLDED = 24
"""Columns of a terminal from which on the texts of a table's column may be folded."""


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
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
def training_log() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """How a recipe tells what it does: lines, with the time left behind each epoch; on a terminal a bar, too."""
    seen: list[tuple[int, int, float]] = []

    with progress_bar("training, at most") as bar:

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


@contextmanager
def live(total: int) -> Iterator[Watch]:
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


def check_shown(style: str, layers: bool, cross_check: bool, several: bool = False, depth: int | None = None) -> None:
    """Raises InputError where what is asked for would not be shown, before anything is measured; JSON has all of it."""
    asked = "--layers" if layers else "--cross-check" if cross_check else ""
    without = (f"--format {style}" if style != "table" else "a table of several submissions" if several
               else "--depth" if depth is not None else "")  # fmt: skip
    if asked and without and style != "json":
        raise InputError(f"{asked} is not shown by {without}; leave {asked} out, or write --format json")


def show(reports: list[Report], style: str, layers: bool, several: bool = False) -> None:
    """Prints reports: one in full, several as a table; JSON is a list where there are `several`."""
    from micronet_eval import report as reporting

    if style == "json":
        texts = [json.loads(report.to_json()) for report in reports]
        click.echo(json.dumps(texts if several else texts[0], indent=2))
    elif style == "table":
        from rich.console import Console

        reporting.print_report(reports, Console(), layers)
    else:
        table = reporting.rows(reports)
        print_rows(table, style)


def show_modules(report: Report, depth: int, style: str) -> None:
    """Prints the cost of each module of a report, to a depth."""
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
        print_rows(rows, style)


def print_rows(rows: Sequence[Mapping[str, object]], style: str) -> None:
    """Prints rows as CSV or Markdown."""
    from micronet_eval import tables

    click.echo(tables.to_csv(rows) if style == "csv" else tables.to_markdown(rows))


def show_rows(rows: list[dict[str, Any]], style: str) -> None:
    """Prints rows in any format."""
    if style == "json":
        click.echo(json.dumps(rows, indent=2, default=str))
    elif not rows:
        click.echo("none")
    elif style != "table":
        print_rows(rows, style)
    else:
        from rich.console import Console

        console = Console()
        console.print(_table(rows, console.width))


def _table(rows: Sequence[Mapping[str, object]], width: int) -> Table:
    """Rows as a table that fits; without the packages, or as fields below each other, where it would be too wide."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    widths = {name: max(cell_len(str(value)) for value in (name, *(row[name] for row in rows))) for name in rows[0]}
    for shown in (list(widths), [name for name in widths if name != "package"]):
        if sum(min(widths[name], FOLDED) + 3 for name in shown) < width:  # each with two blanks and a border
            table = Table()
            for name in shown:
                table.add_column(name, overflow="fold", width=widths[name] if widths[name] <= FOLDED else None)
            for row in rows:
                table.add_row(*(Text(str(row[name])) for name in shown))
            return table
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        for name, value in row.items():
            table.add_row(Text(name, "bold"), Text(str(value)))
        table.add_row()
    return table


def write_pages(found: list[Judged], html: Path | None) -> None:
    """Writes the web pages of what was judged into the folder of --html, if there is one."""
    if html is not None:
        from micronet_eval import pages

        pages.write(found, html)
        click.echo(f"wrote {html / 'index.html'}", err=True)
