"""Submissions ranked by task, with the challenge's distinctions, beside the leaderboard that was published in 2019."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError, printable
from micronet_eval.evaluation import Report, evaluate
from micronet_eval.files import check_own, read_whole
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.quality import Progress, Quality
from micronet_eval.submission import MANIFEST, RECIPE, TABLE_LIMIT, Claims, Manifest, names_of, read_manifest
from micronet_eval.task import METRICS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASELINE = 2.0
"""The score of every task's baseline: once its storage, once its math."""

NARROW = 72  # columns of a terminal below which storage and math are left out
SMALL = 60  # columns of a terminal below which only names, scores and qualities are shown


@dataclass(frozen=True)
class Judged:
    """A submission with what its evaluation came to: a report, or the reason why there is none.

    `manifest` is None where it cannot be read; `recipe` is the text of recipe.toml, empty where there is none.
    """

    name: str
    manifest: Manifest | None
    report: Report | None
    error: str = ""
    recipe: str = ""


@dataclass(frozen=True)
class Told:
    """A figure, and whether it was measured here; otherwise it is only claimed."""

    value: float
    verified: bool


@dataclass(frozen=True)
class Entry:
    """A line of a board. Storage, math and score are relative to the task's baseline.

    `rank` is None where `reason` says why the entry is not ranked. `in_2019` is the place that the score would have
    taken in the published leaderboard, `claims_fail` names the claims that do not hold, `note` is the authors' own on
    where the weights come from.
    """

    name: str
    task: str
    score: Told | None = None
    storage: Told | None = None
    math: Told | None = None
    quality: Told | None = None
    metric: str = ""
    reason: str = ""
    rank: int | None = None
    distinctions: tuple[str, ...] = ()
    in_2019: int | None = None
    claims_fail: tuple[str, ...] = ()
    note: str = ""

    @property
    def verified(self) -> bool:
        """Whether score and quality were both measured here."""
        return all(figure is not None and figure.verified for figure in (self.score, self.quality))


@dataclass(frozen=True)
class Published:
    """An entry of 2019. `verified`: the organisers reviewed it; `qualified`: it reached the quality that was asked."""

    name: str
    score: float
    url: str
    verified: bool = False
    qualified: bool = True
    distinctions: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Board:
    """The entries of one task, ranked ones first, and what was published for it. `task` is empty where unknown."""

    task: str
    entries: tuple[Entry, ...]
    published: tuple[Published, ...]


# --- evaluating -------------------------------------------------------------------------------------------------------


def named(folders: Iterable[Path]) -> dict[str, Path]:
    """Every submission in `folders`, themselves submissions or folders of them, under a name that no other one has.

    Raises InputError where a folder is neither.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        if not (folder / MANIFEST).is_file() and not inside:
            raise InputError(
                f"{folder} holds no submission; name a folder with {MANIFEST}, or a folder with such folders in it"
            )
        for path in [folder] if (folder / MANIFEST).is_file() else inside:
            found.setdefault(path.resolve(), path)
    return dict(zip(names_of([*found.values()]), found.values(), strict=True))


def leaderboard(*folders: str | Path, data: str | Path | None = None) -> list[Board]:
    """Evaluates the submissions in `folders` and ranks them by task. Raises InputError where a folder holds none."""
    root = None if data is None else Path(data)
    return boards([judge(name, path, root) for name, path in named(map(Path, folders)).items()])


def judge(
    name: str,
    folder: Path,
    data: Path | None = None,
    progress: Progress | None = None,
    isolation: Isolation = AUTO,
) -> Judged:
    """Evaluates a submission; what is wrong with it is part of the result, and never ends the leaderboard."""
    try:
        return judged(name, folder, evaluate(folder, data, progress, isolation=isolation))
    except (InputError, SubmissionError) as error:
        return judged(name, folder, error)
    except Exception as error:  # a fault of ours that one submission shows is none of the others
        return judged(name, folder, InputError(f"{type(error).__name__}: {error}"))


def judged(name: str, folder: Path, outcome: Report | Exception) -> Judged:
    """What an evaluation came to, with the submission's manifest and recipe, as far as they can be read."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        manifest = None
    try:
        check_own(folder / RECIPE)
        recipe = printable(read_whole(folder / RECIPE, TABLE_LIMIT).decode())
    except (OSError, UnicodeDecodeError, InputError):
        recipe = ""
    name = printable(name)
    if isinstance(outcome, Report):
        return Judged(name, manifest, outcome, recipe=recipe)
    return Judged(name, manifest, None, printable(str(outcome).replace(f"{folder}/", "")), recipe)


# --- ranking ----------------------------------------------------------------------------------------------------------


