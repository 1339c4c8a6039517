"""Where `compare` runs its jobs: in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from micronet_eval.comparing import Job, Result
from micronet_plugins.worker import prepare


def here(run: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """One after the other in this process."""
    for job in jobs:
        yield job, run(job)


def local(run: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """So many processes, each with one thread. A job whose process dies fails, and no other."""
    waiting = list(jobs)
    while waiting:
        # Nobody says which of several jobs it was that died, and all of their processes end: each is tried alone.
        for job in (yield from _together(run, waiting, workers)):
            if (yield from _together(run, [job], 1)):
                yield job, Result(job.name, job.seed, error="the process that ran it died, out of memory perhaps")


def _together(
    run: Callable[[Job], Result], waiting: list[Job], workers: int
) -> Generator[tuple[Job, Result], None, list[Job]]:
    """Takes jobs off `waiting` and runs them; where a process dies, the jobs that ran then are returned."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    running: dict[Future[Result], Job] = {}
    theirs, ours = context.Pipe(duplex=False)
    most = min(workers, len(waiting))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        theirs,
        ours,
        ProcessPoolExecutor(most, context, prepare, (theirs, place)) as pool,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running[pool.submit(run, waiting[0])] = waiting[0]
                    del waiting[0]
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in sorted(ended, key=lambda future: future.exception() is not None):
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            return list(running.values())
        except BaseException:
            ours.close()  # nobody waits for what still runs
            raise
    return []
