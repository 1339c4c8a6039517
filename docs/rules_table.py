"""Fills the table of docs/scoring.md that says where each rule is: python -m docs.rules_table."""

import ast
from pathlib import Path

from micronet_eval.rules import RULES

PAGE = Path(__file__).parent / "scoring.md"
TESTS = Path(__file__).parent.parent / "tests"
BEGIN, END = "<!-- rules: written by docs/rules_table.py -->\n", "<!-- end of rules -->\n"


def marked_tests() -> dict[str, list[str]]:
    """The tests that are marked with a rule, as file: name, by the rule's id."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for function in ast.parse(path.read_text()).body:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rule":
                    for argument in mark.args:
                        found.setdefault(ast.literal_eval(argument), []).append(f"{path.name}: {function.name}")
    return found


def table() -> str:
    """The rows of the table."""
    tests = marked_tests()
    lines = ["| id | rule | code | tests |", "|---|---|---|---|"]
    for rule in RULES:
        code = "<br>".join(f"`{name.replace(':', ': ')}`" for name in rule.code)
        shown = "<br>".join(f"`{name}`" for name in tests.get(rule.id, []))
        lines.append(f"| `{rule.id}` | {rule.says} | {code} | {shown} |")
    return "\n".join(lines) + "\n"


def page_with_table() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_table())
