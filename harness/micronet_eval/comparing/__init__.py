"""Strategies side by side: a grid of them on one trained network, recipes, submissions; results as they come in.

Every cell of the grid is a recipe: the stages of a base recipe, then its strategies, with fine-tuning behind each. It
is run, packed and evaluated as any other, so that what stands in the table is what a submission would score. The base
is trained once for each seed, and all its cells go on from there.

    grid     strategies with options -> cells -> jobs
    jobs     one job, in this process
    running  all jobs by an executor, their results in a file
    table    results -> rows and columns
    showing  the table and the live view on the terminal
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from micronet_eval import plugins, tables
from micronet_eval.comparing.grid import Cell, grid, jobs_at, jobs_in, jobs_of, options, parse, title
from micronet_eval.comparing.jobs import Job, Result, run
from micronet_eval.comparing.running import Executor, Watch, executor_of, results_of
from micronet_eval.comparing.showing import render
from micronet_eval.comparing.table import COLUMNS, ORDERS, Row, chosen, flat, rows, sorted_rows, written
from micronet_eval.errors import InputError
from micronet_eval.isolation import AUTO, Isolation

OneOrMore = str | Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, sorted, and the result of each job. In a notebook, and by rich, shown as the table."""

    rows: tuple[Row, ...]
    results: tuple[Result, ...]
    columns: tuple[str, ...] | None = None

    @property
    def failed(self) -> bool:
        """Whether any job failed."""
        return any(result.error for result in self.results)

    def to_list(self) -> list[dict[str, object]]:
        """The rows as plain numbers and texts."""
        return [flat(row, self.columns) for row in self.rows]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame. Raises InputError where pandas is not installed."""
        return tables.frame(self.to_list())

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps(self.to_list(), indent=2)

    def to_csv(self) -> str:
        """The rows as comma-separated values, numbers in full."""
        return tables.to_csv(self.to_list())

    def to_markdown(self) -> str:
        """The table in Markdown, figures rounded; * marks the Pareto-optimal rows."""
        reasons = [f"\n- {tables.in_markdown(reason)}" for reason in self._reasons()]
        return tables.to_markdown(self._written()) + ("\n" + "".join(reasons) if reasons else "")

    def to_latex(self) -> str:
        """The table in LaTeX, for the package booktabs; Pareto-optimal rows are bold, failures are comments."""
        cells = [{name: cell for name, cell in row.items() if name} for row in self._written()]
        table = tables.to_latex(cells, [row.best for row in self.rows])
        return "".join(f"% {' '.join(reason.split())}\n" for reason in self._reasons()) + table

    def _reasons(self) -> list[str]:
        """Why jobs failed. A row of which other seeds did not fail has to say so, too."""
        return [f"{row.name}: failed: {error}" for row in self.rows for error in row.errors]

    def _written(self) -> list[dict[str, object]]:
        return [written(row, chosen(self.columns)) for row in self.rows]

    def _repr_html_(self) -> str:
        found = self._written()
        head = "".join(f"<th>{escape(name)}</th>" for name in found[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row.values()) + "</tr>" for row in found)
        reasons = "".join(f"<p>{escape(reason)}</p>" for reason in self._reasons())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{reasons}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield render(self.rows, options.max_width, self.columns)


def compare(
    *paths: str | Path,
    on: str | Path | None = None,
    pruners: OneOrMore = (),
    sparsifiers: OneOrMore = (),
    quantizers: OneOrMore = (),
    fine_tune: Mapping[str, Any] | None = None,
    seeds: int = 1,
    results: str | Path = "compare.sqlite",
    executor: str = "local",
    workers: int | None = None,
    data: str | Path | None = None,
    sort: str = "given",
    columns: OneOrMore | None = None,
    isolation: Isolation = AUTO,
    live: Callable[[int], AbstractContextManager[Watch]] = lambda total: nullcontext(lambda results, running: None),
) -> Comparison:
    """Lays strategies side by side: a grid of them on one trained network, recipes, submissions.

    `paths` are recipes and submissions' folders, a row each. `on` is the recipe that trains the network for strategies,
    each written `name:option=value,value`; every pruner is tried with every sparsifier and every quantizer.
    `fine_tune` are the options of the training behind each. `results` is a SQLite file: what is in there is not run
    again. `executor` says where to run, so many `workers` at a time (None: one a processor). `sort` is a column or
    `given`, `columns` are those of the table. `isolation` is for submissions' own code. `live` gets the number of jobs
    and watches over them.

    Raises InputError where there is nothing to compare, or where a strategy, option, executor or column is unknown.
    A job that fails is a row with its reason.
    """
    shown = None if columns is None else tuple(chosen(columns))
    sorted_rows((), sort)  # what is unknown is told before anything runs
    root, store = None if data is None else Path(data), Path(results)
    kinds: dict[plugins.Kind, OneOrMore] = {"pruner": pruners, "sparsifier": sparsifiers, "quantizer": quantizers}
    cells = grid([[c for text in _several(texts) for c in parse(kind, text)] for kind, texts in kinds.items()])
    if cells and on is None:
        raise InputError("strategies are compared on a trained network: give the recipe that trains it by --on")
    if not store.name:
        raise InputError(f"--results: {store} is no file; name one, for example compare.sqlite")
    if (kept := store.with_suffix(".kept")) == store:
        raise InputError(
            f"--results: trained networks are kept in {kept}; name another file, for example compare.sqlite"
        )
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; at least 1 network has to be trained")
    strategies = [] if on is None else jobs_of(cells, Path(on), seeds, fine_tune, root, kept)
    todo = jobs_in(list(map(Path, paths)), seeds, root, isolation, {job.name for job in strategies}) + strategies
    if not todo:
        raise InputError("nothing to compare; give recipes, submissions, or strategies with --on RECIPE")
    todo = list(dict.fromkeys(todo))  # what is given twice is run once
    with live(len(todo)) as watch:
        found = results_of(todo, store, executor, workers, watch)
    return Comparison(tuple(sorted_rows(rows(found), sort)), tuple(found), shown)


def _several(texts: OneOrMore) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


__all__ = [
    "COLUMNS",
    "ORDERS",
    "Cell",
    "Comparison",
    "Executor",
    "Job",
    "Result",
    "Row",
    "Watch",
    "chosen",
    "compare",
    "executor_of",
    "flat",
    "grid",
    "jobs_at",
    "jobs_in",
    "jobs_of",
    "options",
    "parse",
    "render",
    "results_of",
    "rows",
    "run",
    "sorted_rows",
    "title",
    "written",
]
