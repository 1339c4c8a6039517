"""Reports for people: rich tables, and the same figures as flat rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from rich import box
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from micronet_eval.accumulators import Figure
from micronet_eval.breakdown import ModuleCost
from micronet_eval.checking import Check
from micronet_eval.crosscheck import CrossCheck
from micronet_eval.diffing import Change, Diff
from micronet_eval.dotted import WIDEST
from micronet_eval.evaluation import Claim, Report
from micronet_eval.explaining import Explanation
from micronet_eval.quality import Quality
from micronet_eval.scoring import Layer, number
from micronet_eval.task import METRICS

COSTLIEST = 10
WIDE = 100  # columns of a terminal from which on everything is shown of each module
NARROW = 80  # columns of a terminal below which less is shown of each operation
SMALL = 56  # columns of a terminal below which only the figures that matter most are shown
NAME = 10  # columns of a terminal that a submission's name has at least
LIST = 14  # columns of a terminal that names of failing claims have at least
BORDER = 3  # columns of a terminal between the texts of two columns of a table
VERDICTS = {True: Text("holds", "green"), False: Text("fails", "bold red"), None: Text("not measured", "yellow")}


def render(report: Report, all_layers: bool = False, width: int = 80) -> RenderableType:
    """One report: summary, claims beside measurements, where the cost lies."""
    heading = " · ".join(filter(None, (report.submission, report.task, report.ruleset)))
    parts: list[RenderableType] = [Rule(Text(heading, "bold"), align="left"), _summary(report, width)]
    parts.append(_details(report))
    if report.quality is not None:
        parts.append(Text.assemble(("Quality: ", "bold"), _reason(report.quality), overflow="fold"))
    if report.provenance:
        parts.append(Text.assemble(("Provenance: ", "bold"), report.provenance, overflow="fold"))
    parts += [Text.assemble(("Warning: ", "bold yellow"), warning) for warning in report.warnings]
    parts.append(_layers(report, all_layers, width))
    if report.cross_check is not None:
        parts.append(_cross_check(report, report.cross_check, all_layers, width))
    parts.append(Text(_coverage(report), "dim"))
    return Group(*parts)


def render_many(reports: Sequence[Report], width: int = 80) -> Table:
    """Several reports, a row each; narrow terminals show less of each."""
    columns: dict[str, Callable[[Report], Text]] = {
        "task": lambda report: Text(report.task or ""),
        "storage": lambda report: Text(_short(report.score.storage) if report.score else ""),
        "math": lambda report: Text(_short(report.score.math) if report.score else ""),
        "score": lambda report: Text(_short(report.score.total) if report.score else ""),
        "quality": _quality,
        "claims": lambda report: _verdict_of_claims(report.claims),
    }
    cells = {name: [cell(report) for report in reports] for name, cell in columns.items()}
    widths = {name: max(len(name), *(cell.cell_len for cell in column)) for name, column in cells.items()}
    widths["claims"] = min(widths["claims"], max(LIST, width // 5))  # names of failing claims may be folded
    shown = list(columns)
    for name in ("math", "storage", "task", "claims"):  # what is told least by the others stays longest
        if NAME + sum(widths[name] for name in shown) + BORDER * (len(shown) + 1) >= width:
            shown.remove(name)
    table = Table(title="Submissions")
    table.add_column("submission", overflow="fold", min_width=NAME)
    for name in shown:
        if name in ("task", "claims"):
            table.add_column(name, overflow="fold", width=widths[name])
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for i, report in enumerate(reports):
        table.add_row(Text(report.submission), *(cells[name][i] for name in shown))
    return table


def render_checks(report: Report, found: Sequence[Check], width: int = 80) -> RenderableType:
    """The checks of a submission, a row each, and why its quality could not be measured."""
    fails = any(check.holds is False for check in found)
    verdict = Text("failed", "bold red") if fails else Text("passed", "green")
    total = f"score {report.score.total:.6g}" if report.score else "no score"
    heading = Text(" · ".join(filter(None, (report.submission, report.task, report.ruleset))), "bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", overflow="fold", width=9 if width < SMALL else None)  # of "threshold"
    table.add_column("", no_wrap=True)
    table.add_column("figures", overflow="fold")
    for check in found:
        table.add_row(Text(check.name), VERDICTS[check.holds], Text(check.figures))
    parts: list[RenderableType] = [Rule(heading, align="left"), Text.assemble(verdict, ", ", total), table]
    if report.quality is not None and report.quality.measured is None:
        parts.append(Text.assemble(("Quality: ", "bold"), _reason(report.quality), overflow="fold"))
    parts += [Text.assemble(("Warning: ", "bold yellow"), warning) for warning in report.warnings]
    return Group(*parts)


def rows(reports: Sequence[Report]) -> list[dict[str, object]]:
    """The figures of reports as flat rows, for CSV and Markdown; None is what was not measured."""
    return [
        {
            "submission": r.submission,
            "task": r.task,
            "params32": r.storage.params32,
            "ops32": r.math.ops32,
            "storage": r.score.storage if r.score else None,
            "math": r.score.math if r.score else None,
            "score": r.score.total if r.score else None,
            "quality": r.quality.measured if r.quality else None,
            "passed": r.quality.passed if r.quality else None,
            "claims": {True: "held", False: "failed", None: None}[r.claims_held],
        }
        for r in reports
    ]


def _summary(report: Report, width: int) -> Table:
    """What was measured beside what was claimed: as columns, on narrow terminals as text that may be folded."""
    claims = {claim.name: claim for claim in report.claims}
    ratio = report.score
    lines: list[tuple[str, str, str, str]] = [
        ("params32", f"{report.storage.params32:,.0f}", "storage", _share(ratio.storage if ratio else None)),
        ("ops32", f"{report.math.ops32:,.0f}", "math", _share(ratio.math if ratio else None)),
    ]
    if ratio:
        lines.append(("score", f"{ratio.total:.6g}", "score", ""))
    rows: list[tuple[str, str | Text, str, str | Text, Text]] = [
        (label, measured, _claimed(claims.get(name)), share, _verdict(claims.get(name)))
        for label, measured, name, share in lines
    ]
    if report.quality is not None:
        claim = claims.get("quality")
        claimed = "" if claim is None else METRICS[report.quality.metric].show(claim.claimed)
        rows.append(("quality", _quality(report), claimed, _threshold(report), _verdict(claim)))
    table = Table(box=None, show_header=width >= NARROW, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    if width < NARROW:
        table.add_column(overflow="fold")
    else:
        for name in ("measured", "claimed", "of baseline"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("claim")
    for label, measured, claimed, share, verdict in rows:
        cells: tuple[str | Text, ...] = (measured, claimed, share, verdict)
        if width < NARROW:
            beside = (", ", share, "" if label == "quality" else " of baseline") if share else ()
            cells = (Text.assemble(measured, *beside, *(("; claimed ", claimed, ": ", verdict) if claimed else ())),)
        table.add_row(Text(label, "bold"), *cells)
    return table


def _claimed(claim: Claim | None) -> str:
    if claim is None:
        return ""
    return f"{claim.claimed:.6g}" if claim.name == "score" else f"{claim.claimed:,.0f}"


def _details(report: Report) -> Table:
    storage, math = report.storage, report.math
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row(Text("stored", "bold"), f"{storage.parameters:,} values, {storage.nonzeros:,} not zero")
    table.add_row(
        "",
        f"{storage.bits:,} bits = {storage.value_bits:,} values + {storage.mask_bits:,} masks + "
        f"{storage.overhead_bits:,} overhead",
    )
    if storage.file_bytes is not None:
        table.add_row("", f"{storage.file_bytes:,} bytes in the file, {storage.bits / 8:,.0f} counted")
    table.add_row(
        Text("executed", "bold"),
        f"{math.mults:,.0f} multiplications ({math.macs:,.0f} in dot products), {math.adds:,.0f} additions"
        + (", the mean over the paths" if report.paths else ""),
    )
    table.add_row("", f"at 32 bit: {math.mult_ops32:,.0f} multiplications + {math.add_ops32:,.0f} additions")
    if report.activation.peak_bits:
        peak = f"{report.activation.peak_bits:,} bits of activations alive at once, at {report.activation.at}"
        table.add_row(Text("peak", "bold"), Text(peak))
    label = "what if"
    others = report.what_if
    kinds = (
        ("exact", others.exact_accumulators, "narrower"),
        ("fp16", others.fp16_accumulators, "narrower"),
        ("32-bit", others.wide_accumulators, "wider"),
    )
    for name, figure, how in kinds:
        if figure.additions:
            table.add_row(Text(label, "bold"), f"{name} accumulators: {_figure(figure)} {how}")
            label = ""
    if storage.file_bytes is not None:
        table.add_row(Text("isolation", "bold"), report.isolation)
    if report.freebie:
        table.add_row(Text("freebie", "bold"), "counted as 16 bit: nothing is quantized below 16 bits")
    for path in report.paths:
        source = "measured" if path.measured else "claimed, not measured"
        table.add_row(
            Text(f"path {path.name}", "bold"),
            f"{path.share:.2%} of the examples ({source}): {path.mults:,} multiplications, {path.adds:,} additions",
        )
    return table


def _figure(figure: Figure) -> str:
    total = f"ops32 {figure.ops32:,.0f}" if figure.score is None else f"score {figure.score:.6g}"
    applies = f"{figure.additions:,} of {figure.accumulations:,}"
    return f"{total}; {'all' if figure.additions == figure.accumulations else applies} accumulating additions"


def _layers(report: Report, every: bool, width: int) -> Table:
    shown = list(report.layers) if every else sorted(report.layers, key=lambda x: -x.ops32)[:COSTLIEST]
    title = "All priced operations" if every else f"The {len(shown)} costliest of {len(report.layers):,} operations"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold", min_width=8)
    if width >= SMALL:
        table.add_column("operation", overflow="fold", min_width=8)
    columns: dict[str, Callable[[Layer], str]] = {
        "mults": lambda layer: _count(layer.mults),
        "adds": lambda layer: _count(layer.adds),
        "bits": _bits,
        "ops32": lambda layer: _count(layer.ops32),
        "stored": lambda layer: _count(layer.storage_bits),
    }
    if width < NARROW:
        del columns["mults"], columns["adds"]
    if width < SMALL:
        del columns["bits"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in shown:
        operation = [Text(layer.op.partition(".")[2].removesuffix("olution").strip("_"))] if width >= SMALL else []
        table.add_row(Text(layer.module), *operation, *(cell(layer) for cell in columns.values()))
    return table


def render_modules(report: Report, modules: Sequence[ModuleCost], width: int = 80) -> RenderableType:
    """The cost of each module, children below their parents; narrow terminals show less of each."""
    title = Text(f"{report.submission}: what each module costs, all that runs inside of it included")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold", min_width=8)
    columns: dict[str, Callable[[ModuleCost], str]] = {
        "mults": lambda m: _count(m.mults),
        "adds": lambda m: _count(m.adds),
        "MACs": lambda m: _count(m.macs),
        "ops32": lambda m: _count(m.ops32),
        "of math": lambda m: f"{m.math_share:.1%}",
        "stored bits": lambda m: _count(m.storage_bits),
        "of storage": lambda m: f"{m.storage_share:.1%}",
    }
    if width < WIDE:
        del columns["mults"], columns["adds"]
    if width < NARROW:
        del columns["MACs"]
    if width < SMALL:
        del columns["of math"], columns["of storage"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=width >= WIDE)
    for module in modules:
        name = "  " * (module.depth - 1) + module.module.rpartition(".")[2]
        table.add_row(Text(name, "bold" if not module.depth else ""), *(cell(module) for cell in columns.values()))
    return Group(table, Text(_coverage(report), "dim"))


def _count(number: float) -> str:
    """A count in at most seven characters: 12,345 or 1.234 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