def boards(found: Sequence[Judged]) -> list[Board]:
    """A board for each task that has submissions; those of which not even the task is known come last."""
    entries = [entry_of(judged) for judged in found]
    tasks = sorted({entry.task for entry in entries}, key=lambda task: (not task, task))
    return [
        Board(task, tuple(ranked([e for e in entries if e.task == task], published(task))), published(task))
        for task in tasks
    ]


def entry_of(judged: Judged) -> Entry:
    """A submission as a line that has no rank yet; `reason` says why it will get none.

    The score is only claimed where it rests on claimed shares of a conditional model's paths, or on claimed
    frequencies of a language model's tokens, which are asked for where the test data is missing.
    """
    manifest, report = judged.manifest, judged.report
    if report is None or report.score is None:
        claims = manifest.claims if manifest else Claims()
        score, quality = (
            None if value is None else Told(float(value), verified=False) for value in (claims.score, claims.quality)
        )
        task = manifest.task if manifest else ""
        known = plugins.registered("task").get(task)
        metric = known.thing.metric if known else ""
        return Entry(judged.name, task, score=score, quality=quality, metric=metric, reason=judged.error)
    measured = report.quality is not None and report.quality.measured is not None
    told = manifest is not None and manifest.frequencies is not None and not measured
    sure = all(path.measured for path in report.paths) and not told
    return Entry(
        name=judged.name,
        task=report.task or "",
        score=Told(report.score.total, sure),
        storage=Told(report.score.storage, True),
        math=Told(report.score.math, sure),
        quality=_quality(report.quality),
        metric=report.quality.metric if report.quality else "",
        reason=_disqualified(report.quality),
        claims_fail=tuple(claim.name for claim in report.claims if claim.holds is False),
        note=report.provenance,
    )


def _quality(quality: Quality | None) -> Told | None:
    if quality is None:
        return None
    if quality.measured is not None:
        return Told(quality.measured, verified=True)
    return None if quality.claimed is None else Told(quality.claimed, verified=False)


def _disqualified(quality: Quality | None) -> str:
    """Why an entry with this quality is not ranked; empty where it is. What was not measured is taken as claimed."""
    figure = _quality(quality)
    if quality is None or figure is None:
        return "its quality is neither measured nor claimed"
    metric = METRICS[quality.metric]
    asked = f"{metric.sign} {metric.show(quality.threshold)}"
    if figure.verified:
        return "" if quality.passed else f"its quality misses {asked}: {quality.reason}"
    reaches = figure.value <= quality.threshold if metric.lower_is_better else figure.value >= quality.threshold
    return "" if reaches else f"even its claimed quality misses {asked}"


def ranked(entries: Sequence[Entry], others: Sequence[Published] = ()) -> list[Entry]:
    """The entries of one task by score, the lowest first; equal scores share a rank. Those with a reason come last."""
    fit = sorted((e for e in entries if not e.reason and e.score), key=lambda e: (_value(e.score), e.name))
    scores = [_value(e.score) for e in fit]
    stores, computes = (top_tenth([_value(getattr(e, name)) for e in fit]) for name in ("storage", "math"))
    before = [other.score for other in others if other.qualified]
    placed = [
        replace(
            e,
            rank=1 + sum(score < _value(e.score) for score in scores),
            distinctions=(
                *(["storage"] if _value(e.storage) <= stores else []),
                *(["compute"] if _value(e.math) <= computes else []),
            ),
            in_2019=1 + sum(score < _value(e.score) for score in before) if before else None,
        )
        for e in fit
    ]
    return [*placed, *sorted((e for e in entries if e not in fit), key=lambda e: e.name)]


