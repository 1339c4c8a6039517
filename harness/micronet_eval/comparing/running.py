"""Runs jobs by an executor; every result is in a SQLite file as soon as it is there."""

from __future__ import annotations

import inspect
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from micronet_eval import plugins
from micronet_eval.comparing.grid import options
from micronet_eval.comparing.jobs import Job, Result, run
from micronet_eval.errors import InputError

Executor = Callable[[Callable[[Job], Result], Sequence[Job], int], Iterator[tuple[Job, Result]]]
"""Runs every job by the function, so many at a time, and yields each with its result as it ends.

Keyword-only parameters beside these three are its options, `--executor name:option=value`.
"""

Watch = Callable[[Sequence[Result], int], None]
"""Called with all results so far, and how many jobs run now: at the beginning, and after each result."""


def executor_of(text: str) -> Executor:
    """The executor `name` or `name:option=value,option=value`.

    Raises InputError where there is no such executor or option, or the option cannot have such a value.
    """
    name, _, rest = text.partition(":")
    execute = plugins.lookup("executor", name)
    parameters = inspect.signature(execute).parameters.values()
    given = options(rest, f"executor {name}", [p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
    hints = get_type_hints(execute)
    for option, value in given.items():
        try:
            TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"executor {name}: option {option!r}: {error.errors()[0]['msg']}") from error
    return partial(execute, **given)


def results_of(
    jobs: Sequence[Job],
    results: Path,
    executor: str = "local",
    workers: int | None = None,
    watch: Watch = lambda results, running: None,
) -> list[Result]:
    """The result of every job, in their order; those that `results`, a SQLite file, has already are not run again.

    Each result is written as soon as it is there, so that a run that was killed goes on with what is missing. A job
    that failed is run again the next time. Raises InputError where there is no such executor, or where the file cannot
    be read or written.
    """
    execute, workers = executor_of(executor), workers or os.cpu_count() or 1
    with _opened(results) as store:
        keys = {job: job.key for job in jobs}  # of what they read now, not when they have ended
        kept = {job: row for job in jobs if (row := _row(store, keys[job])) is not None}
        done = {job: replace(Result(**json.loads(row[0])), name=job.name) for job, row in kept.items()}
        missing = [job for job in jobs if job not in done]
        watch([*done.values()], min(len(missing), workers))
        for job, result in execute(run, missing, workers):
            done[job] = result
            if not result.error:
                with store:
                    store.execute(
                        "INSERT OR REPLACE INTO results VALUES (?, ?)", (keys[job], json.dumps(asdict(result)))
                    )
            watch([*done.values()], min(len(jobs) - len(done), workers))
    return [done[job] for job in jobs]


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot hold results: {error}; name another file by --results") from error
    try:
        with closing(sqlite3.connect(path)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT)")
            yield store
    except sqlite3.Error as error:  # no such file, another program's, a full disk
        raise InputError(f"{path} cannot hold results: {error}; name another file by --results") from error


def _row(store: sqlite3.Connection, key: str) -> tuple[str] | None:
    found: tuple[str] | None = store.execute("SELECT result FROM results WHERE key = ?", (key,)).fetchone()
    return found
