"""Whatever is wrong with the input: exit status 2 and one message that names the file, the field and the mend."""

import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from micronet_eval.errors import InputError
from micronet_eval.merge import merged
from micronet_eval.plugins import check_options, unknown
from micronet_eval.structure import changes
from micronet_eval.submission import build, read_manifest

MANIFEST, WEIGHTS = "submission.toml", "weights.safetensors"
STREAMS = ("values", "masks", "overhead", "structure")


@pytest.fixture
def refused(run):
    """Runs the command and gives its one message."""

    def refused(*words):
        status, out, err = run(*words)
        assert status == 2, err
        assert err.startswith("micronet-eval: ")
        assert err.count("\n") == 1
        assert words[0] == "compress" or out == ""
        return err

    return refused


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def as_bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def write(folder, tensors):
    """Writes the weights with the checksum that docs/format.md describes."""
    digest = hashlib.sha256()
    for name in (*STREAMS, *sorted(set(tensors) - set(STREAMS))):
        data = tensors[name].numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    kind = json.dumps({"version": 1, "sha256": digest.hexdigest()})
    save_file(tensors, folder / WEIGHTS, metadata={"micronet-packed": kind})


def change_stream(folder, name, change):
    tensors = load_file(folder / WEIGHTS)
    write(folder, {**tensors, name: as_bytes(change(tensors[name].numpy().tobytes()))})


def change_structure(folder, change):
    def changed(stream):
        structure = json.loads(zlib.decompress(stream))
        change(structure)
        return zlib.compress(json.dumps(structure).encode())

    change_stream(folder, "structure", changed)


# --- folder and manifest ----------------------------------------------------------------------------------------------


def test_no_traceback_from_the_installed_command(tmp_path):
    command = Path(sys.executable).with_name("micronet-eval")
    ended = subprocess.run([command, tmp_path / "nowhere"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"micronet-eval: {tmp_path / 'nowhere'} is no folder: "
        "a submission is a folder with submission.toml and weights.safetensors\n"
    )


def test_a_folder_without_manifest(refused, tmp_path):
    assert f"{tmp_path / MANIFEST} is missing" in refused(tmp_path)


def test_a_manifest_that_is_no_text(refused, submission):
    (submission / MANIFEST).write_bytes(b"\xff\xfe")
    assert f"{submission / MANIFEST} cannot be read" in refused(submission)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "small"\n', "name = \n", "is no valid TOML: Invalid value (at line 1"),
        ('name = "small"\n', "", "field 'name': Field required (add this field)"),
        ('name = "small"\n', 'name = ""\n', "field 'name': String should have at least 1 character"),
        ('name = "wide-resnet"\n', "", "field 'architecture.name': Field required (add this field)"),
        ('name = "small"\n', 'name = "small"\ncolour = 1\n', "field 'colour': Extra inputs are not permitted (remove"),
        (
            'authors = [\n    "test",\n]',
            "authors = 3",
            "field 'authors': Input should be a valid list (write it in brackets",
        ),
        ("[provenance]", "[claims]\nscore = -1\n[provenance]", "field 'claims.score': Input should be greater than 0"),
        ("[provenance]", "[claims]\nquality = nan\n[provenance]", "field 'claims.quality': Input should be a finite"),
        ("[provenance]", "[claims]\nquality = 80\n[provenance]", "field 'claims.quality': Input should be less than"),
        ("[provenance]", "[claims]\nmaths = 1\n[provenance]", "field 'claims.maths': Extra inputs are not permitted"),
        ('task = "digits"', 'task = "digit"', "field 'task': unknown task 'digit'; nearest: digits"),
        (
            'task = "digits"',
            'task = "?"',
            "field 'task': unknown task '?'; known: cifar100, digits, fashion-mnist, imagenet",
        ),
        ('"wide-resnet"', '"wide-resnets"', "field 'architecture': unknown architecture 'wide-resnets'; nearest: wide"),
        ("depth = 10", "depth = 11", "field 'architecture': depth 11: a wide residual network has 6 n + 4 layers"),
        ("depth = 10", "deep = 10", "field 'architecture.deep': unknown option 'deep'; nearest: depth"),
        ("depth = 10", 'depth = "16"', "field 'architecture.depth': Input should be a valid integer"),
        ("depth = 10", "depth = true", "field 'architecture.depth': Input should be a valid integer"),
        ('"wide-resnet"', '"torchvision"', "field 'architecture.depth': unknown option 'depth'; known: model, classes"),
    ],
)
def test_a_broken_manifest(refused, submission, before, after, message):
    edit(submission / MANIFEST, before, after)
    assert f"{submission / MANIFEST}" in (error := refused(submission))
    assert message in error


