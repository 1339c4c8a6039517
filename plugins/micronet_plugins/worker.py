"""What a process does before its first job, and before it imports torch: this module imports nothing that does."""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
from multiprocessing.connection import Connection

from micronet_eval.garbage import seldom


def prepare(theirs: Connection, place: str) -> None:
    """Ends this process when the other end of the pipe is closed, also as its owner was killed; and keeps it silent.

    What a library prints would run through the live view on the terminal. What matters is in the result. It searches
    for garbage as seldom as the command does, and takes nothing apart at its end, for which the other one would wait.
    Temporary files lie in `place`, which that one removes.
    """
    atexit.register(os._exit, 0)  # the first that is registered runs last
    tempfile.tempdir = place
    seldom()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)

    def wait() -> None:
        theirs.poll(None)  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
