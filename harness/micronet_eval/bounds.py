"""Bounds of this process while it evaluates: time, and the memory that the machine has.

A registered architecture runs no code of a submission, but with large enough options it takes days and all memory. What
has no bounds ends all that runs beside it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from micronet_eval.errors import SubmissionError

LEAST = 1 << 30  # bytes that may always be asked for
AGAIN = 5  # seconds; what is raised while an object is deleted gets lost, so it is raised until the block has ended
SOON = 0.01  # seconds
_ON_THE_WAY = {"__enter__", "__exit__", "enter_context"}


class _TooLong(BaseException):
    """No Exception: what a model raises is caught in many places."""


@contextmanager
def bounded(seconds: int, what: str) -> Iterator[None]:
    """Ends the block after `seconds`, and lets no allocation pass that is larger than what the machine has free.

    Raises SubmissionError that begins with `what`. Time is bounded in the main thread only, memory on Linux only; a
    block inside of another has the bounds of that.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    if signal.getitimer(signal.ITIMER_REAL)[0]:  # a block around this one, or somebody else's clock
        yield
        return

    block = sys._getframe(2)  # that of the `with`: behind this one comes contextlib's

    def end(_: int, here: FrameType | None) -> None:
        # Ended on its way into a context or out of one, it would leave gradients off, or a model as it was taken apart.
        while here is not None and here is not block:
            if here.f_code.co_name in _ON_THE_WAY:
                signal.setitimer(signal.ITIMER_REAL, SOON, AGAIN)
                return
            here = here.f_back
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        with _memory():
            yield
    except _TooLong:
        raise SubmissionError(f"{what}: it took more than {seconds:,} seconds (--limits evaluation)") from None
    except MemoryError as error:
        raise SubmissionError(f"{what}: it needs more memory than this machine has free") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says it
            raise
        raise SubmissionError(f"{what}: it needs more memory than this machine has free") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory() -> Iterator[None]:
    """Bounds the address space by what is in use and what the machine has free."""
    try:
        import resource

        free, used = _kibibytes("/proc/meminfo", "MemAvailable"), _kibibytes("/proc/self/status", "VmSize")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError, ValueError):
        yield
        return
    wanted = used + max(free, LEAST)
    most = min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _kibibytes(file: str, name: str) -> int:
    """A figure of a table of the kernel, in bytes. Raises ValueError where it is not there."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(name)