def test_a_byte_order_mark_is_no_fault(run, submission):
    (submission / MANIFEST).write_bytes(b"\xef\xbb\xbf" + (submission / MANIFEST).read_bytes())
    assert run("validate", submission)[2] == ""
    assert read_manifest(submission).name == "small"


def test_a_name_that_is_not_known_beside_many_that_are():
    listed = ", ".join(map(str, range(20)))
    assert unknown("module", "no", map(str, range(1000))) == f"unknown module 'no'; known: {listed} and 980 more"
    assert unknown("option", "x", []) == "unknown option 'x'; none is known"


def test_an_architecture_that_returns_no_module(refused, register, submission):
    register(architectures={"five": lambda **options: 5})
    edit(submission / MANIFEST, '"wide-resnet"', '"five"')
    assert "field 'architecture': five has to return an nn.Module, not int" in refused(submission)


def test_options_of_an_architecture_are_looked_at_by_its_signature():
    def build(widths: tuple[int, ...], kind: "Unknown", *more, scale: float = 1.0, **others):  # noqa: F821
        pass

    def strict(widths: tuple[int, ...], kind: np.ndarray = None, scale: float = 1.0):
        pass

    check_options(build, {"widths": [1], "kind": 1, "colour": 2})  # an annotation that nobody can read
    check_options(strict, {"widths": [1, 2], "kind": 1, "scale": 2})
    with pytest.raises(InputError, match=r"^x: field 'architecture.widths': Input should be a valid integer$"):
        check_options(strict, {"widths": ["1"]}, "x: ")
    with pytest.raises(InputError, match=r"^field 'architecture.widths': Field required"):
        check_options(strict, {})


def test_every_fault_of_a_manifest_is_named(run, submission):
    edit(submission / MANIFEST, 'task = "digits"\n', "colour = 1\n")
    status, out, err = run(submission)
    assert (status, out) == (2, "")
    assert "field 'task'" in err
    assert "field 'colour'" in err


# --- weights ----------------------------------------------------------------------------------------------------------


def test_missing_weights(refused, submission):
    (submission / WEIGHTS).unlink()
    assert f"{submission / WEIGHTS} is missing" in refused(submission)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_weights(refused, submission, share):
    data = (submission / WEIGHTS).read_bytes()
    (submission / WEIGHTS).write_bytes(data[: int(share * len(data))])
    assert f"{submission / WEIGHTS} is no readable safetensors file (truncated or damaged?)" in refused(submission)