def _bits(layer: Layer) -> str:
    sums = f" Σ{layer.accumulator_bits}" if layer.accumulator_bits < WIDEST else ""
    return f"{layer.input_bits}·{layer.weight_bits}{sums}" if layer.weight_bits else str(layer.input_bits)


def _coverage(report: Report) -> str:
    coverage = report.coverage
    free = ", ".join(name.removeprefix("aten.") for name in coverage.free)
    return (
        f"{coverage.executed:,} operations executed: {coverage.priced:,} priced, "
        f"{coverage.folded:,} on parameters alone, the rest free ({free or 'none'})"
    )


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.6g}"


def _short(ratio: float) -> str:
    return f"{ratio:.5f}"


def _threshold(report: Report) -> Text:
    assert report.quality is not None
    text = f"{METRICS[report.quality.metric].sign} {report.quality.threshold:.4g}"
    if report.quality.passed is None:
        return Text(text)
    return Text(
        f"{text} {'passed' if report.quality.passed else 'FAILED'}", "green" if report.quality.passed else "bold red"
    )


def _reason(quality: Quality) -> str:
    if quality.measured is not None:
        return quality.reason
    claimed = "" if quality.claimed is None else f"; claimed {METRICS[quality.metric].show(quality.claimed)}"
    return f"not measured: {quality.reason}{claimed}"


