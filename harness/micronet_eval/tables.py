"""Flat rows as text: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from micronet_eval.errors import InputError

Table = Sequence[Mapping[str, object]]
"""Rows with the same keys, which are the heads of the columns."""

MARKDOWN = {sign: f"\\{sign}" for sign in "\\`*_{}[]<>#|"}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def frame(table: Table) -> Any:
    """Rows as a pandas DataFrame. Raises InputError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("pandas is not installed; pip install pandas") from error
    return pandas.DataFrame(table)


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
    rows = [[in_markdown(row[name]) for name in head] for row in table]
    lines = [[in_markdown(name) for name in head], ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_markdown(value: object) -> str:
    """A value as text in one line of Markdown, and in one cell: no markup, no HTML."""
    return _escaped(value, MARKDOWN)


def to_latex(table: Table, bold: Sequence[bool]) -> str:
    """Rows as a tabular with the rules of booktabs; the first column to the left, the others to the right."""
    head = list(table[0])
    lines = [[_escaped(name, LATEX) for name in head]]
    for row, strong in zip(table, bold, strict=True):
        cells = [_escaped(row[name], LATEX) for name in head]
        lines.append([rf"\textbf{{{cells[0]}}}", *cells[1:]] if strong else cells)
    first, *rest = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]
    )


def _escaped(value: object, signs: Mapping[str, str]) -> str:
    return "" if value is None else "".join(signs.get(sign, sign) for sign in " ".join(str(value).split()))