def top_tenth(figures: Sequence[float]) -> float:
    """The highest figure that is still in the lowest 10 %, of at least one figure; infinite where there is none.

    The challenge distinguished the top 10 % of each task by storage and by math. Rounding down, and at least one, is
    what the published table follows: 2 of 20, 3 of 30, 1 of 5.
    """
    return sorted(figures)[max(1, len(figures) // 10) - 1] if figures else float("inf")


def _value(figure: Told | None) -> float:
    return float("inf") if figure is None else figure.value


# --- what was published -----------------------------------------------------------------------------------------------


@cache
def _publication() -> Mapping[str, Any]:
    text = (files("micronet_eval") / "data" / "leaderboard-2019.toml").read_text(encoding="utf-8")
    publication: dict[str, Any] = tomllib.loads(text)
    return publication


def source() -> str:
    """Where the published leaderboard stands."""
    return str(_publication()["source"])


def published(task: str) -> tuple[Published, ...]:
    """The entries of 2019 for a task, the best first; none for a task that the challenge did not have."""
    rows = _publication().get(task, []) if task != "source" else []
    return tuple(Published(**{**row, "distinctions": tuple(row.get("distinctions", ()))}) for row in rows)


# --- showing ----------------------------------------------------------------------------------------------------------


def as_json(found: Sequence[Board]) -> dict[str, Any]:
    """The boards as plain data."""
    return {"baseline": BASELINE, "source_2019": source(), "boards": [asdict(board) for board in found]}


def flat(found: Sequence[Board]) -> list[dict[str, object]]:
    """The boards as flat rows, for CSV and Markdown; those of 2019 have no storage, math and quality."""
    rows: list[dict[str, object]] = []
    for board in found:
        for e in board.entries:
            figures = {"score": e.score, "storage": e.storage, "math": e.math, "quality": e.quality}
            values = {name: figure.value if figure else None for name, figure in figures.items()}
            claimed = [name for name, figure in figures.items() if figure and not figure.verified]
            rows.append(
                {"board": "here", "task": e.task, "rank": e.rank, "name": e.name, **values,
                 "claimed": " ".join(claimed), "distinctions": " ".join(e.distinctions), "verified": e.verified,
                 "reason": e.reason}
            )  # fmt: skip
        for place, p in places(board.published):
            rows.append(
                {"board": "2019", "task": board.task, "rank": place, "name": p.name, "score": p.score,
                 "storage": None, "math": None, "quality": None, "claimed": "", "verified": p.verified,
                 "distinctions": " ".join(p.distinctions), "reason": "" if p.qualified else "missed the quality"}
            )  # fmt: skip
    return rows


def places(entries: Sequence[Published]) -> list[tuple[int | None, Published]]:
    """What was published, each with its place among those that reached the quality; None where one did not."""
    scores = [entry.score for entry in entries if entry.qualified]
    return [(1 + sum(s < e.score for s in scores) if e.qualified else None, e) for e in entries]


def render_boards(found: Sequence[Board], width: int = 80) -> RenderableType:
    """Each task's submissions, and below them what was published in 2019; figures that are only claimed say so."""
    parts: list[RenderableType] = []
    for board in found:
        parts.append(_ours(board, width))
        parts += [Text(f"{e.name}: not ranked, {e.reason}", "red") for e in board.entries if e.reason]
        parts += [
            Text(f"{e.name}: does not hold what it claims of {', '.join(e.claims_fail)}", "yellow")
            for e in board.entries
            if e.claims_fail
        ]
        parts += [Text(f"{e.name}: {e.note}", "dim") for e in board.entries if e.rank and e.note and not e.verified]
        if board.published:
            parts += ["", _theirs(board, width)]
            parts += [Text(f"{p.name}, {p.score:.4f}: {p.note}", "dim") for p in board.published if p.note]
        parts.append("")
    notes = "S and C: in the top 10 % by storage, by compute. A baseline scores 2. ? is claimed, not measured here."
    parts.append(Text(notes, "dim"))
    if any(board.published for board in found):
        parts.append(Text(f"2019: {source()}", "dim", overflow="fold"))
    return Group(*parts)


def _ours(board: Board, width: int) -> Table:
    figures = ("score", "storage", "math") if width >= NARROW else ("score",)
    title = Text(board.task or "task unknown", "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("submission", overflow="fold", min_width=12 if width >= SMALL else 6)
    for name in (*figures, "quality"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= SMALL:
        table.add_column("", no_wrap=True)
        if board.published:
            table.add_column("in 2019", justify="right", no_wrap=True)
    for e in board.entries:
        cells = [_figure(getattr(e, name), ".5f") for name in figures]
        quality = _figure(e.quality, METRICS[e.metric].style if e.metric else ".4g")
        place = [f"{e.in_2019}." if e.in_2019 else ""] if board.published else []
        more = [_letters(e.distinctions), *place] if width >= SMALL else []
        table.add_row(f"{e.rank}." if e.rank else "-", Text(e.name), *cells, quality, *more)
    return table


def _theirs(board: Board, width: int) -> Table:
    title = Text(f"{board.task}, published in 2019", "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("entry", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    if width >= SMALL:
        table.add_column("", no_wrap=True)
        table.add_column("organisers", no_wrap=True)
    for place, p in places(board.published):
        state = "verified" if p.verified else "" if p.qualified else "quality missed"
        more = [_letters(p.distinctions), state] if width >= SMALL else []
        table.add_row(f"{place}." if place else "-", Text(p.name), f"{p.score:.4f}", *more)
    return table


def _figure(figure: Told | None, style: str) -> Text:
    if figure is None:
        return Text("")
    return Text(f"{figure.value:{style}}{'' if figure.verified else '?'}", "" if figure.verified else "yellow")


def _letters(distinctions: Sequence[str]) -> str:
    return "".join(name[0].upper() for name in distinctions)
