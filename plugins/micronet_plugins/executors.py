"""Where `compare` runs its jobs: in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from micronet_eval.comparing import Job, Result


def here(run: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """One after the other in this process."""
    for job in jobs:
        yield job, run(job)


def local(run: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """So many processes, each with one thread. A process that dies fails its jobs, not the others that are done."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _prepare) as pool:
        running = {pool.submit(run, job): job for job in jobs}
        try:
            for future in as_completed(running):
                job = running[future]
                try:
                    yield job, future.result()
                except BrokenProcessPool:
                    yield job, Result(job.name, job.seed, error="the process that ran it died, out of memory perhaps")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare() -> None:
    """Ends this process when the one that started it is gone, also where that was killed; and keeps it silent.

    What a library prints would run through the live view on the terminal. What matters is in the result.
    """
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
