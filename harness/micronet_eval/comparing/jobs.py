"""One job: a recipe or a submission with a seed, as plain data; and what came out of it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from micronet_eval import plugins
from micronet_eval.errors import InputError, SubmissionError, printable
from micronet_eval.files import digest
from micronet_eval.isolation import AUTO, Isolation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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
        """What the result depends on, with the seed and the version of the program."""
        return f"{_depends(self.recipe, self.data, self.folder)}-{self.seed}-{version('micronet-eval')}"


def _depends(recipe: str, data: str | None, folder: str = "") -> str:
    """A digest of a recipe or a submission: the bytes that it reads, where its data are, the versions of plugins."""
    whole = hashlib.sha256(recipe.encode())
    read = [folder] if folder else _read_by(tomllib.loads(recipe))
    for path in (inside for place in map(Path, read) for inside in (place, *sorted(place.glob("*")))):
        whole.update(os.fsencode(path.name) + digest(path))
    versions = sorted(map(" ".join, plugins.packages().values()))
    whole.update("\n".join([data or "", *versions]).encode())
    return whole.hexdigest()[:32]


def _read_by(table: object) -> Iterator[str]:
    """The folders and files that a recipe reads: what it starts from, its teachers, its policies of augmentation."""
    if isinstance(table, Mapping):
        for name, value in table.items():
            places = value if isinstance(value, list) else [value]
            if name in ("start", "teacher", "augment") and all(isinstance(place, str) for place in places):
                yield from places
            else:
                yield from _read_by(value)
    elif isinstance(table, list):
        for item in table:
            yield from _read_by(item)


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


def run(job: Job) -> Result:
    """Runs a job in this process; whatever goes wrong is a result, too."""
    import torch

    from micronet_eval.evaluation import evaluate

    torch.set_num_threads(1)  # the same numbers whatever the machine
    start = time.perf_counter()
    data = None if job.data is None else Path(job.data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if job.base:
                _lay(job, Path(folder) / "made", data)
                start = time.perf_counter()  # all of its jobs share the base, and one of them trains it
            report = evaluate(job.folder or _made(job, Path(folder), data), data, isolation=job.isolation)
        except (InputError, SubmissionError) as error:
            return _failed(job, str(error).replace(f"{folder}/", ""), start)
        except (Exception, SystemExit) as error:  # of a foreign strategy, whatever it is
            return _failed(job, f"{type(error).__name__}: {error}", start)
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


def _failed(job: Job, told: str, start: float) -> Result:
    return Result(job.name, job.seed, error=printable(told), seconds=time.perf_counter() - start)


def _made(job: Job, folder: Path, data: Path | None) -> Path:
    """The submission that the job's recipe makes; goes on from its base, where it has one."""
    from micronet_eval.recipe import compress

    (folder / "recipe.toml").write_text(job.recipe, encoding="utf-8")
    compress(folder / "recipe.toml", folder / "made", data, resume=bool(job.base))
    return folder / "made"


def _lay(job: Job, made: Path, data: Path | None) -> None:
    """Lays what the base of a job came to, which the first of its jobs trains, where its recipe will resume from."""
    from micronet_eval.kept import KEPT, Kept
    from micronet_eval.recipe import trained

    base = Path(job.kept) / _depends(job.base, job.data)
    base.parent.mkdir(parents=True, exist_ok=True)
    with base.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job may be training it; the lock ends with its process
        if not base.exists():
            for left in base.parent.glob(f"{base.name}-*"):  # of a run that was killed: nobody else trains it now
                shutil.rmtree(left)
            trained(job.base, base, data)
    shutil.copytree(base, made / KEPT)
    Kept.mark(made / KEPT, job.recipe.encode())
