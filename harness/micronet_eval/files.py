"""Reading files that somebody else made, and writing files whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from micronet_eval.errors import InputError

LARGEST = 8 << 30  # bytes of a file that is read; a sparse file may claim any size


def check_file(path: Path, most: int) -> None:
    """Raises InputError where a file is no ordinary one (a pipe would block), or has more than `most` bytes.

    FileNotFoundError passes.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path} is no ordinary file")
    if state.st_size > most:
        raise InputError(f"{path} has {state.st_size:,} bytes; at most {most:,} are read")


def read_whole(path: Path, most: int) -> bytes:
    """The bytes of a file that passes `check_file`. Raises InputError; FileNotFoundError and OSError pass."""
    check_file(path, most)
    with path.open("rb") as file:  # files of the kernel say that they have no bytes
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path} has more than {most:,} bytes, which is the most that is read")
    return data


def check_own(path: Path) -> None:
    """Raises InputError where a file of a submission is a link: it could take what is the reader's for its own."""
    if path.is_symlink():
        raise InputError(f"{path} is a link; a submission brings its own files: put the file itself there")


def digest(path: Path) -> bytes:
    """The SHA-256 of an ordinary file; of one too large to be read its size, of anything else nothing."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return b""
        if state.st_size > LARGEST:
            return str(state.st_size).encode()
        whole, left = hashlib.sha256(), state.st_size  # some files of the kernel say 0 and never end
        with path.open("rb") as file:
            while part := file.read(min(left, 1 << 20)):
                whole.update(part)
                left -= len(part)
    except OSError:
        return b""
    return whole.digest()


def is_below_a_folder(path: Path) -> bool:
    """Whether a path is a folder, or could be made in one: the nearest part of it that is there is one."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists()).is_dir()


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name beside `path`, then renames: nobody ever sees half a file.

    Raises OSError where the disk is full or the folder cannot be written; what was there stays.
    """
    write_together(path.parent, {path.name: data})


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """As `write_whole`, of several files. The last is the first to go, if it is there, and the last to come.

    So whoever finds the last file finds those that belong to it, at whatever moment the writing ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            written[Path(temporary)] = folder / name
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
        *_, last = written.values()
        if len(written) > 1:
            last.unlink(missing_ok=True)
        for temporary_path, path in written.items():
            temporary_path.replace(path)
        _sync(folder)
    except BaseException:
        for temporary_path in written:
            with suppress(OSError):
                temporary_path.unlink()
        raise


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Removes what `write_together` left of these files where it was killed; for whoever has the folder for itself."""
    for name in names:
        for left in folder.glob(f".{name}.????????"):
            left.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes new names last: without it a loss of power may bring back the old ones. Not everywhere possible."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a folder, which is made where it is missing. The kernel ends the lock with the run.

    Raises InputError where another run has it. Does nothing where there are no such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run writes there; wait for its end, or name another folder") from None
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
