"""A submission's own code, model.py: run in a worker process that gives back data, and never in this one.

The worker calls `build()` and writes the graph of the model as JSON (graph.py) to a file descriptor of its own. Here it
is validated, built again and evaluated: whatever the code does to its own process, it cannot touch a count.

`python -m micronet_eval.isolation FILE LIMITS LEVEL DESCRIPTOR` is the worker; it reads the options of `build` from its
standard input.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import site
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micronet_eval.errors import InputError, SubmissionError, printable

if TYPE_CHECKING:
    from micronet_eval.graph import Graph

Mode = Literal["required", "auto", "none"]
Level = Literal["none needed: no code of the submission is run", "bubblewrap", "limits only", "none"]
NO_CODE: Level = "none needed: no code of the submission is run"

REMARKS: dict[Level, str] = {
    "limits only": "model.py was run with limits only: it could read and write files and use the network",
    "none": "model.py was run without isolation: it could do all that you can",
}
"""What a report warns of, by level."""

ANSWER_LIMIT = 64 << 20
"""Bytes that a worker may give back."""

TICK = 0.02  # seconds between two looks at a worker
_MOST = dict.fromkeys(("cpu", "wall", "evaluation"), 1 << 32)  # seconds that clocks take
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """What a worker may use: memory and writing in bytes, processor and wall time in seconds, processes, open files.

    `evaluation` is how many seconds one submission may take from its opening to its report, whatever it runs.
    """

    memory: int = 8 << 30
    cpu: int = 120
    wall: int = 120
    processes: int = 64
    files: int = 256
    written: int = 64 << 20
    evaluation: int = 24 * 3600

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Reads `memory=4G,wall=60`; what is not named keeps its default. Raises InputError."""
        names = [limit.name for limit in fields(cls)]
        found: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = (word.strip() for word in part.partition("="))
            digits, unit = (value[:-1], _UNITS[value[-1]]) if value[-1:] in _UNITS else (value, 1)
            fits = re.fullmatch(r"[1-9][0-9]{0,11}", digits) and int(digits) * unit < _MOST.get(name, 1 << 50)
            if name not in names or not fits:
                raise InputError(
                    f"--limits {part[:50]!r} is no limit; write NAME=NUMBER[K|M|G] with: {', '.join(names)}"
                )
            found[name] = int(digits) * unit
        return cls(**found)


@dataclass(frozen=True)
class Isolation:
    """How foreign code is run. `required` refuses to run it without bubblewrap, `none` gives it no limit but time."""

    mode: Mode = "auto"
    limits: Limits = Limits()

    @property
    def level(self) -> Level:
        """What is in force. Raises InputError where bubblewrap is required and does not work."""
        if self.mode == "none":
            return "none"
        if bubblewrap() is not None:
            return "bubblewrap"
        if self.mode == "required":
            raise InputError(
                "--isolation required: bubblewrap does not work here; install it (Debian: apt install bubblewrap) and "
                "allow user namespaces, or choose --isolation auto"
            )
        return "limits only"


AUTO = Isolation()


