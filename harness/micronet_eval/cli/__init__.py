"""The command line: no logic, only options, messages and exit status."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from micronet_eval import garbage, plugins
from micronet_eval.cli import listing, making, measuring
from micronet_eval.cli.group import cli, complain
from micronet_eval.errors import InputError, SubmissionError, refused

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["cli", "command", "listing", "main", "making", "measuring"]


class _Terminated(BaseException):
    """Somebody ends the command. Nobody else catches it, as foreign code's SystemExit is caught."""


def _terminate(*_: object) -> None:
    raise _Terminated


class _Unread(io.FileIO):
    """A pipe whose reader may have seen enough: that is no error, and does not end what writes into it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _patient(stream: TextIO) -> TextIO:
    """A stream of this process that outlasts its reader, so that the exit status says what it always says.

    Click and rich would end with status 1 where a pipe is broken, which means that a threshold or a claim fails.
    """
    if stream.isatty():
        return stream
    raw = _Unread(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=bool(stream.line_buffering)
    )


def command() -> None:
    """`main` as a process of its own, which ends at once: Python would take a model and all of torch apart first."""
    ends_with: list[int] = []
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, _patient(stream))

    def end() -> None:
        if ends_with:
            os._exit(ends_with[0])

    atexit.register(end)  # what is registered later comes before it
    try:
        main()
        ends_with.append(0)
    except SystemExit as error:
        if isinstance(error.code, int):
            ends_with.append(error.code)
        raise


def main() -> None:
    """The command `micronet-eval`; turns expected errors into one message and an exit status."""
    garbage.seldom()
    signal.signal(signal.SIGTERM, _terminate)  # temporary files and workers end with us
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started us closed it
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names have letters that the encoding may lack
    try:
        try:
            plugins.add_commands(cli)
            cli()
        finally:
            sys.stdout.flush()  # at its own end Python could only say that the disk is full, with status 120
    except (InputError, SubmissionError) as error:
        sys.exit(complain(error))
    except OSError as error:
        sys.exit(complain(refused(error)))
    except _Terminated:
        sys.exit(128 + signal.SIGTERM)
