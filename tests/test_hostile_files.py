"""Files of strangers: what is no submission, what hides in one, what a terminal or a browser would obey."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import OWN_MANIFEST

from micronet_eval import packing
from micronet_eval.errors import InputError, printable

TOO_LARGE = b'{"values":{"dtype":"U8","shape":[9876543210],"data_offsets":[0,9876543210]}}'


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "submission.toml", "recipe.toml", "state.pt", "state.safetensors"]
)
def test_a_pickle_under_any_name_is_not_loaded(submission, run, tmp_path, name):
    (submission / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    words = {"recipe.toml": ("compress", submission / name, "-o", tmp_path / "out")}
    if name.startswith("state"):
        words[name] = ("import", submission, submission / name, "-o", tmp_path / "out")
    status, _, err = run(*words.get(name, (submission,)))
    assert (status, err.count("\n")) == (2, 1)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "submission.toml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse", "loop"])
def test_what_is_no_ordinary_file(submission, run, name, kind):
    path = submission / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    status, out, err = run(submission)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("link", ["/etc/passwd", "../model.py"])
def test_a_model_that_is_a_link(own, run, tmp_path, link):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "model.py").rename(tmp_path / "model.py")
    (folder / "model.py").symlink_to(link)
    status, _, err = run(folder)
    assert status == 2
    assert "no ordinary file" in err


@pytest.mark.parametrize("name", ["../model.py", "/etc/passwd", "model.py\\u0000", "other.py"])
def test_a_model_somewhere_else(own, run, tmp_path, name):
    folder = shutil.copytree(own, tmp_path / "own")
    (folder / "submission.toml").write_text(OWN_MANIFEST.replace("model.py", name))
    status, _, err = run(folder)
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (90).to_bytes(8, "little") + TOO_LARGE.ljust(90),
        (100_002).to_bytes(8, "little") + b"[" * 100_002,
        b"",
    ],
    ids=["length", "tensor", "nesting", "empty"],
)  # fmt: skip
def test_headers_that_promise_too_much(submission, run, data):
    (submission / "weights.safetensors").write_bytes(data)
    status, _, err = run(submission)
    assert (status, err.count("\n")) == (2, 1)


def test_a_tensor_of_more_elements_than_memory(submission):
    packed = packing.read(submission / "weights.safetensors")
    large = {"type": "Linear", "in_features": 1 << 20, "out_features": 1 << 20}
    structure = packing.Structure(layers={"": large}, tensors=[("0.weight", "fixed-point:4", "bitmask")])
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="elements; at most"):
        packing.unpack(packing.Packed(structure.model_copy(update={"layers": {"0": large}}), packed.streams, {}), model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, "no valid TOML"),
        ("a." * 50_000 + "b = 1", "more than 100 dots"),
        ("1." * 50_000 + "b = 1", "more than 100 dots"),
        ("a = " + "1" * 10_000, "no valid TOML"),
        ("[claims]\nscore = 1e999999999", "too large, too small, or too long"),
        ("[frequencies]\nclusters = [1e-999999999]", "too large, too small, or too long"),
        ('note = "\\u001b]0;owned\\u0007"', "control character U+001B"),
        ('note = "\\u202eevil"', "control character U+202E"),
        ('"\\u009bkey" = 1', "control character U+009B"),
    ],
)
def test_toml_that_bombs_or_hides(submission, run, text, message):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text() + "\n" + text)
    status, out, err = run(submission)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err) < 200_000


def test_a_name_that_looks_like_another(submission, run):
    manifest = submission / "submission.toml"
    manifest.write_text(manifest.read_text().replace("digits", "dіgits"))  # Cyrillic
    status, _, err = run(submission)
    assert status == 2
    assert r"'d\u0456gits'" in err


def test_a_folder_whose_name_a_terminal_obeys(submission, run):
    bad = submission.rename(submission.with_name("\x1b[31mred\u202e"))
    _, out, _ = run(bad, "--format", "csv")
    assert out
    assert "\x1b" not in out
    (bad / "submission.toml").unlink()
    _, _, err = run(bad)
    assert r"\x1b[31mred\u202e" in err
    assert "\x1b" not in err


def test_printable_leaves_the_languages_of_the_world_alone():
    assert printable("Zoë 李 \n") == "Zoë 李 \n"
    assert printable("\x1b\x9b\u200e\ud800") == r"\x1b\x9b\u200e\ud800"


@pytest.mark.parametrize("bits", [0x7FC01234, 0xFFC00001, 0x7F800000])
def test_payloads_of_nan(bits):
    plain = torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)
    with pytest.raises(InputError, match="NaN or infinity"):
        _unpacked(plain)


@pytest.mark.parametrize(("bits", "kept"), [(-(1 << 31), 0), (1, 1), (0x807FFF, 0x807FFF)])
def test_negative_zero_loses_its_sign_and_denormals_are_counted(bits, kept):
    plain = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert _unpacked(plain).view(torch.int32).item() == kept


def _unpacked(plain):
    structure = packing.Structure(tensors=[("weight", "float32", "plain")])
    streams = dict.fromkeys(("values", "masks", "overhead"), torch.zeros(0, dtype=torch.uint8).numpy())
    packed = packing.Packed(structure, streams, {"weight": plain.view(1, 1)})
    return packing.unpack(packed, torch.nn.Linear(1, 1, bias=False)).weight.detach()
