"""A comparison as a web page: the table, and a line for each row across parallel axes, better always upwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from micronet_eval.comparing import COLUMNS, Comparison, Row
from micronet_eval.pages.plots import Axis
from micronet_eval.pages.site import templates, whole
from micronet_eval.task import Metric

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 440, 34, 284
AXES = ("storage", "math", "score", "quality", "time")
SHOWN = ("score", "quality", "storage", "math", "params32", "ops32", "time")


@dataclass(frozen=True)
class Scale:
    """An axis in pixels: where it stands, and its ticks."""

    name: str
    x: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Way:
    """The line of a row: an SVG path. `number` is the row's in the table."""

    number: int
    path: str
    row: Row


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates of the rows of one task, all in pixels."""

    task: str
    scales: tuple[Scale, ...]
    ways: tuple[Way, ...]
    width: int = WIDTH
    height: int = HEIGHT
    top: int = TOP
    bottom: int = BOTTOM


def write_comparison(found: Comparison, html: str | Path) -> None:
    """Writes index.html with the comparison, and index.json with its figures, into the folder `html`.

    Raises InputError where the folder holds anything but such pages, or cannot be written (`site.whole`).
    """
    with whole(Path(html)) as site:
        page = (
            templates()
            .get_template("comparison.html")
            .render(
                root="",
                rows=found.rows,
                columns=[(name, COLUMNS[name]) for name in SHOWN],
                seeds=max((row.seeds for row in found.rows), default=0),
                tasks=sorted({row.task for row in found.rows if row.task}),
                plots=parallels(found.rows),
            )
        )
        (site / "index.html").write_text(page, encoding="utf-8")
        (site / "index.json").write_text(replace(found, columns=None).to_json(), encoding="utf-8")


def parallels(rows: Sequence[Row]) -> list[Parallel]:
    """The parallel coordinates of each task."""
    tasks = sorted({row.task for row in rows if row.score is not None})
    return [parallel(task, [(i, row) for i, row in enumerate(rows) if row.task == task]) for task in tasks]


def parallel(task: str, rows: Sequence[tuple[int, Row]]) -> Parallel:
    """Rows of one task with their numbers in the table; an axis for each figure that any of them has."""
    names = [name for name in AXES if any(_figure(row, name) is not None for _, row in rows)]
    step = (RIGHT - LEFT) / max(1, len(names) - 1)
    metric = rows[0][1].metric
    axes = {name: _axis(name, [row for _, row in rows], metric) for name in names}
    scales = tuple(Scale(name, round(LEFT + i * step, 1), _ticks(name, axes[name])) for i, name in enumerate(names))
    ways = []
    for number, row in rows:
        known = [(s.x, axes[s.name].at(v)) for s in scales if (v := _figure(row, s.name)) is not None]
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(known))
        if len(known) > 1:
            ways.append(Way(number, path, row))
    ways.sort(key=lambda way: way.row.best)  # the best are drawn last, over the others
    return Parallel(task, scales, tuple(ways))


def _figure(row: Row, name: str) -> float | None:
    if row.score is None:
        return None
    value: float | None = row.seconds if name == "time" else getattr(row, name)
    return value


def _axis(name: str, rows: Sequence[Row], metric: Metric | None) -> Axis:
    values = [value for row in rows if (value := _figure(row, name)) is not None]
    higher = name == "quality" and metric is not None and not metric.lower_is_better
    start, end = (BOTTOM, TOP) if higher else (TOP, BOTTOM)
    axis = Axis.over(values, start, end, may_be_log=name != "quality")
    return replace(axis, low=max(axis.low, 0.0), high=min(axis.high, 1.0)) if higher else axis


def _ticks(name: str, axis: Axis) -> tuple[tuple[float, str], ...]:
    unit = " s" if name == "time" else ""
    return tuple((axis.at(tick), f"{tick:.4g}{unit}") for tick in axis.ticks())
