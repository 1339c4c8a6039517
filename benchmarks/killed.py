"""A comparison that is killed three times, and the same one through Ray, against one that nobody disturbs.

python -m benchmarks.killed          runs all three; writes results/killed.json
python -m benchmarks.killed 8        only so many jobs, to look at; writes nothing

Each run is the command `micronet-eval compare`, with 2 jobs at a time. SIGKILL comes when a quarter, a half and three
quarters of the results are in the file.
"""

from __future__ import annotations

import json
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "killed.json"
BASE = """
task = "digits"
seed = 3
[submission]
name = "base"
authors = ["micronet-eval"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[[stages]]
train = { epochs = 4, learning_rate = 0.01 }
"""
SPARSITIES, BITS, SEEDS = ("0.3", "0.5", "0.7", "0.9"), ("4", "5", "6", "7", "8"), 2
JOBS = 4 * 5 * SEEDS
COMMAND = [sys.executable, "-c", "from micronet_eval.cli import main; main()", "compare", "--format", "json"]


def command(folder: Path, name: str, executor: str, jobs: int) -> list[str]:
    """The command of one of the runs; `jobs` of the 40."""
    words = [*COMMAND, "--on", str(folder / "base.toml"), "--jobs", "2", "--executor", executor]
    words += ["--sparsifier", f"magnitude:sparsity={','.join(SPARSITIES)}", "--seeds", str(SEEDS)]
    words += ["--quantizer", f"fixed-point:weight_bits={','.join(BITS[: jobs // 8 or 1])}"]
    return [*words, "--results", str(folder / f"{name}.sqlite")]


def stored(path: Path) -> dict[str, str]:
    """What the file of results holds so far."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as store:
        if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchall():
            return {}
        return dict(store.execute("SELECT key, result FROM results"))


def kill_at(folder: Path, name: str, results: int, words: list[str]) -> dict[str, str]:
    """Starts the command, kills it when so many results are there, and gives what they are."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while len(stored(folder / f"{name}.sqlite")) < results:
            if run.poll() is not None:
                raise SystemExit(f"ended before it was killed: {run.stderr.read() if run.stderr else ''!r}")
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    return stored(folder / f"{name}.sqlite")


def finish(words: list[str]) -> tuple[Any, float]:
    """The table, without the times, and how long it took."""
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in json.loads(done.stdout)]
    return rows, time.monotonic() - start


def main() -> None:
    """Runs all three and says whether they agree."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.toml").write_text(BASE, encoding="utf-8")
        alone, seconds = finish(command(folder, "alone", "local", jobs))
        total = len(stored(folder / "alone.sqlite"))
        print(f"undisturbed: {total} jobs, {seconds:.0f} s", flush=True)
        words, kept = command(folder, "killed", "local", jobs), []
        for quarter in (1, 2, 3):
            kept.append(kill_at(folder, "killed", quarter * total // 4, words))
            print(f"killed with {len(kept[-1])} results", flush=True)
        killed, _ = finish(words)
        last = stored(folder / "killed.sqlite")
        ray, ray_seconds = finish(command(folder, "ray", "ray", jobs))
    found = {
        "jobs": total,
        "killed_with": [len(results) for results in kept],
        "results_kept_as_they_were": all(results.items() <= last.items() for results in kept),
        "killed_equals_undisturbed": killed == alone,
        "ray_equals_undisturbed": ray == alone,
        "seconds": round(seconds),
        "seconds_ray": round(ray_seconds),
        "environment": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "ray", "micronet-eval")},
        },
        "rows": alone,
    }
    print({name: value for name, value in found.items() if name != "rows"})
    if jobs == JOBS:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
