"""Disks that are full, folders that vanish, runs that are ended: nothing is half written, and the next run goes on."""

import dataclasses
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import RECIPE

from micronet_eval import isolation, opening, plugins, recipe
from micronet_eval.evaluation import evaluate
from micronet_eval.files import locked, write_together, write_whole


@pytest.mark.attack("the disk is full", "the old file stays")
@pytest.mark.parametrize("function", ["fsync", "fdopen"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left on device"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.attack("a folder that cannot be made", "one message")
@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/none"])
def test_a_folder_that_cannot_be_written(own, run, place):
    status, _, err = run("import", own, own / "state.pt", "-o", place)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{place} cannot be written" in err


@pytest.mark.attack("the disk fills up during `compress`", "one message; `--resume` ends with the same files")
def test_a_disk_that_fills_up_during_compress(made, run, tmp_path, monkeypatch):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    words = ("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    room = iter(range(5))
    sync = os.fsync

    def fills_up(descriptor):
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fills_up)
        status, _, err = run(*words)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written: No space left on device" in err
    assert not (tmp_path / "out" / "weights.safetensors").exists()
    status, _, err = run(*words, "--resume")
    assert status == 0, err
    for name in ("weights.safetensors", "submission.toml"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.attack("a file vanishes while it is read", "one message")
@pytest.mark.parametrize("name", ["weights.safetensors", "submission.toml"])
def test_a_file_that_vanishes_while_it_is_read(submission, run, monkeypatch, name):
    def vanish(path, most):
        if path.name == name:
            path.unlink()

    for module in ("packing", "files"):
        monkeypatch.setattr(f"micronet_eval.{module}.check_file", vanish)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{name} is missing" in err


@pytest.mark.attack("SIGTERM, SIGINT, SIGKILL during `compress`", "nothing half written, no traceback")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_a_run_that_is_ended_leaves_nothing_half_written(tmp_path, number, status):
    endless = RECIPE.replace("statistics = { batches = 1 }", "train = { epochs = 100000, learning_rate = 0.001 }")
    assert endless != RECIPE
    (tmp_path / "recipe.toml").write_text(endless)
    command = Path(sys.executable).with_name("micronet-eval")
    words = [command, "compress", tmp_path / "recipe.toml", "-o", tmp_path / "out"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()  # it is at work
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    left = [path.name for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert not {"weights.safetensors", "submission.toml"} & set(left)
    assert not [name for name in left if name.startswith((".weights", ".submission"))]


SUBMISSION = ("recipe.toml", "weights.safetensors", "submission.toml")
KILLED = """
import os, sys
from pathlib import Path
from micronet_eval.files import write_together

left = int(sys.argv[2])

def counted(function):
    def call(*words, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*words, **options)
    return call

for owner, name in ((os, "fsync"), (os, "fdopen"), (Path, "replace"), (Path, "unlink"), (Path, "chmod")):
    setattr(owner, name, counted(getattr(owner, name)))
write_together(Path(sys.argv[1]), {name: b"new" for name in sys.argv[3:]})
"""


@pytest.mark.attack("SIGKILL at any moment of writing a submission", "all old, all new, or no submission.toml")
def test_killed_at_any_moment_of_writing(tmp_path):
    seen = []
    for moment in range(30):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for name in SUBMISSION:
            (folder / name).write_text("old")
        words = [sys.executable, "-c", KILLED, folder, str(moment), *SUBMISSION]
        status = subprocess.run(words, check=False).returncode
        if (folder / "submission.toml").exists():
            (found,) = {(folder / name).read_text() for name in SUBMISSION}
            seen.append(found)
        else:
            seen.append("none")
        if status == 0:
            break
        write_together(folder, dict.fromkeys(SUBMISSION, b"again"))  # the next run goes on
        assert {(folder / name).read_text() for name in SUBMISSION} == {"again"}
    assert (status, seen[-1]) == (0, "new")
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]


@pytest.mark.attack("two runs in one folder", "the second is told to wait; the first goes on")
def test_two_runs_in_one_folder(run, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    words = ("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    with locked(tmp_path / "out"):
        status, _, err = run(*words)
    assert (status, err.count("\n")) == (2, 1)
    assert "another run writes there" in err
    assert not (tmp_path / "out").exists()
    with locked(tmp_path / "out"), locked(tmp_path / "other"):
        pass  # it is free again


@pytest.mark.attack("two runs of `compare` train one base", "the slower takes that of the faster")
def test_two_runs_train_one_base(monkeypatch, tmp_path):
    training = recipe._Run.all

    def meanwhile(run, kept):
        training(run, kept)
        (tmp_path / "base" / "faster").mkdir(parents=True)

    monkeypatch.setattr(recipe._Run, "all", meanwhile)
    recipe.trained(RECIPE, tmp_path / "base")
    assert (tmp_path / "base" / "faster").exists()


@pytest.mark.attack("a file may not grow beyond a quota", "one message, the old file stays")
def test_a_quota(own, run, tmp_path):
    (tmp_path / "weights.safetensors").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status, _, err = run("import", own, own / "state.pt", "-o", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written: File too large" in err
    assert (tmp_path / "weights.safetensors").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.attack("a disk that is read-only", "one message")
def test_a_read_only_disk(own, tmp_path):
    bwrap = isolation.bubblewrap()
    if bwrap is None:
        pytest.skip("bubblewrap is not installed, or has no namespaces")
    command = Path(sys.executable).with_name("micronet-eval")
    sandbox = [bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/var/tmp"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/var/tmp"}
    ended = subprocess.run(
        [*sandbox, command, "import", own, own / "state.pt", "-o", tmp_path / "out"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == (
        f"micronet-eval: {tmp_path / 'out'} cannot be written: Read-only file system; name another folder\n"
    )


@pytest.mark.attack("what a run has kept is damaged", "one message, with the mend")
@pytest.mark.parametrize(("name", "data"), [("1.json", b"{"), ("1.pt", b"PK"), ("recipe.sha256", b"\xff")])
def test_kept_files_that_are_damaged(run, tmp_path, monkeypatch, name, data):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    words = ("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "write_together", lambda *files: sys.exit(1))
        run(*words)
    (tmp_path / "out" / ".kept" / name).write_bytes(data)
    status, _, err = run(*words, "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert "to begin anew" in err


@pytest.mark.attack("what a run has kept of an epoch is damaged", "one message, with the mend")
def test_a_kept_epoch_that_is_damaged(run, tmp_path, monkeypatch):
    text = RECIPE[: RECIPE.index("[[stages]]")] + "[[stages]]\ntrain = { epochs = 2, learning_rate = 0.01 }\n"
    (tmp_path / "recipe.toml").write_text(text)
    words = ("compress", tmp_path / "recipe.toml", "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(recipe.Kept, "keep", lambda *stage: sys.exit(1))
        run(*words)
    (tmp_path / "out" / ".kept" / "1.epoch.pt").write_bytes(b"PK")
    status, _, err = run(*words, "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert "1.epoch.pt is damaged; remove" in err


class Dying(torch.utils.data.Dataset):
    """What torch raises where a loading process is killed."""

    def __len__(self):
        return 449

    def __getitem__(self, i):
        if i == 123:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return torch.zeros(1, 8, 8), 0


@pytest.mark.attack("what loads the test data dies, or the data is damaged", "one message that names the data")
def test_data_that_cannot_be_read(submission, run, monkeypatch):
    task = plugins.lookup("task", "digits")
    dying = dataclasses.replace(task, dataset=lambda root, split: Dying())
    monkeypatch.setattr(opening, "task_of", lambda manifest, source: dying)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the test data cannot be read: RuntimeError: DataLoader worker (pid 7) is killed" in err


@pytest.mark.attack("the clock jumps by days while code is run", "nothing: no limit looks at it")
def test_a_clock_that_jumps(own, monkeypatch):
    days = itertools.cycle((0, 86_400, -86_400))
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 10 * next(days))
    assert evaluate(own).math.mults == 2448
