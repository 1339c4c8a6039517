"""Plots as numbers: where axes, ticks, points and lines lie. The templates draw them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from micronet_eval.task import Metric

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 446, 12, 256
WIDE_RANGE = 8
"""From this ratio of the highest to the lowest value on, an axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A pair of score and quality; `href` is empty where there is no page."""

    score: float
    quality: float
    label: str
    href: str
    verified: bool


@dataclass(frozen=True)
class Spot:
    """A point in pixels; `left` says that its label stands to the left of it."""

    x: float
    y: float
    point: Point
    left: bool


@dataclass(frozen=True)
class Plot:
    """All in pixels. `line` joins points: the Pareto front, or the way from step to step. `marks` lie on the x axis."""

    spots: tuple[Spot, ...]
    line: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[float, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


@dataclass(frozen=True)
class Axis:
    """From values to pixels, linear or logarithmic. `start` is the pixel of `low`, `end` that of `high`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, may_be_log: bool = False) -> Axis:
        """An axis with room for all values and a little more on both sides."""
        low, high = min(values), max(values)
        if may_be_log and low > 0 and high / low >= WIDE_RANGE:
            return cls(low / 1.3, high * 1.3, start, end, True)
        room = (high - low) * 0.12 or abs(high) * 0.02 or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        part = math.log(value / self.low) / math.log(self.high / self.low) if self.logarithmic else (
            (value - self.low) / (self.high - self.low)
        )  # fmt: skip
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values: 1, 2 and 5 of each power of ten on a logarithmic axis, steps of one of them on a linear one.

        At least two: one alone tells no scale.
        """
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            return [t for p in powers for s in steps if self.low <= (t := float(f"{s}e{p}")) <= self.high]
        rough = (self.high - self.low) / 4 * (1 - 1e-9)
        power = 10.0 ** math.floor(math.log10(rough))
        sizes = pairwise(size * power for size in (0.5, 1, 2, 5, 10))
        smaller, step = next((smaller, step) for smaller, step in sizes if step >= rough)
        few = self._multiples(step)
        return few if len(few) > 1 else self._multiples(smaller)

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def front(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other one beats in score or quality without being worse in the other, by score."""
    sign = 1 if lower_is_better else -1
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.score, sign * p.quality)):
        if sign * point.quality < best:
            best = sign * point.quality
            kept.append(point)
    return kept


def score_plot(points: Sequence[Point], metric: Metric, published: Sequence[float] = ()) -> Plot:
    """Score against quality, the better quality upwards, with the Pareto front; published scores are marks below."""
    return _plot(points, front(points, metric.lower_is_better), metric, published)


def path_plot(points: Sequence[Point], metric: Metric) -> Plot:
    """Score against quality from step to step, in the order in which they are given."""
    return _plot(points, points, metric, ())


def _plot(points: Sequence[Point], joined: Sequence[Point], metric: Metric, published: Sequence[float]) -> Plot:
    x = Axis.over([*(p.score for p in points), *published], LEFT, RIGHT, may_be_log=True)
    up, down = (TOP, BOTTOM) if metric.lower_is_better else (BOTTOM, TOP)
    share = metric.style.endswith("%")
    y = Axis.over([p.quality for p in points], up, down)
    if share and all(0 <= p.quality <= 1 for p in points):  # steps are told by the authors: a share may be none
        y = replace(y, low=max(y.low, 0.0), high=min(y.high, 1.0))
    ys = y.ticks()
    digits = 0
    while share and digits < 4 and len({f"{tick:.{digits}%}" for tick in ys}) < len(ys):
        digits += 1
    show = f".{digits}%" if share else "g"
    return Plot(
        spots=tuple(Spot(x.at(p.score), y.at(p.quality), p, x.at(p.score) > (LEFT + RIGHT) / 2) for p in points),
        line=" ".join(f"{x.at(p.score)},{y.at(p.quality)}" for p in joined),
        x_ticks=tuple((x.at(tick), f"{tick:.6g}") for tick in x.ticks()),
        y_ticks=tuple((y.at(tick), format(round(tick, 10), show)) for tick in ys),
        marks=tuple(x.at(score) for score in published),
    )
