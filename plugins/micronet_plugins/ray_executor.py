"""Where `compare` runs its jobs: on a Ray cluster (https://docs.ray.io), one of its own or an existing one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from micronet_eval.comparing import Job, Result
from micronet_eval.errors import InputError


def on_ray(
    run: Callable[[Job], Result], jobs: Sequence[Job], workers: int, *, address: str = "", gpus: float = 0
) -> Iterator[tuple[Job, Result]]:
    """So many tasks of one processor, and `gpus` GPUs, each.

    `address` is that of an existing cluster: HOST:PORT, ray://HOST:PORT, or auto; without one a cluster is started on
    this machine and ends with the jobs. The machines need the same packages, and a folder that they share where jobs
    evaluate submissions or read data. A task whose process dies fails, as any other that fails, and not the others.
    Raises InputError where Ray is not installed, no cluster answers, or it has too few GPUs.
    """
    if not jobs:
        return
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        mend = "pip install 'micronet-eval[ray]'"
        raise InputError(f"the executor ray needs Ray; install it with: {mend}") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = not ray.is_initialized()
    if started:
        try:
            own: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"executor ray: no cluster at {address or 'this machine'}: {error}") from error
    try:
        if gpus > (there := ray.cluster_resources().get("GPU", 0)):
            raise InputError(f"executor ray: a job asks for {gpus:g} GPUs, and the cluster has {there:g}")
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run)
        running: dict[Any, Job] = {}
        waiting = list(reversed(jobs))
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                running[task.remote(job)] = job
            (ended, *_), _ = ray.wait(list(running))
            job = running.pop(ended)
            try:
                yield job, ray.get(ended)
            except ray.exceptions.RayError as error:
                told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                yield job, Result(job.name, job.seed, error=f"Ray could not run it: {told}")
    finally:
        if started:
            ray.shutdown()
