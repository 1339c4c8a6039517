"""Strategies side by side: a grid of them on one trained network, recipes, submissions; results as they come in.

Every cell of the grid is a recipe: the stages of a base recipe, then its strategies, with fine-tuning behind each. It
is run, packed and evaluated as any other, so that what stands in the table is what a submission would score. The base
is trained once for each seed, and all its cells go on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import tomli_w

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError, printable
from micronet_eval.files import digest, read_whole
from micronet_eval.isolation import AUTO, Isolation
from micronet_eval.submission import TABLE_LIMIT, read_table
from micronet_eval.task import METRICS

Cell = tuple[tuple[plugins.Kind, str, Mapping[str, Any]], ...]
"""What is applied one after the other: kind, name, options of each strategy."""


@dataclass(frozen=True)
class Job:
    """One recipe or one submission to evaluate, with one seed. Everything that it needs, as plain data.

    `recipe` is the text of a recipe and `base` that of its first stages, on their own a recipe, too; of a submission
    `folder` is where it is.
    """

    name: str
    seed: int = 0
    recipe: str = ""
    base: str = ""
    folder: str = ""
    data: str | None = None
    kept: str = ""
    """Where bases are kept between jobs."""
    isolation: Isolation = AUTO
    """How the code of a submission is run."""

    @property
    def key(self) -> str:
        """What the result depends on: the recipe or the submission's bytes, and the version of the program."""
        whole = hashlib.sha256(self.recipe.encode())
        for path in sorted(Path(self.folder).glob("*")) if self.folder else ():
            whole.update(os.fsencode(path.name) + digest(path))
        return f"{whole.hexdigest()[:32]}-{self.seed}-{version('micronet-eval')}"


@dataclass(frozen=True)
class Result:
    """What came out of a job; `error` says why nothing did."""

    name: str
    seed: int
    task: str = ""
    params32: float | None = None
    ops32: float | None = None
    storage: float | None = None
    math: float | None = None
    score: float | None = None
    quality: float | None = None
    passed: bool | None = None
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Row:
    """The mean over seeds, and the standard deviation where there are several; `best` marks the Pareto-optimal rows."""

    name: str
    task: str
    seeds: int
    storage: float | None
    math: float | None
    score: float | None
    quality: float | None
    spread: Mapping[str, float] = field(default_factory=dict)
    passed: bool | None = None
    seconds: float = 0.0
    best: bool = False
    errors: tuple[str, ...] = ()


# --- the grid ---------------------------------------------------------------------------------------------------------


def parse(kind: plugins.Kind, text: str) -> list[Cell]:
    """`name:option=value,value,option=value` as every combination of the values, each a cell of one strategy.

    Raises InputError where there is no such strategy, or no such option.
    """
    name, _, rest = text.partition(":")
    strategy = plugins.lookup(kind, name)
    values: dict[str, list[Any]] = {}
    option = ""
    for item in filter(None, rest.split(",")):
        before, equals, after = item.partition("=")
        if equals:
            option = before.strip().replace("-", "_")
            if option not in strategy.model_fields:
                raise InputError(f"{kind} {name}: {plugins.unknown('option', option, strategy.model_fields)}")
        elif not option:
            raise InputError(f"{kind} {text!r}: write its options like {name}:option=value,value")
        values.setdefault(option, []).append(_value(after if equals else item))
    return [((kind, name, dict(zip(values, chosen, strict=True))),) for chosen in itertools.product(*values.values())]


