"""The table of a comparison: a row for each strategy, and its columns as people and as programs read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from micronet_eval import plugins
from micronet_eval.comparing.jobs import Result
from micronet_eval.errors import InputError
from micronet_eval.task import METRICS, Metric

FIGURES = ("params32", "ops32", "storage", "math", "score", "quality")


@dataclass(frozen=True)
class Row:
    """The mean over seeds, and the standard deviation where there are several; `best` marks the Pareto-optimal rows.

    `params32` and `ops32` are counts; storage, math and score are relative to the task's baseline.
    """

    name: str
    task: str
    seeds: int
    storage: float | None
    math: float | None
    score: float | None
    quality: float | None
    params32: float | None = None
    ops32: float | None = None
    spread: Mapping[str, float] = field(default_factory=dict)
    passed: bool | None = None
    seconds: float = 0.0
    best: bool = False
    errors: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether nothing came out of it, whatever the seed."""
        return self.score is None and bool(self.errors)

    @cached_property
    def metric(self) -> Metric | None:
        """The metric of its quality; None where no task is known."""
        return METRICS[plugins.lookup("task", self.task).metric] if self.task else None


def rows(results: Iterable[Result]) -> list[Row]:
    """One row for each name, the mean over its seeds; those that no other row beats in score and quality are marked.

    Where one of the two is unknown nobody can say so.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    found = [_mean(group) for group in groups.values()]
    return [
        replace(row, best=None not in (row.score, row.quality) and not any(_beats(other, row) for other in found))
        for row in found
    ]


def _mean(group: Sequence[Result]) -> Row:
    good = [result for result in group if not result.error]
    figures: dict[str, Any] = {}
    spread: dict[str, float] = {}
    for name in FIGURES:
        values = [value for result in good if (value := getattr(result, name)) is not None]
        figures[name] = fmean(values) if values else None
        if len(values) > 1:
            spread[name] = stdev(values)
    passed = {result.passed for result in group}  # None where it failed, or was not measured
    return Row(
        name=group[0].name,
        task=next((result.task for result in good), ""),
        seeds=len(good),
        spread=spread,
        passed=False if False in passed else None if None in passed else True,
        seconds=fmean(result.seconds for result in good or group),
        errors=tuple(dict.fromkeys(result.error for result in group if result.error)),
        **figures,
    )


def _beats(other: Row, row: Row) -> bool:
    """Whether `other` is better in score or quality, and worse in neither. Rows of another task do not count."""
    if other.score is None or row.score is None or other.task != row.task:
        return False
    if other.quality is None or row.quality is None or row.metric is None:
        return False
    gain = (-1 if row.metric.lower_is_better else 1) * (other.quality - row.quality)
    return other.score <= row.score and gain >= 0 and (other.score < row.score or gain > 0)


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """How a column is written for people; `width`: from so many columns of a terminal on it is shown unasked.

    `value` is what it is sorted by, the lowest first; None where nothing is to be sorted.
    """

    show: Callable[[Row], str]
    value: Callable[[Row], float | None] | None = None
    width: int = 10_000


def _spread(name: str, style: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value, deviation = getattr(row, name), row.spread.get(name)
        return "-" if value is None else format(value, style) + (f" ±{deviation:{style}}" if deviation else "")

    return show


def _quality(row: Row) -> str:
    if row.quality is None or row.metric is None:
        return "-"
    deviation = row.spread.get("quality")
    return row.metric.show(row.quality) + (f" ±{row.metric.show(deviation)}" if deviation else "")


def _quality_order(row: Row) -> float | None:
    better_is_lower = row.metric is not None and row.metric.lower_is_better
    return None if row.quality is None else row.quality if better_is_lower else -row.quality


def _seconds(row: Row) -> str:
    return f"{row.seconds:.0f} s" if row.seconds < 100 else f"{row.seconds / 60:.0f} min"


COLUMNS: dict[str, Column] = {
    "task": Column(lambda row: row.task),
    "seeds": Column(lambda row: str(row.seeds)),
    "params32": Column(_spread("params32", ",.0f"), lambda row: row.params32, 130),
    "ops32": Column(_spread("ops32", ",.0f"), lambda row: row.ops32, 130),
    "storage": Column(_spread("storage", ".5f"), lambda row: row.storage, 72),
    "math": Column(_spread("math", ".5f"), lambda row: row.math, 72),
    "score": Column(_spread("score", ".5f"), lambda row: row.score, 0),
    "quality": Column(_quality, _quality_order, 0),
    "passed": Column(lambda row: {True: "yes", False: "no", None: "-"}[row.passed]),
    "time": Column(_seconds, lambda row: row.seconds, 72),
}
ORDERS = ("given", *(name for name, column in COLUMNS.items() if column.value))


def chosen(text: str | Sequence[str] | None, width: int = 100) -> list[str]:
    """The columns in `text`, names between commas; without one those that fit into so many columns of a terminal.

    Raises InputError where there is no such column.
    """
    if text is None:
        return [name for name, column in COLUMNS.items() if column.width <= width]
    names = [name.strip() for name in (text.split(",") if isinstance(text, str) else text)]
    if wrong := [name for name in names if name not in COLUMNS]:
        raise InputError(f"--columns: {plugins.unknown('column', wrong[0], COLUMNS)}")
    return list(dict.fromkeys(names))


def sorted_rows(found: Sequence[Row], by: str) -> list[Row]:
    """The rows by one of their figures, the best first; those without it come last. `given` leaves them in order.

    Raises InputError where rows cannot be sorted so.
    """
    if by == "given":
        return list(found)
    order = COLUMNS[by].value if by in COLUMNS else None
    if order is None:
        raise InputError(f"--sort: {plugins.unknown('order', by, ORDERS)}")
    values = [(row, order(row)) for row in found]
    return [row for row, _ in sorted(values, key=lambda pair: (pair[1] is None, pair[1] or 0.0))]


def flat(row: Row, columns: Sequence[str] | None = None) -> dict[str, object]:
    """The figures of a row as numbers, for programs: all, or those of some columns; and why jobs failed."""
    found: dict[str, object] = {"strategy": row.name}
    for name in columns or [name for name in COLUMNS if name not in ("passed", "time")]:
        if name == "time":
            found["seconds"] = round(row.seconds, 1)
        else:
            found[name] = getattr(row, name)
        if name in FIGURES:
            found[f"{name}_deviation"] = row.spread.get(name)
    if columns is None:
        found |= {"passed": row.passed, "pareto": row.best, "seconds": round(row.seconds, 1)}
    return {**found, "errors": "; ".join(row.errors)}


def written(row: Row, columns: Sequence[str]) -> dict[str, object]:
    """The same for people: figures with their deviation. A row of which nothing came out says so."""
    shown = {name: COLUMNS[name].show(row) for name in columns}
    if row.failed:
        shown = {name: "failed" if name == ("score" if "score" in columns else columns[0]) else "" for name in columns}
    return {"": "*" if row.best else "", "strategy": row.name, **shown}
