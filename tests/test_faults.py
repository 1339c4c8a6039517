"""Disks that are full, folders that vanish, runs that are ended: nothing is half written, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RECIPE

from micronet_eval.files import write_whole


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


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/none"])
def test_a_folder_that_cannot_be_written(own, run, place):
    status, _, err = run("import", own, own / "state.pt", "-o", place)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{place} cannot be written" in err


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


@pytest.mark.parametrize("name", ["weights.safetensors", "submission.toml"])
def test_a_file_that_vanishes_while_it_is_read(submission, run, monkeypatch, name):
    def vanish(path, most):
        if path.name == name:
            path.unlink()

    for module in ("packing", "submission"):
        monkeypatch.setattr(f"micronet_eval.{module}.check_file", vanish)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{name} is missing" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
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
