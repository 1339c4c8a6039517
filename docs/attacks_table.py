"""Fills the tables of docs/security.md, a row for each attack and fault of a test: python -m docs.attacks_table."""

import ast
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent / "security.md"
TESTS = Path(__file__).parent.parent / "tests"
FILES = {
    "code": ("test_hostile.py",),
    "files": ("test_hostile_files.py",),
    "faults": ("test_faults.py",),
}
LEVELS = {"level": "both", "sandbox": "bubblewrap"}
"""A test that takes one of these fixtures runs at both levels of isolation, or in bubblewrap only."""


def rows(file: str) -> Iterator[tuple[str, str, str, str]]:
    """What each marked test tries, what happens, at which level of isolation, and the test."""
    for function in ast.parse((TESTS / file).read_text()).body:
        for mark in getattr(function, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.attack":
                what, happens = map(ast.literal_eval, mark.args)
                fixtures = [argument.arg for argument in function.args.args]
                level = next((level for name, level in LEVELS.items() if name in fixtures), "any")
                yield what, happens, level, f"{file}: {function.name}"


def table(part: str) -> str:
    """The rows of one part."""
    lines = ["| attack | what happens | isolation | test |", "|---|---|---|---|"]
    if part == "faults":
        lines = ["| fault | what happens | test |", "|---|---|---|"]
    for file in FILES[part]:
        for what, happens, level, test in rows(file):
            told = (what, happens, f"`{test}`") if part == "faults" else (what, happens, level, f"`{test}`")
            lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def page_with_tables() -> str:
    """The page as it should be."""
    text = PAGE.read_text()
    for part in FILES:
        begin, end = f"<!-- {part}: written by docs/attacks_table.py -->\n", f"<!-- end of {part} -->\n"
        before, _, rest = text.partition(begin)
        text = before + begin + table(part) + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables())
