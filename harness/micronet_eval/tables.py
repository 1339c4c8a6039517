"""Flat rows as text: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

Table = Sequence[Mapping[str, object]]
"""Rows with the same keys, which are the heads of the columns."""

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def to_csv(table: Table) -> str:
    """Rows as comma-separated values with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().rstrip("\n")


def to_markdown(table: Table) -> str:
    """Rows as a Markdown table."""
    head = list(table[0])
    lines = [head, ["---"] * len(head), *([in_markdown(row[name]) for name in head] for row in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_markdown(value: object) -> str:
    """A value in one line of Markdown, and in one cell."""
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def to_latex(table: Table, bold: Sequence[bool]) -> str:
    """Rows as a tabular with the rules of booktabs; the first column to the left, the others to the right."""
    head = list(table[0])
    lines = [[_latex(name) for name in head]]
    for row, strong in zip(table, bold, strict=True):
        cells = [_latex(row[name]) for name in head]
        lines.append([rf"\textbf{{{cells[0]}}}", *cells[1:]] if strong else cells)
    first, *rest = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]
    )


def _latex(value: object) -> str:
    return "" if value is None else "".join(LATEX.get(sign, sign) for sign in " ".join(str(value).split()))
