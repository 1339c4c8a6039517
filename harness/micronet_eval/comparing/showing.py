"""A comparison on the terminal: the table, and a live view of it while jobs run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from micronet_eval.comparing.jobs import Result
from micronet_eval.comparing.table import COLUMNS, Row, chosen, rows, sorted_rows, written

STRATEGY = 16  # columns of a terminal that the names of strategies have at least where all else fits
ROOM = 8
"""Lines of the terminal that a live view leaves to what is not a row."""


def render(found: Sequence[Row], width: int = 80, columns: Sequence[str] | None = None) -> RenderableType:
    """A row for each strategy; those that no other beats in score and quality are marked, and lead the eye.

    Narrow terminals show no deviations and, without `columns`, fewer columns.
    """
    failed = [Text(f"{row.name}: {error}", "red") for row in found for error in row.errors]
    seeds = max((row.seeds for row in found), default=0)
    names, spread = _fitting(found, width, columns)
    figures = "mean ± standard deviation" if spread else "mean"
    notes = [f"{figures} of {seeds} seeds" if seeds > 1 else ""]
    notes.append("* no other row is better in both score and quality" if any(row.best for row in found) else "")
    return Group(_table(found, names, spread, width), *failed, Text("; ".join(filter(None, notes)), "dim"))


def _fitting(found: Sequence[Row], width: int, columns: Sequence[str] | None) -> tuple[list[str], bool]:
    """The columns that fit, and whether figures have their deviations, which are the first to go."""
    steps = sorted({column.width for column in COLUMNS.values() if column.width < width}, reverse=True)
    fewer = [] if columns is not None else [(chosen(None, step), False) for step in steps]
    names = chosen(columns, width)
    tries = [(names, True), (names, False), *fewer]
    return next((given for given in tries if _needed(found, *given) <= width), tries[-1])


def _needed(found: Sequence[Row], names: Sequence[str], spread: bool) -> int:
    """Columns of a terminal that a table takes: each cell with three between them, the mark, the edges."""
    cells = [_cells(row, names, spread) for row in found]
    return 6 + STRATEGY + sum(3 + max(map(len, [name, *(row[name] for row in cells)])) for name in names)


def _cells(row: Row, names: Sequence[str], spread: bool) -> dict[str, str]:
    cells = {name: str(cell) for name, cell in written(row, names).items()}
    return cells if spread else {**cells, **{name: cells[name].partition(" ±")[0] for name in names}}


def _table(found: Sequence[Row], names: Sequence[str], spread: bool, width: int) -> Table:
    fits = _needed(found, names, spread) <= width  # if not, all are folded: no name and no figure is lost
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("strategy", overflow="fold")
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right", overflow="fold", no_wrap=fits)
    for row in found:
        cells = {**_cells(row, names, spread), "strategy": row.name.replace(",", ", ")}  # where it may be folded
        styles = {"strategy": "bold" if row.best else "", "quality": "red" if row.passed is False else ""}
        table.add_row(
            *(Text(cell, "bold red" if cell == "failed" else styles.get(name, "")) for name, cell in cells.items())
        )
    return table


@dataclass
class LiveView:
    """How far a comparison is: jobs done, running and failed, time left, the best rows; drawn anew each time."""

    total: int
    clock: float = field(default_factory=time.monotonic)
    results: Sequence[Result] = ()
    running: int = 0
    before: int | None = None

    def watch(self, results: Sequence[Result], running: int) -> None:
        """Takes notice of results; the first call has those of earlier runs."""
        if self.before is None:
            self.before = len(results)
        self.results, self.running = results, running

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        done, failed = len(self.results), sum(bool(result.error) for result in self.results)
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(self.total, 1), completed=done, width=width))
        yield bar
        told = Text.assemble((f"{done} of {self.total} done", "bold"), f", {self.running} running", overflow="fold")
        told.append(f", {failed} failed", "bold red" if failed else "dim")
        told.append(f", {_duration(time.monotonic() - self.clock)} so far{self._left(done)}")
        if self.before:
            told.append(f"; {self.before} from before", "dim")
        yield told
        found = sorted_rows(rows(self.results), "score")
        good, bad = [row for row in found if not row.failed], [row for row in found if row.failed]
        most = max(1, height - ROOM - 2 * min(len(bad), 3))
        for row in bad[-3:]:  # the name alone may fill a line
            yield Text(f"{row.name}:", "red", no_wrap=True, overflow="ellipsis")
            yield Text(f"  {row.errors[0]}", "red", no_wrap=True, overflow="ellipsis")
        if good:
            yield _table(good[:most], *_fitting(good[:most], width, None), width)
            if len(good) > most:
                yield Text(f"and {len(good) - most} more, by score", "dim")

    def _left(self, done: int) -> str:
        """By the mean time of a job in this run: of those from before nothing is known."""
        fresh = done - (self.before or 0)
        if not fresh or done == self.total:
            return ""
        return f", about {_duration((time.monotonic() - self.clock) / fresh * (self.total - done))} left"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{round(seconds)} s"