@cache
def bubblewrap() -> str | None:
    """The path of bwrap, where it is installed and may make namespaces."""
    found = shutil.which("bwrap")
    if found is None or not sys.platform.startswith("linux"):
        return None
    tried = [found, *_namespaces(), *_system(), *_scratch(1 << 20), "true"]
    try:
        works = subprocess.run(tried, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return found if works.returncode == 0 else None


def _namespaces() -> list[str]:
    """No network, no other processes, no privileges.

    Root keeps its user namespace and just enough to become nobody in the worker: the kernel never limits the number of
    root's processes.
    """
    words = [
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
    ]
    if os.geteuid() == 0:
        return [*words, "--unshare-uts", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*words, "--unshare-uts", "--unshare-user"]


def _system() -> list[str]:
    """The parts of the system that Python needs, read-only; nothing of /etc, /home, /var or /tmp."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        words += ["--ro-bind-try", name, name]
    return [*words, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]


def _scratch(size: int) -> list[str]:
    """The one folder that can be written, in memory."""
    return ["--perms", "1777", "--size", str(size), "--tmpfs", "/scratch", "--chdir", "/scratch"]


def _sandbox(bwrap: str, path: Path, limits: Limits) -> list[str]:
    """Words before a command that show it Python, its packages and one file, and nothing else."""
    own = Path(__file__).resolve().parent
    shown = {sys.prefix, sys.base_prefix, *site.getsitepackages(), str(own)}
    binds = list[str]()
    for place in sorted(p for p in shown if Path(p).is_dir()):
        for parent in (*reversed(Path(place).parents[:-1]), Path("/submission")):
            binds += ["--dir", str(parent)]  # which bubblewrap would make for root alone
        binds += ["--ro-bind", place, place]
    file = ["--ro-bind", str(path), "/submission/model.py"]
    return [bwrap, *_namespaces(), *_system(), *binds, *_scratch(limits.written), *file, "--remount-ro", "/"]


def graph_of_file(path: Path, options: dict[str, Any], isolation: Isolation) -> Graph:
    """The graph of the model that `build(**options)` in a file returns; the file is run by a worker.

    Raises InputError where the file is missing or isolation cannot be had, SubmissionError where the code fails, hits a
    limit, or gives back anything else than a graph.
    """
    from pydantic import ValidationError

    from micronet_eval.graph import Graph

    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; put it beside submission.toml, which names it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not regular:
        raise InputError(f"{path} is no ordinary file; a submission brings its own, not a link")
    path = path.resolve()
    try:
        answer = json.loads(_run(path, options, isolation) or b"null")
        if isinstance(answer, dict) and set(answer) == {"error"}:
            raise SubmissionError(printable(f"{path}: {str(answer['error'])[:500]}"))
        return Graph.model_validate(answer)
    except (ValueError, RecursionError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else type(error).__name__
        raise SubmissionError(printable(f"{path}: the worker gave back no graph of a model: {first}")) from error
    except _Ended as end:
        raise SubmissionError(f"{path}: the worker {end}") from end


class _Ended(Exception):
    """Why there is no answer."""


def _run(path: Path, options: dict[str, Any], isolation: Isolation) -> bytes:
    level, limits = isolation.level, isolation.limits
    root = Path(__file__).resolve().parents[1]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nowhere"}
    inside = "/submission/model.py" if level == "bubblewrap" else str(path)
    own = asdict(limits if level != "none" else replace(limits, **dict.fromkeys(asdict(limits), 0)))
    bwrap = bubblewrap()
    wrapped = _sandbox(bwrap, path, limits) if level == "bubblewrap" and bwrap else []
    python = [sys.executable, "-P", "-s"] if sys.version_info >= (3, 11) else [sys.executable, "-s"]
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        asked = stack.enter_context(tempfile.TemporaryFile())
        asked.write(json.dumps(options, default=str).encode())
        asked.seek(0)
        read, write = os.pipe()
        stack.callback(os.close, read)
        words = [inside, json.dumps(own), level, str(write)]
        try:
            process = subprocess.Popen(
                [*wrapped, *python, "-m", "micronet_eval.isolation", *words],
                stdin=asked,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=scratch,
                env=environment,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        stack.callback(_kill, process)
        return _answer(process, read, limits, watched=level != "none")


def _answer(process: subprocess.Popen[bytes], read: int, limits: Limits, watched: bool) -> bytes:
    """What a worker writes until it ends. Raises _Ended where it hits a limit, or ends in another way."""
    os.set_blocking(read, False)
    answer, deadline = bytearray(), time.monotonic() + limits.wall
    while True:
        ended, part = process.poll(), b""
        with suppress(BlockingIOError):
            part = os.read(read, 1 << 20)
        answer += part
        if len(answer) > ANSWER_LIMIT:
            raise _Ended(f"gave back more than {ANSWER_LIMIT >> 20} MiB")
        if ended == 0 and answer and not part:
            return bytes(answer)
        if ended is not None and not part:
            raise _Ended(_how(ended))
        if time.monotonic() > deadline:
            raise _Ended(f"ran for more than {limits.wall} seconds (--limits wall)")
        if watched:
            _watch(process.pid, limits)
        if not part:
            time.sleep(TICK)


def _how(status: int) -> str:
    """An exit status in words; bubblewrap gives 128 + the signal, subprocess its negative."""
    number = -status if status < 0 else status - 128 if status > 128 else 0
    if number == signal.SIGXCPU:
        return "used more processor time than it may (--limits cpu)"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended without a model, with exit status {status}"


@dataclass(frozen=True)
class _Process:
    """A running process; number and start together name it for ever, its number alone may be used again."""

    number: int
    started: int
    parent: int = field(compare=False)
    session: int = field(compare=False)
    memory: int = field(compare=False)


def _processes() -> list[_Process]:
    """All that can be seen and are not dead. Linux only; elsewhere there are none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            words = entry.read_text(errors="replace").rpartition(")")[2].split()
            if words[0] not in "ZX":
                memory = int(words[21]) * os.sysconf("SC_PAGE_SIZE")
                found.append(_Process(int(entry.parent.name), int(words[19]), int(words[1]), int(words[3]), memory))
    return found


def _family(pid: int, processes: list[_Process]) -> set[_Process]:
    """A worker, its descendants, and all in its session."""
    family = {p for p in processes if pid in (p.number, p.session)}
    numbers = {pid, *(p.number for p in family)}
    while more := {p for p in processes if p.parent in numbers} - family:
        family |= more
        numbers |= {p.number for p in more}
    return family


def _watch(pid: int, limits: Limits) -> None:
    """Raises _Ended where a worker and all that it started are too many, or too large together. Linux only."""
    family = _family(pid, _processes())
    if len(family) > limits.processes:
        raise _Ended(f"started more than {limits.processes} processes (--limits processes)")
    if sum(process.memory for process in family) > limits.memory:
        raise _Ended("used more memory than it may (--limits memory)")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a worker and all that it started, and waits until none is left.

    With bubblewrap the kernel ends the whole namespace, but not before this process goes on.
    """
    known = _family(process.pid, _processes())
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(250):
        running = _processes()
        known |= _family(process.pid, running)  # what has left the session, or was forking just now
        left = known & set(running)
        for one in left:
            with suppress(OSError):
                os.kill(one.number, signal.SIGKILL)
        if not left:
            break
        time.sleep(TICK)


# --- the worker -------------------------------------------------------------------------------------------------------


NOBODY = 65534


def _restrict(limits: Limits, level: str) -> None:
    """Sets the limits of this process and its children; zero is no limit. Root in bubblewrap becomes nobody."""
    import resource

    if level == "bubblewrap" and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if level != "none":
        os.nice(10)  # whoever watches comes first: else a fork bomb is faster than its end
    for name, value in (
        ("RLIMIT_AS", limits.memory),
        ("RLIMIT_CPU", limits.cpu),
        ("RLIMIT_NOFILE", limits.files),
        ("RLIMIT_FSIZE", limits.written),
        ("RLIMIT_NPROC", limits.processes and _threads() + limits.processes),
        ("RLIMIT_CORE", 0),
    ):
        if (value or name == "RLIMIT_CORE") and hasattr(resource, name):
            with suppress(ValueError, OSError):  # already lower
                resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))


def _threads() -> int:
    """How many threads the user has that can be seen: the kernel's limit is one on all of them."""
    count = 0
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += len(list((place / "task").iterdir())) if place.stat().st_uid == os.getuid() else 0
    return count


def _work(file: str, limits: str, level: str, descriptor: str) -> None:
    """Runs a file's `build` and writes the graph of what it returns, or what went wrong."""
    import runpy

    _restrict(Limits(**json.loads(limits)), level)
    options = json.load(sys.stdin)
    try:
        build = runpy.run_path(file, run_name="model").get("build")
        if build is None:
            raise LookupError("it has no function build()")
        from torch import nn

        from micronet_eval.graph import graph_of
        from micronet_eval.plugins import check_options

        check_options(build, options)
        model = build(**options)
        if not isinstance(model, nn.Module):
            raise TypeError(f"build() has to return an nn.Module, not {type(model).__name__}")
        answer = graph_of(model).model_dump_json()
    except InputError as error:
        answer = json.dumps({"error": str(error)})
    except BaseException as error:  # somebody's code; SystemExit and KeyboardInterrupt, too
        answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
    with os.fdopen(int(descriptor), "w") as out:
        out.write(answer)


if __name__ == "__main__":
    _work(*sys.argv[1:])