def _quality(report: Report) -> Text:
    quality = report.quality
    if quality is None or quality.measured is None:
        return Text("not measured", "yellow")
    return Text(METRICS[quality.metric].show(quality.measured), "green" if quality.passed else "bold red")


def _verdict(claim: Claim | None) -> Text:
    return Text("") if claim is None else VERDICTS[claim.holds]


def _verdict_of_claims(claims: Sequence[Claim]) -> Text:
    if failing := [claim.name for claim in claims if claim.holds is False]:
        return Text(f"fail: {', '.join(failing)}", "bold red")
    holding = sum(claim.holds is True for claim in claims)
    return (
        Text(f"{holding} of {len(claims)} hold", "green" if holding == len(claims) else "") if claims else Text("none")
    )


def _cross_check(report: Report, check: CrossCheck, every: bool, width: int) -> RenderableType:
    """The modules that differ, and what is left to say about the whole."""
    most = sorted(check.differences, key=lambda d: (-d.unexplained, -abs(d.dense - (d.fvcore or 0)), -d.dense))
    shown = check.differences if every else most[:COSTLIEST]
    which = "" if len(shown) == len(check.differences) else f", {len(shown)} are shown"
    title = f"MACs: {len(check.differences):,} of {check.modules:,} modules differ{which}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold", min_width=8)
    shows = 3 if width >= SMALL else 2  # columns of counts; the last two seldom differ
    for name in ("ours", "fvcore", "torch")[:shows]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", min_width=8)
    for d in shown:
        why = Text("; ".join(d.why), "bold red" if d.unexplained else "")
        table.add_row(Text(d.module or "(forward)"), *map(_macs, (d.ours, d.fvcore, d.flop_counter)[:shows]), why)
    table.add_section()
    table.add_row("all", *map(_macs, (check.ours, check.fvcore, check.flop_counter)[:shows]), _unexplained(check))
    beside = [f"Beside MACs we price {report.math.mults - check.ours:,} mults and {report.math.adds:,} adds"]
    if check.ours != report.math.macs:
        beside = [f"This is one forward pass; the report counts the mean, {report.math.macs:,.10g} MACs"]
    if check.fvcore_other:
        beside.append(f"fvcore counts {', '.join(f'{n:,} of {op}' for op, n in check.fvcore_other.items())}")
    if check.fvcore_skips:
        beside.append(f"fvcore passes over {', '.join(f'{op} ({n}x)' for op, n in check.fvcore_skips.items())}")
    failed = [Text(f"{name} could not run: {why}", "yellow") for name, why in check.failed.items()]
    return Group(table, *failed, Text("; ".join(beside), "dim"))


