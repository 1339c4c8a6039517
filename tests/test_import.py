"""State dicts become submissions: by both kinds of file, and what cannot be read or does not fit."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from micronet_eval import evaluate, packing
from micronet_eval.submission import build, read_manifest
from micronet_plugins.architectures import wide_resnet

MANIFEST = """
name = "imported"
task = "digits"
authors = ["test"]
[architecture]
name = "wide-resnet"
depth = 10
width = 1
classes = 10
channels = 1
[claims]
quality = 0.5
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "submission.toml").write_text(MANIFEST)
    return tmp_path / "described"


def network():
    torch.manual_seed(0)
    model = wide_resnet(10, 1, 10, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_an_imported_model_computes_what_it_did(folder, tmp_path, run, name):
    model = network()
    save = save_file if name.endswith("safetensors") else torch.save
    save(model.state_dict(), tmp_path / name)
    out = tmp_path / "out"
    assert run("import", folder, tmp_path / name, "-o", out) == (0, f"wrote {out}\n", "")
    assert read_manifest(out) == read_manifest(folder)
    again = packing.unpack(packing.read(out / "weights.safetensors"), build(read_manifest(out).architecture, out))
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model(x), atol=1e-5, rtol=1e-5)
    assert evaluate(out).freebie


def test_counters_of_batches_may_be_missing(folder, tmp_path, run):
    state = {name: tensor for name, tensor in network().state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "state.safetensors")
    assert run("import", folder, tmp_path / "state.safetensors", "-o", tmp_path / "out")[0] == 0


def without(name):
    state = network().state_dict()
    del state[name]
    return state


class Code:
    def __reduce__(self):
        return print, ("this runs when it is unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: without("0.weight"), "does not fit the architecture 'wide-resnet': it lacks 1 tensors, the first is"),
        (lambda: {**network().state_dict(), "more": torch.ones(1)}, "the architecture has no place for 1 tensors"),
        (lambda: {**network().state_dict(), "0.weight": torch.ones(1)}, "does not fit the architecture 'wide-resnet'"),
        (lambda: {"state_dict": network().state_dict(), "epoch": 3}, "is no state dict: 'state_dict' names no tensor"),
        (lambda: {1: torch.ones(1)}, "is no state dict: 1 names no tensor"),
        (lambda: [torch.ones(1)], "holds a list, no state dict"),
        (lambda: {"0.weight": Code()}, "cannot be read as a state dict: it is damaged, or holds more than tensors"),
        (lambda: {**network().state_dict(), "0.weight": torch.full((16, 1, 3, 3), torch.nan)}, "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_one_message(folder, tmp_path, run, content, message):
    torch.save(content(), tmp_path / "state.pt")
    status, out, err = run("import", folder, tmp_path / "state.pt", "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert str(tmp_path / "state.pt") in err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("state.pt", b"not a file of torch", "cannot be read as a state dict"),
        ("state.pt", b"", "cannot be read as a state dict"),
        ("state.pt", pickle.dumps({"a": 1})[:-3], "cannot be read as a state dict"),
        ("state.safetensors", b"12345678901234", "cannot be read as a state dict"),
        ("absent.pt", None, "is missing: name a state dict"),
    ],
)
def test_a_file_that_cannot_be_read(folder, tmp_path, run, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    status, _, err = run("import", folder, tmp_path / name, "-o", tmp_path / "out")
    assert status == 2
    assert f"{tmp_path / name}" in err and message in err
    assert len(err.splitlines()) == 1


def test_the_output_is_a_file(folder, tmp_path, run):
    torch.save(network().state_dict(), tmp_path / "state.pt")
    (tmp_path / "out").write_text("")
    status, _, err = run("import", folder, tmp_path / "state.pt", "-o", tmp_path / "out")
    assert (status, err) == (2, f"micronet-eval: {tmp_path / 'out'} is no folder; name another one to write\n")