def test_a_flipped_bit_in_the_payload(refused, submission):
    data = (submission / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in np.linspace(start, len(data) - 1, 12).astype(int):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (submission / WEIGHTS).write_bytes(flipped)
        assert "version or checksum do not match" in refused(submission)


def test_a_flipped_bit_in_the_header(refused, submission):
    data = (submission / WEIGHTS).read_bytes()
    for position in np.linspace(0, 7 + int.from_bytes(data[:8], "little"), 40).astype(int):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (submission / WEIGHTS).write_bytes(flipped)
        assert str(submission / WEIGHTS) in refused(submission)


def test_a_safetensors_file_of_another_kind(refused, submission):
    save_file({"weight": torch.zeros(3)}, submission / WEIGHTS)
    assert f"{submission / WEIGHTS} is a safetensors file, but no packed model" in refused(submission)


def test_a_missing_stream(refused, submission):
    tensors = load_file(submission / WEIGHTS)
    del tensors["masks"]
    save_file(tensors, submission / WEIGHTS, metadata={"micronet-packed": "{}"})
    assert "the packed model lacks masks" in refused(submission)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"no zlib", "the structure cannot be read"),
        (zlib.compress(b"no JSON"), "the structure cannot be read"),
        (zlib.compress(b"[" * 100_000), "the structure cannot be read"),
        (zlib.compress(b'{"tensors": [], "more": 1}'), "Extra inputs are not permitted"),
        (zlib.compress(b" " * (1 << 26) + b"{}"), "the structure is larger than 64 MiB"),
    ],
    ids=["no zlib", "no JSON", "deep JSON", "another key", "zlib bomb"],
)
def test_a_broken_structure(refused, submission, stream, message):
    change_stream(submission, "structure", lambda before: stream)
    assert str(submission / WEIGHTS) in (error := refused(submission))
    assert message in error


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"type": "LSTM"}, "no layer type 'LSTM'"),
        ({"type": "Linear", "in_features": "many"}, "a Linear cannot be built"),
        ({"type": ["Linear"]}, "the weights do not fit"),
        ({"type": "Sequential", "layers": 3}, "the weights do not fit"),
        ({"type": "Sequential", "layers": [3]}, "the weights do not fit"),
    ],
    ids=["unknown", "wrong option", "type is a list", "layers is a number", "layer is a number"],
)
def test_a_layer_that_cannot_be_built(refused, submission, layer, message):
    change_structure(submission, lambda structure: structure["layers"].update({"0": layer}))
    assert message in refused(submission)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["layers"].update({"nowhere.1": {"type": "Identity"}}), "no module 'nowhere.1'"),
        (lambda s: s["activations"].update(nowhere=8), "no node 'nowhere'"),
        (lambda s: s["activations"].update(input_1=1), "fixed point of 1 bits: 2 to 24 bits are possible"),
        (lambda s: s["tensors"].append(["nowhere.weight", "float32", "dense"]), "'nowhere.weight' has no place"),
        (lambda s: s["tensors"][0].__setitem__(1, "codebook"), "no number format 'codebook'"),
        (lambda s: s["tensors"].append(s["tensors"][0]), "is there twice"),
        (lambda s: s["tensors"].append([s["tensors"][0][0], "float32", "sideways"]), "match pattern '^(dense|"),
    ],
    ids=["layer", "node", "bits", "tensor", "format", "twice", "layout"],
)
def test_a_structure_that_does_not_fit(refused, submission, change, message):
    change_structure(submission, change)
    assert message in refused(submission)


def test_weights_of_another_architecture(refused, submission):
    edit(submission / MANIFEST, "width = 1", "width = 2")
    assert f"{submission / WEIGHTS}: the weights do not fit" in refused(submission)


@pytest.mark.parametrize("stream", ["values", "masks", "overhead"])
def test_more_and_less_data_than_the_tensors_take(refused, submission, stream):
    change_stream(submission, stream, lambda before: before + b"\0")
    assert "the weights do not fit: there is more data than the tensors take" in refused(submission)
    change_stream(submission, stream, lambda before: before[:-2])
    assert "the weights do not fit: the data ends too early" in refused(submission)


# --- tensors that stand in the file as they are -----------------------------------------------------------------------


