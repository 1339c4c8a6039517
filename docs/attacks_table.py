"""Fills the tables of docs/security.md: python -m docs.attacks_table.

A row for each attack and fault of a test, for each target of the fuzzer, and for each module that was mutated.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent / "security.md"
TESTS = Path(__file__).parent.parent / "tests"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
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


def fuzzed() -> str:
    """Inputs and findings of each target, with each engine that ran."""
    found = json.loads((RESULTS / "fuzz.json").read_text())["runs"]
    engines = list(dict.fromkeys(run["engine"] for run in found))
    lines = [f"| inputs | {' | '.join(engines)} | findings |", "|---|" + "---:|" * (len(engines) + 1)]
    for target in (*dict.fromkeys(run["target"] for run in found), "all"):
        runs = [run for run in found if target in ("all", run["target"])]
        inputs = [sum(run["inputs"] for run in runs if run["engine"] == engine) for engine in engines]
        told = " | ".join(f"{count:,}" if count else "not run" for count in inputs)
        lines.append(f"| {target} | {told} | {sum(len(run['findings']) for run in runs)} |")
    return "\n".join(lines) + "\n"


def mutated() -> str:
    """How many mutants of each module the tests killed; of the others, for how many there is a reason."""
    found = json.loads((RESULTS / "mutants.json").read_text())["modules"]
    lines = ["| module | mutants | tried | killed | | survivors with a reason |", "|---|---:|---:|---:|---:|---:|"]
    keys = ("mutants", "tried", "killed", "same")
    sums = {key: sum(module[key] for module in found.values()) for key in keys}
    for name, module in {**found, "all": sums}.items():
        share = f"{module['killed'] / module['tried']:.1%}"
        lines.append(
            f"| {name} | {module['mutants']} | {module['tried']} | {module['killed']} | {share} | {module['same']} |"
        )
    return "\n".join(lines) + "\n"


def page_with_tables() -> str:
    """The page as it should be."""
    text = PAGE.read_text()
    for part, written in {**{part: table(part) for part in FILES}, "fuzz": fuzzed(), "mutants": mutated()}.items():
        begin, end = f"<!-- {part}: written by docs/attacks_table.py -->\n", f"<!-- end of {part} -->\n"
        before, _, rest = text.partition(begin)
        text = before + begin + written + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables())