def options(text: str) -> dict[str, Any]:
    """`epochs=2,learning_rate=0.001` as a table."""
    pairs = [item.partition("=") for item in text.split(",")]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise InputError(f"--fine-tune {text!r}: {wrong[0]!r} has no value; write it like epochs=2,learning_rate=0.001")
    return {name.strip().replace("-", "_"): _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    """A number, true, false, or else the text itself."""
    try:
        return json.loads(text.replace("_", ""))
    except json.JSONDecodeError:
        return text.strip()


def grid(alternatives: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Every combination of one cell out of each group: the groups are kinds, their cells alternatives."""
    groups = [group for group in alternatives if group]
    return [tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*groups)] if groups else []


def title(cell: Cell) -> str:
    """How a cell is called: `magnitude:ratio=0.5 + fixed-point:weight_bits=4`."""
    parts = []
    for _, name, options in cell:
        told = ",".join(f"{option}={value}" for option, value in options.items())
        parts.append(f"{name}:{told}" if told else name)
    return " + ".join(parts)


def jobs_of(
    cells: Sequence[Cell], base: Path, seeds: int, fine_tune: Mapping[str, Any] | None, data: Path | None, kept: Path
) -> list[Job]:
    """A job for each cell and seed, on the network that the recipe `base` trains. Raises InputError if that is none.

    Behind each strategy comes `fine_tune`, the options of a training stage; quantizers come behind merged batch norm.
    """
    found: list[Job] = []
    recipe = read_table(base)
    stages = recipe.get("stages", [])
    for cell, seed in itertools.product(cells, range(seeds)):
        more: list[dict[str, Any]] = []
        for kind, name, options in cell:
            more += [{"merge": "batch-norm"}] if kind == "quantizer" else []
            more += [{kind: name, **options}] + ([{"train": dict(fine_tune)}] if fine_tune else [])
        seeded = {**recipe, "seed": int(recipe.get("seed", 0)) + seed}
        seeded["submission"] = {"name": title(cell), "authors": ["micronet-eval compare"]}
        found.append(
            Job(
                name=title(cell),
                seed=seed,
                recipe=tomli_w.dumps({**seeded, "stages": [*stages, *more]}),
                base=tomli_w.dumps({**seeded, "submission": {"name": "base", "authors": ["micronet-eval"]}}),
                data=None if data is None else str(data),
                kept=str(kept),
            )
        )
    return found


def job_of(path: Path, data: Path | None, isolation: Isolation = AUTO) -> Job:
    """A job for a recipe or for a submission's folder. Raises InputError where the path is neither."""
    root = None if data is None else str(data)
    if path.is_dir():
        return Job(name=printable(path.resolve().name), folder=str(path), data=root, isolation=isolation)
    try:
        return Job(name=printable(path.stem if path.stem != "recipe" else path.resolve().parent.name),
                   recipe=read_whole(path, TABLE_LIMIT).decode(), data=root)  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no submission's folder and no recipe: {error}") from error


# --- running ----------------------------------------------------------------------------------------------------------


def run(job: Job) -> Result:
    """Runs a job in this process; whatever goes wrong is a result, too."""
    import torch

    from micronet_eval.evaluation import evaluate

    torch.set_num_threads(1)  # the same numbers whatever the machine
    start = time.perf_counter()
    data = None if job.data is None else Path(job.data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = evaluate(job.folder or _made(job, Path(folder), data), data, isolation=job.isolation)
        except (InputError, SubmissionError) as error:
            told = str(error).replace(f"{folder}/", "")
            return Result(job.name, job.seed, error=told, seconds=time.perf_counter() - start)
        except Exception as error:  # of a foreign strategy, whatever it is
            return Result(
                job.name, job.seed, error=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - start
            )
    total, quality = report.score, report.quality
    return Result(
        name=job.name,
        seed=job.seed,
        task=report.task or "",
        params32=report.storage.params32,
        ops32=report.math.ops32,
        storage=total.storage if total else None,
        math=total.math if total else None,
        score=total.total if total else None,
        quality=quality.measured if quality else None,
        passed=quality.passed if quality else None,
        seconds=time.perf_counter() - start,
    )


def _made(job: Job, folder: Path, data: Path | None) -> Path:
    """The submission that the job's recipe makes; goes on from its base, which the first of its jobs trains."""
    from micronet_eval.recipe import compress

    (folder / "recipe.toml").write_text(job.recipe, encoding="utf-8")
    made = folder / "made"
    if job.base:
        _lay(job, made, data)
    compress(folder / "recipe.toml", made, data, resume=bool(job.base))
    return made


def _lay(job: Job, made: Path, data: Path | None) -> None:
    """Lays what the base of a job came to where its recipe will resume from."""
    from micronet_eval.recipe import KEPT, Kept, trained

    base = Path(job.kept) / hashlib.sha256(job.base.encode()).hexdigest()[:32]
    if not base.exists():
        trained(job.base, base, data)
    shutil.copytree(base, made / KEPT)
    Kept.mark(made / KEPT, job.recipe.encode())


def compare(
    jobs: Sequence[Job],
    results: Path,
    executor: str = "local",
    workers: int | None = None,
    seen: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The result of every job, in their order; those that `results`, a SQLite file, has already are not run again.

    Each result is written as soon as it is there, so that a run that was killed goes on with what is missing. A job
    that failed is run again the next time. Raises InputError where there is no such executor.
    """
    execute = plugins.lookup("executor", executor)
    with closing(_opened(results)) as store:
        done = {job: Result(**json.loads(row[0])) for job in jobs if (row := _row(store, job)) is not None}
        for result in done.values():
            seen(result)
        missing = [job for job in jobs if job not in done]
        # The first job of each base trains it for the others.
        first = list({job.base: job for job in reversed(missing) if job.base}.values())
        rest = [job for job in missing if job not in first]
        for batch in (first, rest):
            for job, result in execute(run, batch, workers or os.cpu_count() or 1):
                done[job] = result
                if not result.error:
                    with store:
                        store.execute(
                            "INSERT OR REPLACE INTO results VALUES (?, ?)", (job.key, json.dumps(asdict(result)))
                        )
                seen(result)
    return [done[job] for job in jobs]


def _opened(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = sqlite3.connect(path)
        store.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT)")
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{path} cannot hold results: {error}; name another file") from error
    return store


def _row(store: sqlite3.Connection, job: Job) -> tuple[str] | None:
    found: tuple[str] | None = store.execute("SELECT result FROM results WHERE key = ?", (job.key,)).fetchone()
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def rows(results: Iterable[Result]) -> list[Row]:
    """One row for each name, the mean over its seeds; those that no other row beats in score and quality are marked."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    found = [_mean(group) for group in groups.values()]
    return [
        Row(**{**vars(row), "best": not any(_beats(other, row) for other in found) and row.score is not None})
        for row in found
    ]


def sorted_rows(found: Sequence[Row], by: str) -> list[Row]:
    """The rows by one of their figures, the best first; those without it come last. `given` leaves them in order."""
    if by == "given":
        return list(found)

    def place(row: Row) -> tuple[bool, float]:
        value = getattr(row, by)
        if value is None:
            return True, 0.0
        higher = by == "quality" and not METRICS[plugins.lookup("task", row.task).metric].lower_is_better
        return False, -value if higher else value

    return sorted(found, key=place)


def _mean(group: Sequence[Result]) -> Row:
    good = [result for result in group if not result.error]
    figures: dict[str, Any] = {}
    spread: dict[str, float] = {}
    for name in ("storage", "math", "score", "quality"):
        values = [value for result in good if (value := getattr(result, name)) is not None]
        figures[name] = fmean(values) if values else None
        if len(values) > 1:
            spread[name] = stdev(values)
    passed = [result.passed for result in good if result.passed is not None]
    return Row(
        name=group[0].name,
        task=next((result.task for result in good), ""),
        seeds=len(good),
        spread=spread,
        passed=all(passed) if passed else None,
        seconds=sum(result.seconds for result in group),
        errors=tuple(dict.fromkeys(result.error for result in group if result.error)),
        **figures,
    )


def _beats(other: Row, row: Row) -> bool:
    """Whether `other` is better in score or quality, and worse in neither. Rows of another task do not count."""
    if other.score is None or row.score is None or other.task != row.task:
        return False
    if other.quality is None or row.quality is None:
        return False
    metric = METRICS[plugins.lookup("task", row.task).metric]
    sign = -1 if metric.lower_is_better else 1
    gain = sign * (other.quality - row.quality)
    return other.score <= row.score and gain >= 0 and (other.score < row.score or gain > 0)


Executor = Callable[[Callable[[Job], Result], Sequence[Job], int], Iterator[tuple[Job, Result]]]
"""Runs every job by the function, so many at a time, and yields each with its result as it ends."""