@pytest.fixture
def plain(submission):
    """Writes unquantized weights in the place of the packed ones, as ordinary tensors, after a change of them."""
    architecture = read_manifest(submission).architecture
    torch.manual_seed(0)
    model = merged(build(architecture, submission, weights=True), torch.zeros(1, 1, 8, 8))
    layers = changes(build(architecture, submission), model)

    def plain(change=lambda tensors, formats: None, layout="plain", overhead=b""):
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        formats = dict.fromkeys(tensors, "float32")
        change(tensors, formats)
        structure = {"layers": layers, "tensors": [(name, formats[name], layout) for name in tensors]}
        streams = {
            "values": as_bytes(b"".join(t.numpy().tobytes() for t in tensors.values()) if layout == "dense" else b""),
            "masks": as_bytes(b""),
            "overhead": as_bytes(overhead),
            "structure": as_bytes(zlib.compress(json.dumps(structure).encode())),
        }
        write(submission, {**streams, **(tensors if layout == "plain" else {})})
        return submission

    return plain


@pytest.mark.parametrize("dtype", ["int8", "bool", "float16"])
def test_a_weight_of_another_dtype_than_the_layer_computes_with(refused, plain, dtype):
    def change(tensors, formats):
        name = list(tensors)[-2]  # of the linear layer, which torch runs on the meta device whatever the dtypes
        tensors[name], formats[name] = torch.ones_like(tensors[name]).to(getattr(torch, dtype)), dtype

    assert f"is {dtype}, but torch.float32 in the architecture" in refused(plain(change))


