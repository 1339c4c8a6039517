"""Reading files that somebody else made, and writing files whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from micronet_eval.errors import InputError


def check_file(path: Path, most: int) -> None:
    """Raises InputError where a file is no ordinary one (a pipe would block), or has more than `most` bytes.

    FileNotFoundError passes.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path} is no ordinary file")
    if state.st_size > most:
        raise InputError(f"{path} has {state.st_size:,} bytes; at most {most:,} are read")


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name beside `path`, then renames: nobody ever sees half a file.

    Raises OSError where the disk is full or the folder cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
