"""Mutation testing: small mistakes are made in the code that scores and packs, and the tests have to find them.

python -m benchmarks.mutants                  a seeded sample of each module; writes results/mutants.json
python -m benchmarks.mutants packing          of this module; writes its entry there
python -m benchmarks.mutants packing again    those that survived, after tests were added; writes its entry there
python -m benchmarks.mutants packing 40       of this module, so many; writes nothing

A mutant differs from the module in one place: a comparison, an operator, a constant, a condition, a default. It runs in
a forked process that has torch imported already, against the tests of that module only, until the first failure.
Mutants that only change a message or an annotation are not made. A survivor is a gap in the tests, or changes nothing
that can be seen: then REASONS says why.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
CORE = ROOT / "harness" / "micronet_eval"
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
SAMPLE, SEED, SECONDS = 24, 1, 240  # of the processor, however busy the machine is

_COSTS = ("test_costs.py", "test_operations.py", "test_counting.py")
TESTS: dict[str, tuple[str, ...]] = {
    "scoring": (
        "test_counting.py",
        "test_accumulators.py",
        "test_narrow_accumulators.py",
        "test_costs.py",
        "test_explain.py",
        "test_conditional.py",
    ),
    "dotted": ("test_narrow_accumulators.py", "test_accumulators.py"),
    "costs.dot_products": _COSTS,
    "costs.elementwise": _COSTS,
    "costs.moves": _COSTS,
    "costs.norms": _COSTS,
    "costs.reductions": _COSTS,
    "costs.resampling": _COSTS,
    "costs.scales": ("test_operations.py", "test_quantized_models.py"),
    "storage": ("test_counting.py", "test_quantized_models.py", "test_formats.py", "test_packing.py"),
    "precision": ("test_counting.py", "test_quantized_models.py", "test_quantizers.py"),
    "packing": ("test_packing.py", "test_formats.py", "test_bad_input.py", "test_hostile_files.py"),
}
"""Module -> the tests that cover it, the quickest first."""

_LOOKED_AT = "how much of a tensor is looked at first, before all of it, changes the time that it takes"
REASONS: dict[tuple[str, str], str] = {
    ("scoring", "widest = FREEBIE_BITS if freebie else 65"): "no format has more than 64 bits",
    ("packing", "_CHUNK = 1 << 17"): "codes are packed piece by piece, and the pieces may be of any multiple of 8",
    (
        "packing",
        "return np.bool_ if width == 1 else np.int64",
    ): "the same whole numbers, which take more memory while they are read",
    (
        "packing",
        "tensor = getattr(owner, attribute, None)",
    ): "None has no attribute with the name of a tensor",
    ("costs.dot_products", "k = op.args[1].shape[-1]"): "both sides of a distance have vectors of the same length",
    (
        "costs.moves",
        "found = op.args[2:4] if op.name == 'aten.index_select' else op.args[1]",
    ): "there is no fourth argument",
    ("storage", "is_index: bool = True"): "what is made without it is overhead, or of 32 bits: the freebie stays",
    ("storage", "part = self.is_nonzero[:len(self.is_nonzero) // 4 // block[0] + block[0]]"): _LOOKED_AT,
    ("storage", "part = self.is_nonzero[:len(self.is_nonzero) // 4 * block[0] * block[0]]"): _LOOKED_AT,
    (
        "storage",
        "found = [number for number in numbers(op) if number_width(number) > 2]",
    ): "a number is of 1 bit or of 32",
    (
        "storage",
        "places = Integer(index_bits(len(order)), True, 'int64')",
    ): "the code makes them again: their bits count, and nobody writes them",
    (
        "storage",
        "return Plain.of(value.dtype) if value.dtype in FLOAT8 else FixedPoint(max(2, grid.code_bits), 1)",
    ): "only the bits matter: what is computed from signs or quantized values is counted, and refused when packed",
}
"""(module, the line that a mutant has) -> why it survives: it changes nothing that can be seen."""

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
            ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
            ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd}  # fmt: skip


# --- mutants ----------------------------------------------------------------------------------------------------------


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node can become."""
    other: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        other.ops[0] = COMPARED[type(node.ops[0])]()
        yield other
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not isinstance(node.left, ast.JoinedStr):
        other.op = COMPUTED[type(node.op)]()
        yield other
    elif isinstance(node, ast.BoolOp):
        other.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield other.operand
    elif isinstance(node, ast.IfExp):
        yield other.body
        yield other.orelse
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        other.value = not node.value if type(node.value) is bool else node.value + 1
        yield other
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        other.value = ast.Constant(None)
        yield other
    elif isinstance(node, ast.Continue):
        yield ast.Break()


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every place that can be changed: a parent, its field, the place in a list, and the node there."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list") or isinstance(
            tree, ast.Raise | ast.JoinedStr | ast.Assert
        ):
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or _says_nothing(tree, node):
                continue
            yield tree, field, i if isinstance(value, list) else None, node
            yield from places(node)


