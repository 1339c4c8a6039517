"""State dicts become submissions: by both kinds of file, and what cannot be read or does not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from micronet_eval import evaluate, packing
from micronet_eval.errors import InputError
from micronet_eval.importing import load_state
from micronet_eval.submission import build, read_manifest
from micronet_plugins.architectures import wide_resnet
from micronet_plugins.language import lstm_lm, transformer_lm

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


LSTM = 'name = "lstm-lm"\nvocab = 50\nhidden = 8\nprojection = 4\ncutoffs = [10, 20]\nfactor = 2'
TRANSFORMER = 'name = "transformer-lm"\nvocab = 50\nwidth = 8\nlayers = 1\nheads = 2\nhidden = 8\ncontext = 8'


@pytest.mark.parametrize(
    ("made", "architecture"),
    [
        (lambda: lstm_lm(50, 8, 4, cutoffs=(10, 20), factor=2), LSTM),
        (lambda: transformer_lm(50, 8, 1, 2, 8, 8), TRANSFORMER),
    ],
    ids=["lstm", "transformer"],
)
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("state.pt", lambda model, path: torch.save(model.state_dict(), path)),
        ("state.safetensors", save_model),  # it leaves out all but one name of tied tensors
    ],
    ids=["torch", "safetensors"],
)
def test_an_imported_language_model_computes_what_it_did(tmp_path, run, made, architecture, name, save):
    torch.manual_seed(0)
    model, out = made().eval(), tmp_path / "out"
    save(model, str(tmp_path / name))
    manifest = f'name = "imported"\ntask = "wikitext103"\nauthors = ["test"]\n[architecture]\n{architecture}\n'
    (tmp_path / "submission.toml").write_text(manifest)
    assert run("import", tmp_path, tmp_path / name, "-o", out) == (0, f"wrote {out}\n", "")
    again = packing.unpack(packing.read(out / "weights.safetensors"), build(read_manifest(out).architecture, out))
    tokens = torch.randint(50, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens)[0], model(tokens)[0])


def test_a_model_that_is_none_of_language_is_told_by_its_manifest(tmp_path, run):
    (tmp_path / "submission.toml").write_text(MANIFEST.replace('"digits"', '"wikitext103"'))
    save_file(network().state_dict(), tmp_path / "state.safetensors")
    status, _, err = run("import", tmp_path, tmp_path / "state.safetensors", "-o", tmp_path / "out")
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"{tmp_path / 'submission.toml'}: field 'architecture': " in err


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
def test_a_tied_tensor_needs_one_of_its_names(name):
    model = Tied()
    load_state(model, {name: torch.full((2, 2), 5.0)}, Path("w.pt"), "tied")
    assert model.one.weight is model.two.weight
    assert bool((model.one.weight == 5).all())
    with pytest.raises(InputError, match=r"w\.pt does not fit the architecture 'tied': it lacks 2 tensors"):
        load_state(model, {}, Path("w.pt"), "tied")


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError(), "ValueError"), (AttributeError("no such layer"), "no such layer"), (TypeError("x\ny"), "y")],
)
def test_a_translation_that_fails_is_told_by_what_it_says(error, told):
    def translate(*_):
        raise error

    model = nn.Linear(2, 2)
    model.register_load_state_dict_pre_hook(translate)
    with pytest.raises(InputError, match=f"^w.pt does not fit the architecture 'line': {told}$"):
        load_state(model, {}, Path("w.pt"), "line")


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
        (
            lambda: {**network().state_dict(), "0.weight": torch.full((16, 1, 3, 3), 1j)},
            "tensor '0.weight' is complex, weights are real; save its parts as two tensors",
        ),
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


def test_the_manifest_stays_as_it_was_written(folder, tmp_path, run):
    (folder / "submission.toml").write_text(MANIFEST + "\n# a remark\n")
    save_file(network().state_dict(), tmp_path / "state.safetensors")
    assert run("import", folder, tmp_path / "state.safetensors", "-o", folder)[0] == 0
    assert (folder / "submission.toml").read_text() == MANIFEST + "\n# a remark\n"


def test_a_recipe_that_did_not_make_the_weights_is_told(folder, tmp_path, run):
    save_file(network().state_dict(), tmp_path / "state.safetensors")
    (folder / "recipe.toml").write_text("# of other weights")
    status, _, err = run("import", folder, tmp_path / "state.safetensors", "-o", folder)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{folder / 'recipe.toml'} does not make these weights; remove it" in err
    assert not (folder / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "kept", "fits"),
    [
        (torch.tensor([1.5]), torch.int8, False),
        (torch.tensor([2.0]), torch.int8, True),
        (torch.tensor([2**53 + 1]), torch.float32, False),
        (torch.tensor([0.1], dtype=torch.float64), torch.float16, True),
    ],
)
def test_only_floats_are_rounded(given, kept, fits):
    model = nn.Module()
    model.register_buffer("w", torch.zeros(1, dtype=kept))
    if fits:
        load_state(model, {"w": given}, Path("w.pt"), "mine")
        return
    with pytest.raises(InputError, match=r"w\.pt: tensor 'w' has values that torch\.\w+ of the architecture cannot be"):
        load_state(model, {"w": given}, Path("w.pt"), "mine")