def test_blocks_that_are_higher_than_the_matrix(refused, plain):
    folder = plain()
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name not in STREAMS and tensors[name].dim() == 1)
    height = tensors.pop(name).numel()
    write(folder, {**tensors, "masks": as_bytes(bytes(-(-height // 8)))})

    def higher(structure):
        (entry,) = (entry for entry in structure["tensors"] if entry[0] == name)
        entry[2] = f"blocks:{height}x1"

    change_structure(folder, higher)
    assert f"blocks of {height} x 1 are larger than a tensor" in refused(folder)


@pytest.mark.parametrize("shape", [(2**63, 0)])
def test_a_tensor_of_an_absurd_shape(refused, plain, shape):
    path = plain() / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["more"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data) - 8 - length] * 2}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert WEIGHTS in refused(path.parent)


def test_a_number_in_a_layer_that_no_float_can_be(refused, submission):
    layer = {"type": "LayerNorm", "normalized_shape": [8], "eps": 10**400}
    change_structure(submission, lambda structure: structure["layers"].update({"3": layer}))
    assert "the weights do not fit: int too large" in refused(submission)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[claims]\nmath = "1e999999999"', "field 'claims.math': the number 1"),
        ("[claims]\nmath = 0e999999999", "is too large"),
        ('[paths]\nexit = "1e-16000000"\nfull = "1"', "field 'paths.exit': the number 1"),
        ('[paths]\n"" = 1.0', "String should have at least 1 character"),
        ("[frequencies]\nclusters = [1.0]", "field 'frequencies': the task digits has no text"),
    ],
)
def test_what_a_manifest_cannot_say(refused, submission, table, message):
    manifest = submission / MANIFEST
    manifest.write_text(manifest.read_text() + f"\n{table}\n")
    assert message in refused(submission)


@pytest.mark.parametrize("layout", ["plain", "dense"])
def test_unquantized_weights_are_fine(run, plain, layout):
    status, _, err = run(plain(layout=layout))
    assert (status, err) == (1, "")  # untrained, so the threshold fails


@pytest.mark.parametrize("layout", ["plain", "dense"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(refused, plain, layout, value):
    def change(tensors, formats):
        tensors["0.weight"] = tensors["0.weight"].clone()
        tensors["0.weight"][3, 0, 1, 1] = value

    assert "tensor '0.weight' holds NaN or infinity" in refused(plain(change, layout))


def test_a_value_off_its_declared_grid(refused, plain):
    def change(tensors, formats):
        tensors["0.weight"] = torch.full_like(tensors["0.weight"], 0.3)
        formats["0.weight"] = "fixed-point:8"

    assert "tensor '0.weight': value 0.3" in (error := refused(plain(change, overhead=b"\xfe")))
    assert "is not on the grid of fixed-point:8 with exponent -2" in error


def test_a_tensor_that_the_model_uses_is_not_declared(refused, plain):
    error = refused(plain(lambda tensors, formats: tensors.pop("0.weight")))
    assert "the file lacks 1 tensors that the model uses, the first is '0.weight'" in error


def test_a_declared_tensor_that_is_not_there(refused, plain):
    folder = plain()
    tensors = load_file(folder / WEIGHTS)
    del tensors["0.weight"]
    write(folder, tensors)
    assert "tensor '0.weight' is missing from the file" in refused(folder)


def test_a_tensor_that_is_not_declared(refused, plain):
    folder = plain()
    write(folder, {**load_file(folder / WEIGHTS), "more": torch.zeros(3)})
    assert "the structure does not list tensor 'more'" in refused(folder)


def test_the_checksum_covers_tensors_that_stand_as_they_are(refused, plain):
    folder = plain()
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors["0.weight"][0] += 1
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    assert "checksum" in refused(folder)


def test_a_tensor_of_another_shape(refused, plain):
    error = refused(plain(lambda tensors, formats: tensors.update({"0.weight": torch.zeros(3)})))
    assert "tensor '0.weight' is missing from the file, or is not of shape (16, 1, 3, 3)" in error


def test_an_operation_without_a_formula(refused, register, submission):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    register(architectures={"odd": Odd})
    text = (submission / MANIFEST).read_text().partition("[architecture]")[0]
    (submission / MANIFEST).write_text(text + '[architecture]\nname = "odd"\n')
    empty = as_bytes(b"")
    structure = as_bytes(zlib.compress(b'{"tensors": []}'))
    write(submission, {"values": empty, "masks": empty, "overhead": empty, "structure": structure})
    error = refused(submission)
    assert "no cost formula for operation aten.i0 in the model's own forward" in error
    assert "micronet_register_costs" in error


# --- count ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    """Writes `broken_model.py` into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def model_file(text):
        monkeypatch.delitem(sys.modules, "broken_model", raising=False)
        (tmp_path / "broken_model.py").write_text(text)

    yield model_file
    sys.modules.pop("broken_model", None)


@pytest.mark.parametrize("shape", ["1x3x", "axb", "", "1x0x3", "1x-3x8", "1,3,8"])
def test_an_input_that_is_no_shape(refused, shape):
    expected = f"--input {shape!r} is no shape; write it like 1x3x224x224"
    assert expected in refused("count", "torchvision:resnet18", "--input", shape)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; nearest: resnet1"),
        ("nonsense", "'nonsense' names no model; write torchvision:NAME, timm:NAME, transformers:CLASS, or "),
        (":f", "':f' names no model"),
        ("no_such_module:f", "cannot find 'no_such_module:f': No module named 'no_such_module'"),
        (
            "nets/small.py:build",
            "No module named 'nets/small'; write nets.small:build",
        ),
        ("json:no_such_function", "cannot find 'json:no_such_function': module 'json' has no attribute"),
        (".json:loads", "'.json:loads'"),
        ("builtins:dict", "builtins:dict returned a dict, not a torch.nn.Module"),
    ],
)
def test_a_target_that_is_no_model(refused, target, message):
    assert message in refused("count", target, "--input", "1x3x8x8")


def test_an_input_that_the_model_does_not_take(refused):
    message = "the model does not run on input 1x5x64x64: in module 'conv1'"
    assert message in refused("count", "torchvision:resnet18", "--input", "1x5x64x64")


def test_an_unknown_task_of_count(refused):
    message = "unknown task 'cifar'; nearest: cifar100"
    assert message in refused("count", "torchvision:resnet18", "--input", "1x3x64x64", "--task", "cifar")


def test_a_function_that_raises(run, model_file):
    model_file("def build():\n    raise KeyError('width')\n")
    status, out, err = run("count", "broken_model:build", "--input", "1")
    assert (status, out) == (3, "")
    assert err == "micronet-eval: broken_model:build failed: KeyError: 'width'\n"


@pytest.mark.parametrize("text", ["1 / 0", "def build(:"])
def test_a_module_that_raises_while_it_is_imported(run, model_file, text):
    model_file(text)
    status, out, err = run("count", "broken_model:build", "--input", "1")
    assert (status, out) == (3, "")
    assert err.startswith("micronet-eval: broken_model")
    assert err.count("\n") == 1


@pytest.mark.parametrize("fault", ["{}['k']", "self.width", "x.item()", "1 / 0", "x @ x @ x[0]"])
def test_a_forward_that_raises(run, model_file, fault):
    code = "from torch import nn\nclass Model(nn.Module):\n    def forward(self, x):\n        return "
    model_file(code + fault)
    status, out, err = run("count", "broken_model:Model", "--input", "2x3")
    assert (status, out) == (2, "")
    assert "the model does not run on input 2x3" in err


# --- strategies and recipes -------------------------------------------------------------------------------------------


def test_an_unknown_strategy(refused):
    assert "unknown strategy 'low-rang'; nearest: low-rank" in refused("strategies", "low-rang")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('task = "digits"', 'task = "digit"', "unknown task 'digit'; nearest: digits"),
        ('data = "noise"', 'data = "some"', "field 'data': Input should be 'task' or 'noise'"),
        ('data = "noise"', "seed = 1.5", "field 'seed': Input should be a valid integer"),
        ('data = "noise"', "seed = -1", "field 'seed': Input should be greater than or equal to 0"),
        ('data = "noise"', "seed = 2147483648", "field 'seed': Input should be less than 2147483648"),
        ('"wide-resnet"', '"wideresnet"', "field 'architecture': unknown architecture 'wideresnet'; nearest: wide-"),
        ("depth = 10", "depth = 11", "field 'architecture': depth 11"),
        ("depth = 10", "deepth = 16", "field 'architecture.deepth': unknown option 'deepth'; nearest: depth"),
        ("depth = 10", "depth = 16.0", "field 'architecture.depth': Input should be a valid integer"),
        ("channels = 1", "channels = 3", "the model does not run on input 1x1x8x8"),
        (
            "[arch",
            "paths = { exit = 0.3 }\n[arch",
            "field 'submission.paths': shares are given of exit, but the model has",
        ),
        (
            "[arch",
            "claims = { quality = 97 }\n[arch",
            "field 'submission.claims.quality': Input should be less than or",
        ),
        ('pruner = "low-rank"', 'pruner = "low-rang"', "unknown pruner 'low-rang'; nearest: low-rank"),
        ("parameters = 40_000", "", "field 'stages.0': pruner low-rank: option 'parameters': Field required"),
        ("parameters = 40_000", "parameters = -1", "field 'stages.0': pruner low-rank: option 'parameters': Input"),
        ("parameters = 40_000", "parameters = 1", "1 parameters cannot be reached"),
        ("parameters = 40_000", "parameters = 40_000\nmacs = 1", "1 MACs cannot be reached"),
        ("sparsity = 0.5", "sparsety = 0.5", "field 'stages.2': sparsifier magnitude: "),
        ('merge = "batch-norm"', 'merge = "batch-norm"\npruner = "low-rank"', "field 'stages.3': a stage has"),
        ('merge = "batch-norm"', "", "field 'stages.3': a stage has exactly one of: train, statistics"),
        ('merge = "batch-norm"', 'merging = "batch-norm"', "field 'stages.3': unknown stage 'merging'; nearest: merge"),
        (
            'pruner = "low-rank"',
            'pruner = "fixed-point"',
            "field 'stages.0': 'fixed-point' is no pruner, but a quantizer",
        ),
        ('pruner = "low-rank"', 'pruner = "gradual"', "field 'stages.0': 'gradual' is no pruner, but a sparsifier"),
        (
            'sparsifier = "magnitude"',
            'sparsifier = "magnitud"',
            "field 'stages.2': unknown sparsifier 'magnitud'; near",
        ),
        (
            "statistics = { batches = 1 }",
            "train = { epochs = 1, learning_rate = 1, distill = { teacher = 'nowhere' } }",
            "field 'stages.1': teacher: nowhere is no folder",
        ),
        ('merge = "batch-norm"', 'merge = "batch-norm"\nall = 1', "only a strategy has options, not: all"),
        ("statistics = { batches = 1 }", "train = { epochs = 0, learning_rate = 1 }", "'stages.1.train.epochs'"),
        ("statistics = { batches = 1 }", "train = { learning_rate = 1 }", "'stages.1.train.epochs': Field required"),
    ],
)
def test_a_broken_recipe(refused, submission, tmp_path, before, after, message):
    recipe = submission / "recipe.toml"
    edit(recipe, before, after)
    assert message in (error := refused("compress", recipe, "-o", tmp_path / "out"))
    assert str(recipe) in error
    assert not (tmp_path / "out").exists()


