"""A leaderboard as web pages: a folder of static files that a browser opens without a server and without network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from micronet_eval import breakdown
from micronet_eval.evaluation import Report
from micronet_eval.pages.comparison import write_comparison
from micronet_eval.pages.plots import Plot, Point, path_plot, score_plot
from micronet_eval.pages.site import templates, whole
from micronet_eval.ranking import Board, Entry, Judged, as_json, boards, entry_of, judge, named, places, source
from micronet_eval.task import METRICS

Node = list[Any]
"""A module of the treemap: [name, stored bits, ops32, [modules in it]]. The two figures include those within."""


@dataclass(frozen=True)
class Weighted:
    """An operation with weights. `sparsity` is the share of its module's operations that zero
    weights save, None where nothing was to be saved; `accumulator_bits` is None where no products are summed."""

    module: str
    op: str
    input_bits: int
    weight_bits: int
    accumulator_bits: int | None
    sparsity: float | None
    storage_bits: int
    ops32: float


def write_pages(*folders: str | Path, html: str | Path, data: str | Path | None = None) -> None:
    """Evaluates the submissions in `folders` and writes their pages, as `write`, into the folder `html`."""
    root = None if data is None else Path(data)
    write([judge(name, path, root) for name, path in named(map(Path, folders)).items()], Path(html))


def write(found: Sequence[Judged], folder: Path) -> None:
    """Writes index.html, a page for each submission, and the same data as JSON beside each into `folder`.

    Raises InputError where the folder holds anything but such pages, or cannot be written (`site.whole`).
    """
    with whole(folder) as site:
        _build(found, site)


def _build(found: Sequence[Judged], site: Path) -> None:
    pages = templates()
    standings = boards(found)
    slugs = _slugs([judged.name for judged in found])
    entries = _entries(standings, found)
    page_of = dict(zip(entries, slugs, strict=True))
    (site / "submissions").mkdir()
    index = pages.get_template("index.html").render(
        root="",
        boards=standings,
        places=places,
        page_of=page_of.__getitem__,
        plots=[(board.task, plot) for board in standings if (plot := _score_plot(board, entries, slugs))],
        source=source(),
    )
    (site / "index.html").write_text(index, encoding="utf-8")
    (site / "index.json").write_text(json.dumps(as_json(standings), indent=1), encoding="utf-8")
    page = pages.get_template("submission.html")
    for judged, entry, slug in zip(found, entries, slugs, strict=True):
        text = page.render(root="../", judged=judged, entry=entry, slug=slug, **_details(judged))
        (site / "submissions" / f"{slug}.html").write_text(text, encoding="utf-8")
        (site / "submissions" / f"{slug}.json").write_text(_json(judged), encoding="utf-8")


def _slugs(names: Sequence[str]) -> list[str]:
    """A file name for each, of small letters, digits and hyphens, no two the same."""
    found: list[str] = []
    for name in names:
        short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "submission"
        tries = [short, *(f"{short}-{number}" for number in range(2, len(names) + 2))]
        found.append(next(slug for slug in tries if slug not in found))
    return found


def _entries(standings: Sequence[Board], found: Sequence[Judged]) -> list[Entry]:
    """The line of each submission, in the order of `found`: the one that says the same, but for its place."""
    unplaced = {replace(e, rank=None, distinctions=(), in_2019=None): e for board in standings for e in board.entries}
    return [unplaced[entry_of(judged)] for judged in found]


def _score_plot(board: Board, entries: Sequence[Entry], slugs: Sequence[str]) -> Plot | None:
    """Score against quality, where the submissions of a task have both; what was not evaluated has no storage."""
    points = [
        Point(e.score.value, e.quality.value, e.name, f"submissions/{slug}.html", e.verified)
        for e, slug in zip(entries, slugs, strict=True)
        if e.task == board.task and e.score and e.quality and e.storage
    ]
    metric = next((e.metric for e in board.entries if e.metric), "")
    return score_plot(points, METRICS[metric], [p.score for p in board.published]) if points else None


def _details(judged: Judged) -> dict[str, Any]:
    """All that a submission's page shows besides its line of the leaderboard."""
    steps = judged.manifest.provenance.steps if judged.manifest else []
    report = judged.report
    quality = report.quality if report else None
    metric = METRICS[quality.metric] if quality else METRICS["top-1"]
    points = [Point(s.score, s.quality, f"{number}", "", True) for number, s in enumerate(steps, 1)
              if s.score is not None and s.quality is not None]  # fmt: skip
    return {
        "report": report,
        "steps": steps,
        "path": path_plot(points, metric) if points else None,
        "tree": tree(report) if report else None,
        "weighted": weighted(report) if report else [],
        "modules": breakdown.by_module((*report.layers, *report.free_layers), 2) if report else [],
        "threshold": f"{metric.sign} {metric.show(quality.threshold)}" if quality else "",
    }


def tree(report: Report) -> Node:
    """The modules with what they store and compute; what a module with children does by itself is a child, too.

    A module that only wraps another one is drawn as one with it.
    """
    rows = breakdown.by_module((*report.layers, *report.free_layers), depth=100)
    nodes: dict[str, Node] = {}
    for row in rows:
        name = "" if row.depth == 0 else row.module
        nodes[name] = [row.module.rpartition(".")[2], row.storage_bits, row.ops32, []]
        if name:
            nodes[name.rpartition(".")[0]][3].append(nodes[name])
    return _completed(nodes[""])


def _completed(node: Node) -> Node:
    name, bits, ops32, within = node
    children = [_completed(child) for child in within if child[1] or child[2]]
    own = ["(itself)", bits - sum(child[1] for child in children), ops32 - sum(child[2] for child in children), []]
    if children and (own[1] > 0 or own[2] > 1e-6 * ops32):
        children.append(own)
    elif len(children) == 1 and children[0][3]:
        return [f"{name}.{children[0][0]}", bits, ops32, children[0][3]]
    return [name, bits, ops32, children]


def weighted(report: Report) -> list[Weighted]:
    """The operations that store weights or multiply by them, in order of execution."""
    modules: Mapping[str, Any] = {module.module: module for module in report.modules}
    rows = []
    for layer in report.layers:
        module = modules.get(layer.module)
        if not layer.weight_bits or not (layer.storage_bits or layer.macs):
            continue
        saved = 1 - module.sparse_ops / module.dense_ops if module and module.dense_ops and layer.macs else None
        accumulator = layer.accumulator_bits if layer.macs else None
        op = layer.op.partition(".")[2].removesuffix("olution").strip("_")
        rows.append(
            Weighted(layer.module, op, layer.input_bits, layer.weight_bits, accumulator, saved, layer.storage_bits,
                     layer.ops32)
        )  # fmt: skip
    return rows


def _json(judged: Judged) -> str:
    """The report, exactly as `micronet-eval --format json` has it; without one, the reason why there is none."""
    if judged.report is None:
        return json.dumps({"submission": judged.name, "error": judged.error})
    return judged.report.model_dump_json(by_alias=True)


__all__ = ["write", "write_comparison", "write_pages"]