def _says_nothing(parent: ast.AST, node: ast.AST) -> bool:
    """Docstrings, subscripts of types, and imports."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return (
        text
        or isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(parent, ast.AnnAssign) and node is parent.target)
    )


def mutants(module: str) -> list[tuple[int, str, str]]:
    """Every mutant of a module: the line, what was changed into what, and the whole text."""
    tree, found = _tree(module), list[tuple[int, str, str]]()
    for parent, field, i, node in list(places(tree)):
        for other in changes(node):
            ast.copy_location(other, node)
            before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(other))
            _put(parent, field, i, other)
            found.append((getattr(node, "lineno", 0), f"{before}  ->  {after}", ast.unparse(tree)))
            _put(parent, field, i, node)
    return found


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text())


def changed_line(module: str, text: str) -> str:
    """The first line of a mutant that the module has not."""
    lines = zip(ast.unparse(_tree(module)).splitlines(), text.splitlines(), strict=False)
    return next(there.strip() for here, there in lines if here != there)


def _put(parent: Any, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def _path(module: str) -> Path:
    path = CORE / f"{module.replace('.', '/')}.py"
    return path if path.exists() else CORE / module / "__init__.py"


# --- running ----------------------------------------------------------------------------------------------------------


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from another text."""

    def __init__(self, module: str, text: str) -> None:
        self.name, self.text, self.file = f"micronet_eval.{module}", text, str(_path(module))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.file, loader=self) if name == self.name else None  # type: ignore[arg-type]

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.text, self.file, "exec"), module.__dict__)


def survives(module: str, text: str, tests: tuple[str, ...]) -> bool:
    """Whether all tests pass with this text in the place of the module. Too long a run is a failure."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(5 * SECONDS)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.meta_path.insert(0, _Mutated(module, text))
            import pytest

            words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", f"--rootdir={ROOT}"]
            os._exit(int(pytest.main([*words, *(str(ROOT / "tests" / test) for test in tests)])))
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status == 0


def main(modules: list[str], count: int | None, again: bool = False) -> None:
    """Makes a sample of mutants of each module and runs the tests against them.

    `again`: against those only that survived the last time. Tests may have been added since, the module has to be the
    same.
    """
    import click  # noqa: F401
    import fvcore.nn  # noqa: F401  # what takes long to import, once for all
    import hypothesis  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import rich.console  # noqa: F401
    import torch._dynamo
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    before: dict[str, Any] = json.loads(RESULTS.read_text())["modules"] if RESULTS.exists() else {}
    for module in modules:
        every = mutants(module)
        drawn = random.Random(f"{SEED} {module}").sample(every, min(count or SAMPLE, len(every)))
        tried, start, survivors = len(drawn), time.monotonic(), list[dict[str, Any]]()
        if again:
            path = _path(module).relative_to(ROOT)
            if _git("show", f"{before[module]['commit']}:{path}") != (ROOT / path).read_text():
                raise SystemExit(f"{module} is another since it was tried; try it whole")
            left = {(survivor["line"], survivor["change"]) for survivor in before[module]["survivors"]}
            drawn = [mutant for mutant in drawn if mutant[:2] in left]
        if not survives(module, _path(module).read_text(), TESTS[module]):
            raise SystemExit(f"the tests of {module} fail without any mutant")
        for line, change, text in sorted(drawn, key=lambda mutant: mutant[0]):
            alive = survives(module, text, TESTS[module])
            if alive:
                now = changed_line(module, text)
                reason = {"reason": REASONS[module, now]} if (module, now) in REASONS else {}
                survivors.append({"line": line, "change": change, "now": now, **reason})
            print(f"{module:20} {line:4} {'SURVIVES' if alive else 'killed':8} {change[:120]!r}", flush=True)
        same = sum("reason" in survivor for survivor in survivors)
        report[module] = {"commit": _git("rev-parse", "HEAD").strip(), "mutants": len(every), "tried": tried,
                          "killed": tried - len(survivors), "same": same,
                          "seconds": round(time.monotonic() - start), "survivors": survivors}  # fmt: skip
    print(_rates(report.values()))
    if count is None:
        found = {**before, **report}
        whole = {
            "seed": SEED,
            "sample": SAMPLE,
            "modules": {module: found[module] for module in TESTS if module in found},
        }
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _rates(found: Collection[dict[str, Any]]) -> str:
    """Of all mutants, and of those that change something that can be seen."""
    tried, killed, same = (sum(module[key] for module in found) for key in ("tried", "killed", "same"))
    return (
        f"{killed} of {tried} killed, {killed / tried:.1%}; {killed / (tried - same):.1%} without what cannot be seen"
    )


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in TESTS]
    counts = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    main(chosen or list(TESTS), counts[0] if counts else None, "again" in sys.argv)
