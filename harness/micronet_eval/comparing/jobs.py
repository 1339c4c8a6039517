"""One job: a recipe or a submission with a seed, as plain data; and what came out of it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from micronet_eval.errors import InputError, SubmissionError
from micronet_eval.files import digest
from micronet_eval.isolation import AUTO, Isolation


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
    from micronet_eval.kept import KEPT, Kept
    from micronet_eval.recipe import trained

    base = Path(job.kept) / hashlib.sha256(job.base.encode()).hexdigest()[:32]
    base.parent.mkdir(parents=True, exist_ok=True)
    with base.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job may be training it; the lock ends with its process
        if not base.exists():
            trained(job.base, base, data)
    shutil.copytree(base, made / KEPT)
    Kept.mark(made / KEPT, job.recipe.encode())
