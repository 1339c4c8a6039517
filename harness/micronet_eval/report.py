"""Reports for people: rich tables, and the same rows as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from micronet_eval.evaluation import Claim, Report
from micronet_eval.quality import Quality
from micronet_eval.scoring import Layer
from micronet_eval.task import METRICS

COSTLIEST = 10
NARROW = 72  # columns of a terminal below which less is shown of each operation
VERDICTS = {True: Text("holds", "green"), False: Text("fails", "bold red"), None: Text("not measured", "yellow")}


def render(report: Report, all_layers: bool = False, width: int = 80) -> RenderableType:
    """One report: summary, claims beside measurements, where the cost lies."""
    heading = " · ".join(filter(None, (report.submission, report.task, report.ruleset)))
    parts: list[RenderableType] = [Rule(Text(heading, "bold"), align="left"), _summary(report), _details(report)]
    if report.quality is not None:
        parts.append(Text.assemble(("Quality: ", "bold"), _reason(report.quality), overflow="fold"))
    if report.provenance:
        parts.append(Text.assemble(("Provenance: ", "bold"), report.provenance, overflow="fold"))
    parts += [Text.assemble(("Warning: ", "bold yellow"), warning) for warning in report.warnings]
    parts.append(_layers(report, all_layers, width))
    parts.append(Text(_coverage(report), "dim"))
    return Group(*parts)


def render_many(reports: Sequence[Report]) -> Table:
    """Several reports, a row each."""
    table = Table(title="Submissions")
    table.add_column("submission", overflow="fold")
    table.add_column("task", overflow="fold")
    for name in ("storage", "math", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("quality", justify="right", no_wrap=True)
    table.add_column("claims", overflow="fold")
    for report in reports:
        total = report.score
        table.add_row(
            Text(report.submission),
            Text(report.task or ""),
            *((_short(total.storage), _short(total.math), _short(total.total)) if total else ("", "", "")),
            _quality(report),
            _verdict_of_claims(report.claims),
        )
    return table


def rows(reports: Sequence[Report]) -> list[dict[str, object]]:
    """The figures of reports as flat rows, for CSV and Markdown."""
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
            "passed": r.passed,
        }
        for r in reports
    ]


def to_csv(table: Sequence[dict[str, object]]) -> str:
    """Rows as comma-separated values with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().rstrip("\n")


def to_markdown(table: Sequence[dict[str, object]]) -> str:
    """Rows as a Markdown table."""
    head = list(table[0])
    lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _summary(report: Report) -> Table:
    claims = {claim.name: claim for claim in report.claims}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    for name in ("measured", "claimed", "of baseline"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("claim")
    ratio = report.score
    lines: list[tuple[str, str, str, str]] = [
        ("params32", f"{report.storage.params32:,.0f}", "storage", _share(ratio.storage if ratio else None)),
        ("ops32", f"{report.math.ops32:,.0f}", "math", _share(ratio.math if ratio else None)),
    ]
    if ratio:
        lines.append(("score", f"{ratio.total:.6g}", "score", ""))
    for label, measured, name, share in lines:
        table.add_row(Text(label, "bold"), measured, _claimed(claims.get(name)), share, _verdict(claims.get(name)))
    if report.quality is not None:
        claim = claims.get("quality")
        claimed = "" if claim is None else METRICS[report.quality.metric].show(claim.claimed)
        table.add_row(Text("quality", "bold"), _quality(report), claimed, _threshold(report), _verdict(claim))
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
        f"{math.mults:,.0f} multiplications ({math.macs:,.0f} in dot products), {math.adds:,.0f} additions",
    )
    table.add_row("", f"at 32 bit: {math.mult_ops32:,.0f} multiplications + {math.add_ops32:,.0f} additions")
    if report.freebie:
        table.add_row("", "counted as 16 bit: nothing is quantized below 16 bits (freebie)")
    return table


def _layers(report: Report, every: bool, width: int) -> Table:
    shown = list(report.layers) if every else sorted(report.layers, key=lambda x: -x.ops32)[:COSTLIEST]
    title = "All priced operations" if every else f"The {len(shown)} costliest of {len(report.layers):,} operations"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold", min_width=8)
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
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in shown:
        operation = layer.op.partition(".")[2].removesuffix("olution").strip("_")
        table.add_row(Text(layer.module), Text(operation), *(cell(layer) for cell in columns.values()))
    return table


def _count(number: float) -> str:
    """A count in at most seven characters: 12,345 or 1.234 M."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


def _bits(layer: Layer) -> str:
    return f"{layer.input_bits}·{layer.weight_bits}" if layer.weight_bits else str(layer.input_bits)


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


def print_report(reports: Sequence[Report], console: Console, all_layers: bool = False) -> None:
    """Prints one report in full, several as a table."""
    console.print(render(reports[0], all_layers, console.width) if len(reports) == 1 else render_many(reports))