def _macs(count: int | None) -> str:
    return "-" if count is None else _count(count)


def _unexplained(check: CrossCheck) -> Text:
    zeros = f"{check.dense - check.ours:,} with zero weights; " if check.dense != check.ours else ""
    if check.unexplained:
        return Text(f"{zeros}{check.unexplained:,} unexplained", "bold red")
    return Text(f"{zeros}nothing is unexplained" if check.differences else "all agree", "green")


def render_explanations(explanations: Sequence[Explanation]) -> RenderableType:
    """Each operation with its rule, formula and figures, and the sums over all of them, each by its share."""
    parts: list[RenderableType] = []
    for e in explanations:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in (("rule", e.rule), *e.lines):
            if text:
                table.add_row(Text(name), Text(text))
        parts += [Text.assemble((e.module, "bold"), " ", e.op), table, ""]
    mults, adds = (number(sum(Fraction(getattr(e, n)) * e.share for e in explanations)) for n in ("mults", "adds"))
    ops32, bits = sum(e.ops32 * e.share for e in explanations), sum(e.storage_bits for e in explanations)
    whole = f"{mults:,} mults, {adds:,} adds, {float(ops32):,.10g} ops32, {bits:,} bits stored"
    return Group(*parts, Text.assemble(("together ", "bold"), whole))