def test_several_folders_are_a_list_even_if_only_one_is_right(run, submission, tmp_path):
    status, out, err = run(submission, tmp_path / "nowhere", "--format", "json")
    assert (status, [report["submission"] for report in json.loads(out)]) == (2, ["small"])
    assert "nowhere" in err


def test_an_input_of_more_elements_than_there_can_be(refused):
    assert "is no shape" in refused("count", "torchvision:resnet18", "--input", f"1x3x{10**20}x8")


def test_an_output_folder_that_cannot_be_made_is_told_before_the_work(refused, submission, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused("compress", submission / "recipe.toml", "-o", tmp_path / "file" / "out")
    assert f"{tmp_path / 'file' / 'out'} cannot be made: a part of its path is a file" in error


def test_an_unknown_option_of_a_strategy_offers_the_nearest(refused, submission, tmp_path):
    edit(submission / "recipe.toml", "sparsity = 0.5", "sparsety = 0.5")
    error = refused("compress", submission / "recipe.toml", "-o", tmp_path / "out")
    assert "nearest: sparsity" in error


def test_missing_training_data(refused, submission, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(submission / "recipe.toml", 'task = "digits"\ndata = "noise"', 'task = "cifar100"')
    error = refused("compress", submission / "recipe.toml", "-o", "out")
    assert f"{submission / 'recipe.toml'}: CIFAR-100 not found in data/cifar-100-python" in error
    assert "--data" in error
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe(refused, tmp_path):
    assert f"{tmp_path / 'recipe.toml'} is missing" in refused("compress", tmp_path / "recipe.toml", "-o", tmp_path)


def test_labels_that_the_model_has_no_output_for(refused, submission, tmp_path):
    recipe = submission / "recipe.toml"
    edit(recipe, 'data = "noise"\n', "")
    edit(recipe, "classes = 10", "classes = 9")
    edit(recipe, "statistics = { batches = 1 }", "train = { epochs = 1, learning_rate = 0.01 }")
    assert str(recipe) in refused("compress", recipe, "-o", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".kept"]  # with what the first stage came to


def test_an_output_that_is_a_file(refused, submission, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in refused("compress", submission / "recipe.toml", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_another_recipe_is_not_written_over(refused, submission, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("# by hand")
    error = refused("compress", submission / "recipe.toml", "-o", tmp_path / "mine")
    assert f"{tmp_path / 'mine' / 'recipe.toml'} is another recipe" in error
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["recipe.toml"]
    assert (tmp_path / "mine" / "recipe.toml").read_text() == "# by hand"
