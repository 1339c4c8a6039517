"""Where the score of one submission differs from another's: architecture, sparsity and bit-widths, module by module.

Each model is counted in three steps: dense at 32 bits (every weight, no mask), then sparse (zero weights left out,
masks stored), then at its bit-widths. The difference in the first step is the architecture's, the difference in what
the second step saves is sparsity's, the difference in what the third saves is that of the bit-widths. So the three
parts sum to the whole exactly, for every module, for storage and for math. *(ours)*
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pydantic import ValidationError

from micronet_eval import evaluation, plugins
from micronet_eval.errors import InputError
from micronet_eval.evaluation import Report
from micronet_eval.files import read_whole
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.scoring import Count, Module

REPORT_LIMIT = 1 << 30  # bytes


@dataclass(frozen=True)
class Change:
    """The parts of a change; `module` and which of `storage`, `math` or the `score` it is of."""

    module: str
    architecture: Fraction
    sparsity: Fraction
    bits: Fraction

    @property
    def total(self) -> Fraction:
        return self.architecture + self.sparsity + self.bits


@dataclass(frozen=True)
class Diff:
    """What changed from `before` to `after`: all in shares of the baseline, as the score is. Modules by their weight.

    `exact_accumulators` and `fp16_accumulators` are the two scores that would be (accumulators.what_if).
    """

    before: Report
    after: Report
    storage: Change
    math: Change
    score: Change
    modules: tuple[Change, ...]

    def to_dict(self) -> dict[str, object]:
        """As JSON has it: numbers, no fractions."""
        return {
            "before": _scores(self.before),
            "after": _scores(self.after),
            "change": {c.module: _parts(c) for c in (self.storage, self.math, self.score)},
            "modules": [{"module": c.module, **_parts(c)} for c in self.modules],
        }


def diff(before: Report | str | Path, after: Report | str | Path, isolation: Isolation = AUTO) -> Diff:
    """Splits the change of the score between two reports, or what `report_of` makes one of.

    Raises InputError where the two scores cannot be compared.
    """
    before, after = report_of(before, isolation), report_of(after, isolation)
    for name in ("task", "ruleset"):
        if (one := getattr(before, name)) != (other := getattr(after, name)):
            raise InputError(f"{before.submission} and {after.submission} differ in {name}: {one!r} and {other!r}")
    for report in (before, after):
        if report.score is None:
            raise InputError(f"{report.submission} has no score; compare reports that were counted with a task")
    task = plugins.lookup("task", before.task or "")
    of_storage, of_math = 1 / (32 * Fraction(task.storage)), 1 / Fraction(task.math)
    groups = _groups([m.module for m in before.modules], [m.module for m in after.modules])
    storage = _changes(before.modules, after.modules, groups, _bits)
    math = _changes(before.modules, after.modules, groups, _ops)
    modules = [
        Change(
            module,
            *(s * of_storage + m * of_math for s, m in zip(storage[module], math[module], strict=True)),
        )
        for module in storage
    ]
    modules.sort(key=lambda c: (-abs(c.total), -abs(c.architecture) - abs(c.sparsity) - abs(c.bits), c.module))
    return Diff(
        before,
        after,
        _sum("storage", [Change("", *(part * of_storage for part in parts)) for parts in storage.values()]),
        _sum("math", [Change("", *(part * of_math for part in parts)) for parts in math.values()]),
        _sum("score", modules),
        tuple(modules),
    )


def report_of(source: Report | str | Path, isolation: Isolation = AUTO) -> Report:
    """The report on a submission's folder, its quality not measured, or the one in a JSON file.

    Raises InputError that names the file.
    """
    if isinstance(source, Report):
        return source
    path = Path(source)
    if path.is_dir() or path.suffix != ".json":
        return evaluation.costs(path, isolation=isolation)
    try:
        return Report.model_validate_json(read_whole(path, REPORT_LIMIT).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        field = f"field {where!r}: " if where else ""
        raise InputError(f"{path} is no report of this version: {field}{first['msg']}; write it with "
                         "micronet-eval FOLDER --format json") from error  # fmt: skip


_Parts = tuple[Fraction, Fraction, Fraction]


def _bits(module: Module) -> tuple[int, int, int]:
    return module.dense_bits, module.sparse_bits, module.bits


def _ops(module: Module) -> tuple[Count, Count, float]:
    return module.dense_ops, module.sparse_ops, module.ops32


def _changes(
    before: Iterable[Module],
    after: Iterable[Module],
    groups: Mapping[str, str],
    steps: Callable[[Module], tuple[Count, Count, float]],
) -> dict[str, _Parts]:
    """By group of modules what each step changes."""
    sums: dict[str, list[Fraction]] = {}
    for sign, modules in ((-1, before), (1, after)):
        for module in modules:
            dense, sparse, real = map(Fraction, steps(module))
            parts = sums.setdefault(groups[module.module], [Fraction(0)] * 3)
            for i, part in enumerate((dense, sparse - dense, real - sparse)):
                parts[i] += sign * part
    return {module: (parts[0], parts[1], parts[2]) for module, parts in sums.items()}


def _groups(before: list[str], after: list[str]) -> dict[str, str]:
    """Module -> the name that it is compared under: a layer that became several is compared with them as one.

    A module that only one of the models has counts under the nearest module above it that only the other has.
    """
    common = set(before) & set(after)
    groups = {module: module for module in common}
    for own, others in ((set(before) - common, set(after) - common), (set(after) - common, set(before) - common)):
        for module in own:
            above = [module[:i] for i, letter in enumerate(module) if letter == "."]
            groups[module] = next((m for m in reversed(above) if m in others), module)
    return groups


def _sum(name: str, changes: Iterable[Change]) -> Change:
    parts = [(c.architecture, c.sparsity, c.bits) for c in changes]
    return Change(name, *(sum(column, Fraction(0)) for column in zip(*parts, strict=True)))


def _parts(change: Change) -> dict[str, float]:
    return {
        "architecture": float(change.architecture),
        "sparsity": float(change.sparsity),
        "bits": float(change.bits),
        "total": float(change.total),
    }


def _scores(report: Report) -> dict[str, object]:
    assert report.score is not None
    return {
        "submission": report.submission,
        "storage": report.score.storage,
        "math": report.score.math,
        "score": report.score.total,
        "exact_accumulators": report.what_if.exact_accumulators.score,
        "fp16_accumulators": report.what_if.fp16_accumulators.score,
    }