def render_diff(diff: Diff, every: bool = False, width: int = 80) -> RenderableType:
    """What changed from one report to another: storage, math and score, then the modules that changed most.

    Small terminals show the score alone, and of modules the whole change.
    """
    before, after = diff.before, diff.after
    assert before.score is not None and after.score is not None
    heading = f"{before.submission} -> {after.submission} · {after.task} · {after.ruleset}"
    shows = slice(-1 if width < SMALL else 0, None)  # the last column is the sum of the others
    whole = _plain_table("")
    for name in ("storage", "math", "score")[shows]:
        whole.add_column(name, justify="right", no_wrap=True)
    rows = [diff.storage, diff.math, diff.score][shows]
    whole.add_row("before", *map(_short, [before.score.storage, before.score.math, before.score.total][shows]))
    for i, name in enumerate(("architecture", "sparsity", "bit-widths")):
        whole.add_row(name, *(_cells(change)[i] for change in rows))
    whole.add_row("after", *map(_short, [after.score.storage, after.score.math, after.score.total][shows]))
    changed = [c for c in diff.modules if c.architecture or c.sparsity or c.bits]
    shown = changed if every else changed[:COSTLIEST]
    table = _plain_table("module")
    for name in ("archit.", "sparsity", "bits", "total")[shows]:
        table.add_column(name, justify="right", no_wrap=True)
    for change in shown:
        table.add_row(Text(change.module or "(forward)"), *_cells(change)[shows])
    if rest := changed[len(shown) :]:
        parts = [sum((getattr(c, part) for c in rest), Fraction(0)) for part in ("architecture", "sparsity", "bits")]
        table.add_row(f"{len(rest):,} others", *_cells(Change("", *parts))[shows])
    table.add_section()
    table.add_row("all", *_cells(diff.score)[shows])
    figures = [
        f"With {name} accumulators (what if): {one.score:.5f} -> {other.score:.5f}"
        for name, one, other in (
            ("exact", before.what_if.exact_accumulators, after.what_if.exact_accumulators),
            ("fp16", before.what_if.fp16_accumulators, after.what_if.fp16_accumulators),
        )
        if one.score is not None and other.score is not None
    ]
    return Group(Rule(Text(heading, "bold"), align="left"), whole, table, Text("\n".join(figures), "dim"))


def _plain_table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=8)
    return table


def _cells(change: Change) -> tuple[str, ...]:
    """Differences of the score, with as many digits as the score is printed with."""
    parts = (change.architecture, change.sparsity, change.bits, change.total)
    return tuple(f"{float(part):+.5f}" if part else "0" for part in parts)


def print_report(reports: Sequence[Report], console: Console, all_layers: bool = False) -> None:
    """Prints one report in full, several as a table."""
    console.print(
        render(reports[0], all_layers, console.width) if len(reports) == 1 else render_many(reports, console.width)
    )
